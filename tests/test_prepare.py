import gzip
import json
import os
import re
import subprocess
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import slw
from helpers.shared_data import shared
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.preparation import pieces as pieces_module
from seqlen_curriculum.data.preparation.corpus_record import PreparedCorpus
from seqlen_curriculum.data.preparation.encode import Encoder, encode
from seqlen_curriculum.data.preparation.input_files import find_files, stdlib_files
from seqlen_curriculum.data.preparation.pieces import Rules, batches, pieces
from seqlen_curriculum.data.preparation.prepare import Request, prepare
from seqlen_curriculum.data.preparation.texts import Tally, text_parts
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer, splits_at_spaces
from seqlen_curriculum.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]
WHOLE = Rules(cut_text=False)
TRAIN = TokenizerChoice(train_vocab=300)
SUFFIXES = (".bin", ".idx", ".json", ".tokenizer.json")


def run_prepare(folder: Path, *inputs: Path, tokenizer: TokenizerChoice = TRAIN, **options: Any) -> PreparedCorpus:
    return prepare(Request(str(folder / "out" / "corpus"), tokenizer, inputs, **{"workers": 1, **options}))


def texts_of(prefix: str) -> list[str]:
    """The documents of a corpus, decoded; each must end with the end of text."""
    corpus = IndexedCorpus(prefix)
    tokenizer = Tokenizer.from_file(prefix + ".tokenizer.json")
    end = tokenizer.token_to_id("<|endoftext|>")
    bounds = [corpus.document_start(number) for number in range(corpus.num_documents + 1)]
    rows = [corpus.tokens[start:stop].tolist() for start, stop in pairwise(bounds)]
    assert all(row[-1] == end and end not in row[:-1] for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("*"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with each kind of input: seven documents, two of them empty."""
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("first document\nof two lines\n")
    (folder / "a2.md").write_text("")
    (folder / "b" / "c.jsonl").write_text('{"text": "second é"}\n\n{"text": " ", "id": 1}\n{"text": "third"}')
    (folder / "b" / "ignored.csv").write_text("1,2")
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbffourth <|endoftext|> goes on"))
    (folder / "e.ndjson.gz").write_bytes(gzip.compress(b'{"text": "fifth\\ud83d\\ude00"}\n'))
    return folder


FOUND = ["first document\nof two lines\n", "second é", "third", "fourth <|endoftext|> goes on", "fifth😀"]


# Outputs


def test_every_kind_of_input(texts: Path, tmp_path: Path) -> None:
    done = run_prepare(tmp_path, texts)
    assert texts_of(done.prefix) == FOUND
    assert outputs(tmp_path) == ["corpus.bin", "corpus.idx", "corpus.json", "corpus.tokenizer.json"]
    corpus = IndexedCorpus(done.prefix)
    record = json.loads(Path(done.prefix + ".json").read_bytes())
    assert record == done.record
    assert record["vocab_size"] == corpus.vocab_size
    assert (record["documents"], record["tokens"]) == (5, corpus.num_tokens)
    assert record["left_out"] == {"empty": 2}
    assert record["text_bytes"] == sum(len(text.encode()) for text in FOUND)
    assert record["end_of_text_id"] == corpus.tokens[-1]
    names = ["a.txt", "a2.md", "b/c.jsonl", "d.txt.gz", "e.ndjson.gz"]
    assert [given["path"] for given in record["inputs"]] == [str(texts / name) for name in names]
    assert [given["bytes"] for given in record["inputs"]] == [(texts / name).stat().st_size for name in names]


def test_inputs_keep_the_given_order(texts: Path, tmp_path: Path) -> None:
    done = run_prepare(tmp_path, texts / "e.ndjson.gz", texts / "b", texts / "a.txt")
    assert texts_of(done.prefix) == [FOUND[4], FOUND[1], FOUND[2], FOUND[0]]


def test_json_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"title": "T", "body": "B", "text": "no"}\n{"title": "", "body": ""}\n')
    done = run_prepare(tmp_path, path, rules=Rules(json_keys=["title", "body"]))
    assert texts_of(done.prefix) == ["T\nB"]
    assert done.record["left_out"] == {"empty": 1}


def test_prepared_before(texts: Path, tmp_path: Path) -> None:
    first = run_prepare(tmp_path, texts)
    stamps = {suffix: os.stat(first.prefix + suffix).st_mtime_ns for suffix in SUFFIXES}
    again = run_prepare(tmp_path, texts, workers=2)
    assert (first.already, again.already) == (False, True)
    assert str(again).startswith(f"already prepared: {first.prefix} (5 documents, ")
    assert {suffix: os.stat(first.prefix + suffix).st_mtime_ns for suffix in SUFFIXES} == stamps


def test_outputs_inside_the_input_folder_are_no_input(texts: Path) -> None:
    request = Request(str(texts / "corpus"), TRAIN, [texts], workers=1)
    assert prepare(request).record["documents"] == 5
    assert prepare(request).already


@pytest.mark.parametrize("change", ["input", "setting", "missing output", "broken record"])
def test_nothing_is_overwritten_unasked(texts: Path, tmp_path: Path, change: str) -> None:
    prefix = run_prepare(tmp_path, texts).prefix
    choice = TRAIN
    if change == "input":
        (texts / "a.txt").write_text("another text altogether")
    elif change == "setting":
        choice = TokenizerChoice(train_vocab=299)
    elif change == "missing output":
        Path(prefix + ".idx").unlink()
    else:
        Path(prefix + ".json").write_text("{")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in outputs(tmp_path)}
    with pytest.raises(DataError, match=r"corpus\.bin: exists .*--overwrite"):
        run_prepare(tmp_path, texts, tokenizer=choice)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in outputs(tmp_path)} == before
    assert not run_prepare(tmp_path, texts, tokenizer=choice, overwrite=True).already
    assert run_prepare(tmp_path, texts, tokenizer=choice).already


# Pieces: how a file is cut never shows in the result


LONG = "It's a test,  of  cuts\u00a0 \u3000 at\n\n  spaces. 123 naïve 日本語 text! \t\x1c 😀 we'll see\r\n"


@settings(deadline=None, max_examples=60)
@given(
    text=st.one_of(st.text(), st.text("ab1'!\u00a0\u3000\x1c日 \n\t", max_size=200), st.just(LONG * 5)),
    size=st.integers(1, 40),
)
def test_a_long_document_gives_the_tokens_of_the_whole(
    text: str, size: int, tokenizer_json: str, cut_file: Path
) -> None:
    cut_file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE_BYTES", size)
        cut_pieces = list(pieces(cut_file, Rules()))
    assert b"".join(piece.data for piece in cut_pieces) == text.encode().removeprefix(b"\xef\xbb\xbf")
    assert sum(piece.input_bytes for piece in cut_pieces) == len(text.encode())
    encoder = Encoder(tokenizer_json, Rules())
    whole = encoder(list(pieces(cut_file, WHOLE)))
    cut = encoder(cut_pieces)
    assert cut.tokens.tolist() == whole.tokens.tolist()
    assert cut.ends.tolist() == whole.ends.tolist()
    assert (cut.text_bytes, cut.left_out) == (whole.text_bytes, whole.left_out)


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    return str(build_tokenizer(TRAIN, [LONG * 3]).to_str())


@pytest.fixture(scope="module")
def cut_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cut") / "long.txt"


def test_a_long_document_is_held_in_pieces(cut_file: Path) -> None:
    cut_file.write_text("word " * 200_000)  # 1,000,000 bytes: 3 of 262,144 and the rest
    assert [len(piece.data) // 1000 for piece in pieces(cut_file, Rules())] == [262, 262, 262, 213]
    assert len(list(pieces(cut_file, WHOLE))) == 1


def test_json_lines_are_never_cut(cut_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 10)
    path = cut_file.with_name("lines.jsonl")
    lines = [json.dumps({"text": f"document {number} " * number}) for number in range(1, 20)]
    path.write_text("\n".join(lines))
    tally = Tally(Rules())
    documents = [
        part.text for batch in batches([path], Rules()) for piece in batch for part in text_parts(piece, Rules(), tally)
    ]
    assert documents == [json.loads(line)["text"] for line in lines]


def test_any_number_of_workers_gives_the_same(cut_file: Path, tokenizer_json: str) -> None:
    cut_file.write_text(
        "".join(f"line {number} of the text\n" for number in range(40_000))
    )  # 0.9 MB: 3 of 262,144 and the rest
    alone, together = (list(encode(batches([cut_file], Rules()), tokenizer_json, Rules(), n)) for n in (1, 2))
    assert len(alone) == len(together) == 4
    for batch, other in zip(alone, together, strict=True):
        assert batch.tokens.tobytes() == other.tokens.tobytes()
        assert batch.ends.tolist() == other.ends.tolist()
        assert batch[2:] == other[2:]


# Tokenizers


def test_training_is_deterministic() -> None:
    lines = [path.read_text() for path in stdlib_files()[:12]]
    choice = TokenizerChoice(train_vocab=600)
    first, second = (build_tokenizer(choice, iter(lines)).to_str() for _ in range(2))
    assert first == second
    assert len(json.loads(first)["model"]["vocab"]) == 600


def test_training_on_pieces_equals_training_on_documents(cut_file: Path) -> None:
    text = "".join(path.read_text() for path in stdlib_files()[:40])
    cut_file.write_text(text)
    halves = [part.text for piece in pieces(cut_file, Rules()) for part in text_parts(piece, Rules(), Tally(Rules()))]
    assert len(halves) > 1
    choice = TokenizerChoice(train_vocab=400)
    assert build_tokenizer(choice, halves).to_str() == build_tokenizer(choice, [cut_file.read_text()]).to_str()


def test_gpt2(tmp_path: Path) -> None:
    choice = TokenizerChoice(shared("gpt2-bpe/encoder.json"), shared("gpt2-bpe/vocab.bpe"))
    path = tmp_path / "x.txt"
    path.write_text("Hello world")
    done = run_prepare(tmp_path, path, tokenizer=choice)
    corpus = IndexedCorpus(done.prefix)
    assert corpus.tokens.tolist() == [15496, 995, 50256]
    assert (corpus.vocab_size, corpus.dtype, done.record["end_of_text_id"]) == (50257, np.uint16, 50256)
    assert splits_at_spaces(Tokenizer.from_file(done.prefix + ".tokenizer.json"))


@pytest.mark.slow
def test_state_of_the_union_has_the_known_number_of_tokens(tmp_path: Path) -> None:
    choice = TokenizerChoice(shared("gpt2-bpe/encoder.json"), shared("gpt2-bpe/vocab.bpe"))
    record = run_prepare(tmp_path, shared("sotu/sotu.jsonl"), tokenizer=choice, workers=2).record
    assert (record["documents"], record["tokens"]) == (233, 2_074_288)  # end-of-text tokens included


def test_a_saved_tokenizer_gives_the_same_corpus(texts: Path, tmp_path: Path) -> None:
    first = run_prepare(tmp_path, texts)
    tokenizer = Tokenizer.from_file(first.prefix + ".tokenizer.json")
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    second = run_prepare(tmp_path / "2", texts, tokenizer=TokenizerChoice(tokenizer_file=tmp_path / "tokenizer.json"))
    for suffix in (".bin", ".idx", ".tokenizer.json"):
        assert Path(first.prefix + suffix).read_bytes() == Path(second.prefix + suffix).read_bytes()


def test_other_tokenizers_get_whole_documents(tokenizer_json: str) -> None:
    for change in ({"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": None}):
        assert not splits_at_spaces(Tokenizer.from_str(json.dumps({**json.loads(tokenizer_json), **change})))
    spaced = json.loads(tokenizer_json)
    spaced["pre_tokenizer"]["add_prefix_space"] = True
    assert not splits_at_spaces(Tokenizer.from_str(json.dumps(spaced)))
    assert splits_at_spaces(Tokenizer.from_str(tokenizer_json))


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        (TokenizerChoice(), "exactly one"),
        (TokenizerChoice(tokenizer_file=Path("t.json"), train_vocab=300), "exactly one"),
        (TokenizerChoice(vocab_file=Path("v.json")), "--vocab-file and --merge-file"),
        (TokenizerChoice(merge_file=Path("m.bpe"), train_vocab=300), "--vocab-file and --merge-file"),
        (TokenizerChoice(train_vocab=256), "--train-vocab: 256 .*257"),
        (TokenizerChoice(tokenizer_file=Path("absent.json")), r"absent\.json: can't be read \(No such file"),
    ],
)
def test_choice_of_tokenizer(texts: Path, tmp_path: Path, choice: TokenizerChoice, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        run_prepare(tmp_path, texts, tokenizer=choice)
    assert outputs(tmp_path) == []


@pytest.mark.parametrize(
    ("vocab", "merges", "problem"),
    [
        ("{", "", r"v\.json, line 1: not valid JSON"),
        ("[]", "", r"v\.json: .*token to id"),
        ('{"a": "b"}', "", r"v\.json: .*token to id"),
        ('{"a": 0}', "", r"v\.json and .*m\.bpe: .*255 tokens"),
        (None, "#version: 0.2\nt h\nthe\n", r"m\.bpe, line 3: 'the'"),
        (None, "t h\ne r\n", r"v\.json and .*m\.bpe: .*'er'"),
        (None, "", r"v\.json and .*m\.bpe: .*'th'"),
        (None, "t h\n", None),
    ],
)
def test_gpt2_files(texts: Path, tmp_path: Path, vocab: str | None, merges: str, problem: str | None) -> None:
    if vocab is None:
        alphabet = json.loads(build_tokenizer(TokenizerChoice(train_vocab=257), []).to_str())["model"]["vocab"]
        vocab = json.dumps({**alphabet, "th": 257})
    (tmp_path / "v.json").write_text(vocab)
    (tmp_path / "m.bpe").write_text(merges)
    choice = TokenizerChoice(tmp_path / "v.json", tmp_path / "m.bpe")
    if problem is None:
        assert texts_of(run_prepare(tmp_path, texts, tokenizer=choice).prefix) == FOUND
        return
    with pytest.raises(ConfigError, match=problem):
        run_prepare(tmp_path, texts, tokenizer=choice)
    assert outputs(tmp_path) == []


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"version": "1.0"}'])
def test_broken_tokenizer_file(texts: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not "):
        run_prepare(tmp_path, texts, tokenizer=TokenizerChoice(tokenizer_file=path))


# Inputs that don't work


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.csv", b"a,b", r"x\.csv: .*'\.csv'.*\.txt"),
        ("x.csv.gz", b"a,b", r"x\.csv\.gz: unknown suffix"),
        ("x.parquet.zst", b"a,b", r"x\.parquet\.zst: unknown suffix '\.zst'"),
        ("x.txt", b"good\nba\xffd", r"x\.txt, line 2: not UTF-8 \(byte 0xff\)"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xc3("}', r"x\.jsonl, line 2: not UTF-8 \(byte 0xc3\)"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": ', r"x\.jsonl, line 3: not valid JSON \(Expecting value at column 10"),
        ("x.jsonl", b"[1]", r"x\.jsonl, line 1: a list"),
        ("x.jsonl", b'{"body": "a"}', r"x\.jsonl, line 1: no key 'text', .*'body'.*--json-keys"),
        ("x.jsonl", b'{"text": 5}', r"x\.jsonl, line 1: 'text' is a number"),
        ("x.jsonl", b'{"text": "\\ud800"}', r"x\.jsonl, line 1: 'text' has .*surrogate"),
        (
            "x.jsonl",
            b'{"text":' + b"[" * 200_000,
            r"x\.jsonl, line 1: (a number or a nesting too large|not valid JSON)",
        ),
        ("x.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"x\.jsonl, line 1: a number or a nesting too large"),
        ("x.txt.gz", gzip.compress(b"%x" % 3**9999)[:-99], r"x\.txt\.gz, line 1: truncated or damaged \.gz"),
        ("x.txt.gz", b"not gzip at all", r"x\.txt\.gz, line 1: truncated or damaged \.gz"),
        ("x.txt", b"  \n", r"--input: .*left out: 1 empty"),
    ],
)
def test_bad_input_names_file_and_line(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        run_prepare(tmp_path, path)
    assert outputs(tmp_path) == []


def test_a_bad_line_late_in_the_input_leaves_nothing(tmp_path: Path, tokenizer_json: str) -> None:
    lines = [json.dumps({"text": "word " * 100})] * 1500  # 3 pieces
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, "{"]))
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"x\.jsonl, line 1501: not valid JSON"):
            run_prepare(
                tmp_path,
                tmp_path / "x.jsonl",
                tokenizer=TokenizerChoice(tokenizer_file=tmp_path / "tokenizer.json"),
                workers=workers,
            )
        assert outputs(tmp_path) == []


def test_missing_and_repeated_inputs(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for inputs, problem in (
        ([tmp_path / "absent.txt"], r"absent\.txt: no such file or folder"),
        ([tmp_path / "empty"], r"empty: .*no file with a known suffix"),
        ([texts, texts / "a.txt"], r"a\.txt: given twice"),
    ):
        with pytest.raises(DataError, match=problem):
            run_prepare(tmp_path, *inputs)
    with pytest.raises(ConfigError, match="--input: "):
        run_prepare(tmp_path)
    with pytest.raises(ConfigError, match="--workers: 0 "):
        run_prepare(tmp_path, texts, workers=0)
    with pytest.raises(ConfigError, match="--json-keys: "):
        run_prepare(tmp_path, texts, rules=Rules(json_keys=[]))


def test_output_folder_that_can_not_be_made(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match=r"--out .*out: .*can't be written"):
        run_prepare(tmp_path, texts)


def test_standard_library_files() -> None:
    files = stdlib_files()
    assert files == sorted(files)
    assert len(files) > 500
    root = Path(sysconfig.get_path("stdlib"))
    assert {root / "argparse.py", root / "json" / "decoder.py"} <= set(files)
    assert not any(part in ("site-packages", "__pycache__") for path in files for part in path.relative_to(root).parts)


def test_folders_are_sorted(texts: Path) -> None:
    assert [path.name for path in find_files([texts])] == ["a.txt", "a2.md", "c.jsonl", "d.txt.gz", "e.ndjson.gz"]


# The command


def script(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "scripts/prepare_data.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_gives_the_same_bytes_with_any_workers(tmp_path: Path) -> None:
    standard = Path(sysconfig.get_path("stdlib")) / "asyncio"  # 34 files, 0.5 MB: two pieces
    for workers in (1, 2):
        prefix = tmp_path / str(workers) / "corpus"
        flags = ["--input", standard, "--train-vocab", 300, "--output-prefix", prefix, "--workers", workers]
        done = script(*flags)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"prepared: {prefix} (")
        assert "\r" not in done.stderr  # a bar is for terminals
    for suffix in SUFFIXES:
        assert (tmp_path / f"1/corpus{suffix}").read_bytes() == (tmp_path / f"2/corpus{suffix}").read_bytes()
    again = script(*flags)
    assert (again.returncode, again.stdout[:18]) == (0, "already prepared: ")


def test_the_command_reports_errors_in_one_line(texts: Path, tmp_path: Path) -> None:
    failed = slw("prepare", "--input", texts, "--output-prefix", tmp_path / "c")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: tokenizer: ")
    assert failed.stderr.count("\n") == 1


def test_the_flags_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "one"}\n{"body": " "}\n{"body": "%s"}\n' % ("long " * 300))
    flags = ["--input", path, "--keys", "body", "--no-append-eod", "--max-line-bytes", 1024, "--train-vocab", 300]
    refused = slw("prepare", *flags, "--output-prefix", tmp_path / "c")
    assert refused.returncode == 1
    assert "x.jsonl, line 3: over 1,024 bytes long; give a larger --max-line-bytes" in refused.stderr
    done = slw("prepare", *flags, "--on-bad-input", "skip", "--workers", 1, "--output-prefix", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\(1 documents, \d tokens of 3 bytes, .* MB/s\); left out: 1 empty, 1 too_long\n", done.stdout)
    record = json.loads((tmp_path / "c.json").read_bytes())
    assert record["settings"]["append_eod"] is False
    assert record["end_of_text_id"] not in IndexedCorpus(tmp_path / "c").tokens
    refused = slw("prepare", *flags, "--on-empty", "stop", "--output-prefix", tmp_path / "d")
    assert "x.jsonl, line 2: an empty document; or give --on-empty skip" in refused.stderr


def test_the_command_has_an_example() -> None:
    shown = slw("prepare", "--help")
    assert shown.returncode == 0
    assert "--stdlib --train-vocab 512 --out corpus/stdlib" in shown.stdout
