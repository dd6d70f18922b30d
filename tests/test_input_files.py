"""Packed files, tables, and inputs that can't be used."""

import bz2
import gzip
import json
import lzma
import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.preparation import pieces as pieces_module
from seqlen_curriculum.data.preparation import texts
from seqlen_curriculum.data.preparation.corpus_record import PreparedCorpus
from seqlen_curriculum.data.preparation.encode import Encoder
from seqlen_curriculum.data.preparation.input_files import find_files
from seqlen_curriculum.data.preparation.input_stream import open_input
from seqlen_curriculum.data.preparation.pieces import Rules, pieces
from seqlen_curriculum.data.preparation.prepare import Request, prepare
from seqlen_curriculum.data.preparation.texts import Tally, text_parts
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.errors import ConfigError, DataError

TRAIN = TokenizerChoice(train_vocab=300)
SKIP = Rules(on_bad_input="skip")
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def run_prepare(folder: Path, *inputs: Path, **options: Any) -> PreparedCorpus:
    return prepare(Request(str(folder / "out" / "corpus"), TRAIN, inputs, **{"workers": 1, **options}))


def texts_of(prefix: str) -> list[str]:
    corpus = IndexedCorpus(prefix)
    tokenizer = Tokenizer.from_file(prefix + ".tokenizer.json")
    stream = tokenizer.decode(corpus.tokens.tolist(), skip_special_tokens=False)
    return stream.removesuffix("<|endoftext|>").split("<|endoftext|>")


def texts_in(path: Path, rules: Rules) -> tuple[list[str], dict[str, int]]:
    """The documents of a file without those left out, and the counts of these."""
    tally = Tally(rules)
    documents, held = [], ""
    for piece in pieces(path, rules):
        for part in text_parts(piece, rules, tally):
            held += part.text
            if part.ends:
                documents.append(held)
                held = ""
    assert held == ""
    return documents, dict(tally.counts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


# Packed files


@given(
    content=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=3), suffix=st.sampled_from([*PACKERS])
)
def test_a_file_of_several_packed_ones_is_their_contents(
    folder: Path, content: bytes, cuts: list[int], suffix: str
) -> None:
    bounds = [0, *sorted(cuts), 300]
    members = [PACKERS[suffix](content[start:stop]) for start, stop in pairwise(bounds)]
    path = folder / f"several.txt{suffix}"
    path.write_bytes(b"".join(members))
    with open_input(path, []) as stream:
        assert (stream.read(10_000), stream.read(1), stream.damage) == (content, b"", "")
        assert stream.position == path.stat().st_size


@pytest.mark.parametrize("zeros", [1, 100, 10_000])
def test_zeros_after_a_packed_file_are_no_content(tmp_path: Path, zeros: int) -> None:
    for suffix, pack in PACKERS.items():
        path = tmp_path / f"padded.txt{suffix}"
        path.write_bytes(pack(b"one ") + b"\0" * zeros + pack(b"two") + b"\0" * zeros)
        with open_input(path, []) as stream:
            assert (stream.read(100), stream.damage) == (b"one two", "")
            assert stream.position == path.stat().st_size


@given(share=st.floats(0, 1, exclude_max=True), suffix=st.sampled_from([*PACKERS]))
def test_what_stands_before_a_break_is_read(folder: Path, share: float, suffix: str) -> None:
    lines = [f"line {number} of {number**7}" for number in range(300)]
    packed = PACKERS[suffix]("\n".join(lines).encode())
    path = folder / f"broken.txt{suffix}"
    path.write_bytes(packed[: int(share * len(packed))])
    documents, counts = texts_in(path, SKIP)
    assert counts == {"damaged": 1}
    complete = "".join(documents)
    assert complete == "" or (complete.endswith("\n") and complete.splitlines() == lines[: complete.count("\n")])
    with pytest.raises(DataError, match=rf"broken\.txt\{suffix}, line \d+: .*damaged \{suffix}"):
        texts_in(path, Rules())


def test_most_of_a_truncated_file_is_kept(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"number {number} {number**9}"}) for number in range(2000)]
    for suffix, packer in PACKERS.items():
        packed = packer("\n".join(lines).encode())
        path = tmp_path / f"x.jsonl{suffix}"
        path.write_bytes(packed[:-9])
        documents, counts = texts_in(path, SKIP)
        assert counts == {"damaged": 1}
        assert documents == [json.loads(line)["text"] for line in lines[: len(documents)]]
        assert suffix in (".zst", ".bz2") or len(documents) > 1980  # zstd and bzip2 unpack whole blocks only


def test_packed_and_plain_give_the_same_pieces(tmp_path: Path) -> None:
    content = b"some text in words\n" * 60_000  # 1.1 MB: 5 pieces
    (tmp_path / "x.txt").write_bytes(content)
    plain = [piece.data for piece in pieces(tmp_path / "x.txt", Rules())]
    assert len(plain) == 5
    for suffix, packer in PACKERS.items():
        path = tmp_path / f"x.txt{suffix}"
        path.write_bytes(packer(content))
        assert [piece.data for piece in pieces(path, Rules())] == plain
    assert [path.name for path in find_files([tmp_path])] == ["x.txt", *sorted(f"x.txt{suffix}" for suffix in PACKERS)]


def members(lines: int) -> list[bytes]:
    return [json.dumps({"text": f"document {number} {number**9}"}).encode() + b"\n" for number in range(lines)]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_bad_member_of_a_packed_file_costs_itself(tmp_path: Path, suffix: str, place: str) -> None:
    packed = [bytearray(PACKERS[suffix](line * 40)) for line in members(9)]
    # The header, the content, or the check at the end of the fifth member.
    spoiled = {"start": 1, "middle": len(packed[4]) // 2, "end": len(packed[4]) - 6}[place]
    for offset in range(3):
        packed[4][spoiled + offset] ^= 0xFF
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(b"".join(packed))
    documents, counts = texts_in(path, SKIP)
    good = [json.loads(line)["text"] for number, line in enumerate(members(9)) if number != 4 for _ in range(40)]
    assert [text for text in documents if not text.startswith("document 4 ")] == good
    assert counts["damaged"] == 1
    with pytest.raises(DataError, match=rf"x\.jsonl\{suffix}, line \d+: "):
        texts_in(path, Rules())


def test_a_text_continues_after_a_bad_member(tmp_path: Path) -> None:
    parts = [gzip.compress(f"line {number}\n".encode() * 3) for number in range(3)]
    path = tmp_path / "x.txt.gz"
    path.write_bytes(parts[0] + parts[1][:12] + b"\0" + parts[1][13:] + parts[2])
    assert texts_in(path, SKIP) == (["line 0\n" * 3 + "line 2\n" * 3], {"damaged": 1})
    path.write_bytes(parts[1][:12])
    assert texts_in(path, SKIP) == ([], {"damaged": 1})  # nothing is left, so there is no document


def test_a_line_too_long_before_a_bad_member(tmp_path: Path) -> None:
    long = json.dumps({"text": "x" * 3000}).encode() + b"\n"
    parts = [gzip.compress(content) for content in (long[:2000], long, b'{"text": "last"}\n')]
    parts[1] = parts[1][:12] + b"\0" + parts[1][13:]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(b"".join(parts))
    rules = Rules(on_bad_input="skip", max_line_bytes=1024)
    assert texts_in(path, rules) == (["last"], {"too_long": 1, "damaged": 1})


def test_dumps_with_large_windows_and_skippable_frames(tmp_path: Path) -> None:
    line = members(1)[0]
    window = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=28, enable_ldm=True
    )  # 256 MiB, as zstd --long=28
    packer = zstandard.ZstdCompressor(compression_params=window)
    streamed = packer.compressobj()  # without its size, so that the frame declares its whole window
    skippable = b"\x5e\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"table"  # the seek table of seekable dumps
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(streamed.compress(line) + streamed.flush() + skippable)
    assert texts_in(path, Rules()) == ([json.loads(line)["text"]], {})


def test_a_packed_file_without_its_suffix(tmp_path: Path) -> None:
    for suffix, pack in PACKERS.items():
        path = tmp_path / f"{suffix[1:]}.jsonl"
        path.write_bytes(pack(members(1)[0]))
        assert texts_in(path, Rules()) == (["document 0 0"], {})


# Tables


@pytest.fixture(scope="module")
def dataset() -> Any:
    datasets = pytest.importorskip("datasets")
    rows = [f"document {number} é\n" * (number % 5) for number in range(100)]  # 20 are empty
    return datasets.Dataset.from_dict({"id": list(range(100)), "text": rows, "none": [None] * 100})


ROWS = [f"document {number} é\n" * (number % 5) for number in range(100) if number % 5]


@pytest.mark.parametrize("kind", ["saved", "parquet", "arrow", "blocks"])
def test_tables(tmp_path: Path, dataset: Any, kind: str) -> None:
    import pyarrow

    path = tmp_path / ("data" if kind == "saved" else f"data.{kind}" if kind != "blocks" else "data.arrow")
    if kind == "saved":
        dataset.save_to_disk(path, num_shards=3)
        (path / "cache-1.arrow").write_bytes(b"left by datasets")
        assert [file.name[:10] for file in find_files([path])] == ["data-00000", "data-00001", "data-00002"]
    elif kind == "parquet":
        dataset.to_parquet(path, batch_size=30)
    else:
        table = dataset.data.table
        new = pyarrow.ipc.new_file if kind == "blocks" else pyarrow.ipc.new_stream
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=40)
    done = run_prepare(tmp_path, path)
    assert texts_of(done.prefix) == ROWS
    assert done.record["left_out"] == {"empty": 20}
    with pytest.raises(DataError, match=r"'body'.* 'id', 'text', 'none'; .*--json-keys"):
        run_prepare(tmp_path / "2", path, rules=Rules(json_keys=["body"]))
    for key, kind_of in (("id", "a number"), ("none", "null")):
        with pytest.raises(DataError, match=rf", row 1: '{key}' is {kind_of}"):
            run_prepare(tmp_path / "2", path, rules=Rules(json_keys=[key]))


def test_a_dataset_of_several_splits_is_not_mixed(tmp_path: Path, dataset: Any) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=r"data: .*several splits.* .*data/train"):
        run_prepare(tmp_path, tmp_path / "data")
    assert texts_of(run_prepare(tmp_path, tmp_path / "data" / "train").prefix) == ROWS


def test_a_damaged_table(tmp_path: Path, dataset: Any) -> None:
    dataset.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-20])
    (tmp_path / "y.arrow").write_bytes(b"nothing of the kind")
    for name in ("x.parquet", "y.arrow"):
        with pytest.raises(DataError, match=rf"{name}, line 1: .*damaged \.{name[2:]}"):
            run_prepare(tmp_path, tmp_path / name)
        assert texts_in(tmp_path / name, SKIP) == ([], {"damaged": 1})


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_a_bad_row_costs_itself(tmp_path: Path, kind: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = [f"document {number}".encode() for number in range(200)]
    raw[150] = b"caf\xe9"
    size, offsets = len(b"".join(raw)), np.cumsum([0, *map(len, raw)], dtype=np.int32)
    assert size == offsets[-1]
    buffers = [None, pyarrow.py_buffer(offsets.tobytes()), pyarrow.py_buffer(b"".join(raw))]
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), len(raw), buffers)})
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x.arrow")
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=30)
    else:
        new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    expected = [text.decode() for number, text in enumerate(raw) if number != 150]
    assert texts_in(path, SKIP) == (expected, {"not_utf8": 1})
    with pytest.raises(DataError, match=r"x\.\w+, row 151: can't be read \(.*--on-bad-input skip"):
        texts_in(path, Rules())


def test_a_bad_row_group_costs_itself(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": [f"document {number}" for number in range(90)]})
    parquet.write_table(table, path, row_group_size=30, use_dictionary=False, compression="gzip")
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 8] = bytes(8)
    path.write_bytes(content)
    documents, counts = texts_in(path, SKIP)
    assert documents == [f"document {number}" for number in range(90) if not 30 <= number < 60]
    assert counts == {"damaged": 1}
    with pytest.raises(DataError, match=r"x\.parquet, row 31: this row and 29 rows after it can't be read"):
        texts_in(path, Rules())


def test_a_bad_batch_of_arrow_costs_itself(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    offsets = np.array([0, 3, 2**30, 9], dtype=np.int32)  # points outside the text
    buffers = [None, pyarrow.py_buffer(offsets.tobytes()), pyarrow.py_buffer(b"onetwosix")]
    bad = pyarrow.record_batch([pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)], ["text"])
    good = pyarrow.record_batch([pyarrow.array(["last"])], ["text"])
    path = tmp_path / "x.arrow"
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, good.schema) as writer:
        writer.write_batch(bad)
        writer.write_batch(good)
    documents, counts = texts_in(path, SKIP)
    assert documents == ["one", "last"]
    assert counts == {"damaged": 2}


def test_tables_without_their_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"x\.parquet: .*pip install datasets"):
        run_prepare(tmp_path, tmp_path / "x.parquet")


# What can't be used


BAD = [
    (b'{"text": "one"}', None),
    (b'{"text": "\xff"}', "not_utf8"),
    (b'{"text": ', "bad_json"),
    (b"[1]", "bad_json"),
    (b'{"body": "a"}', "no_text"),
    (b'{"text": 5}', "no_text"),
    (b'{"text": "\\ud800"}', "not_utf8"),
    (b'{"text": " "}', "empty"),
    (b'{"text": "two"}', None),
    (b'{"text": "' + b"x" * 2000 + b'"}', "too_long"),
    (b'{"text": "three"}', None),
]
COUNTS = {"not_utf8": 2, "bad_json": 2, "no_text": 2, "empty": 1, "too_long": 1}


@pytest.mark.parametrize("workers", [1, 2])
def test_what_can_not_be_used_is_left_out_and_counted(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 64)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in BAD * 4))
    rules = Rules(on_bad_input="skip", max_line_bytes=1024)
    done = run_prepare(tmp_path, path, rules=rules, workers=workers)
    assert texts_of(done.prefix) == ["one", "two", "three"] * 4
    assert done.record["left_out"] == {kind: 4 * count for kind, count in COUNTS.items()}
    assert json.loads(Path(done.prefix + ".json").read_bytes()) == done.record
    printed = capsys.readouterr().err
    # five of each kind, and all four where there are four: 3 x 5 + 2 x 4
    assert printed.count("warning: ") == 23
    assert f"warning: {path}, line 10: over 1,024 bytes long; give a larger --max-line-bytes; left out" in printed
    assert "left out: 8 not_utf8, 8 bad_json, 8 no_text, 4 empty, 4 too_long" in str(done)


@pytest.mark.parametrize("number", [number for number, (_, kind) in enumerate(BAD) if kind not in (None, "empty")])
def test_by_default_it_is_refused(tmp_path: Path, number: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([b'{"text": "one"}', BAD[number][0], b'{"text": "two"}']))
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: .*--on-bad-input skip"):
        run_prepare(tmp_path, path, rules=Rules(max_line_bytes=1024))


def test_empty_documents_may_be_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\\n"}')
    (tmp_path / "y.txt").write_bytes(b" \n")
    for name, line in (("x.jsonl", 2), ("y.txt", 1)):
        with pytest.raises(DataError, match=rf"{name}, line {line}: .*empty.*--on-empty skip"):
            run_prepare(tmp_path, tmp_path / name, rules=Rules(on_empty="stop"))


@given(
    lengths=st.lists(st.integers(1, 60), max_size=12),
    longest=st.integers(20, 40),
    step=st.integers(1, 50),
    newline=st.booleans(),
)
def test_long_lines_are_left_out_without_being_held(
    folder: Path, lengths: list[int], longest: int, step: int, newline: bool
) -> None:
    lines = [json.dumps({"text": "x" * length}).encode() for length in lengths]  # 12 bytes and the text's
    path = folder / "long.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * newline)
    rules = Rules(on_bad_input="skip", max_line_bytes=longest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE_BYTES", step)
        documents, counts = texts_in(path, rules)
        assert max(len(piece.data) for piece in pieces(path, rules)) <= longest + 1
        problems = [problem.message for piece in pieces(path, rules) for problem in piece.problems]
    numbers = [int(problem.split(", line ")[1].split(":")[0]) for problem in problems]
    assert documents == ["x" * length for length in lengths if length + 12 <= longest]
    assert numbers == [number for number, length in enumerate(lengths, start=1) if length + 12 > longest]
    assert counts.get("too_long", 0) == len(numbers)


def test_a_text_without_spaces_is_left_out_up_to_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 10)
    monkeypatch.setattr(pieces_module, "MAX_WORD_BYTES", 20)
    path = tmp_path / "x.txt"
    path.write_text("one two\nthree " + "x" * 100 + " four " + "y" * 21 + "\nfive")
    assert texts_in(path, SKIP) == (["one two\nthree four\nfive"], {"too_long": 2})
    path.write_text("z" * 100)
    assert texts_in(path, SKIP)[1] == {"too_long": 1}
    with pytest.raises(DataError, match=r"x\.txt, line 1: over [\d,]+ bytes"):
        texts_in(path, Rules())
    whole = Rules(cut_text=False, max_line_bytes=30)
    with pytest.raises(DataError, match=r"over 30 bytes.*--max-line-bytes"):
        texts_in(path, whole)


@pytest.mark.parametrize("content", [b"\xff\n\xfe", b"x" * 100 + b"\n", b"x" * 100])
def test_a_text_of_which_nothing_is_left_is_no_document(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 8)
    monkeypatch.setattr(pieces_module, "MAX_WORD_BYTES", 16)
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    counts = {"not_utf8": 2} if b"\xff" in content else {"too_long": 1}
    assert texts_in(path, SKIP) == ([], counts)


def test_a_line_of_a_text_that_is_not_utf8_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"first\n\xff\nsecond\n\n" + "é".encode("latin-1") + b"\nthird")
    assert texts_in(path, SKIP) == (["first\nsecond\n\nthird"], {"not_utf8": 2})


def test_without_ends_of_documents(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two two"}')
    ended = IndexedCorpus(run_prepare(tmp_path / "ended", path).prefix)
    done = run_prepare(tmp_path, path, rules=Rules(append_eod=False))
    corpus = IndexedCorpus(done.prefix)
    assert corpus.tokens.tolist() == [token for token in ended.tokens.tolist() if token != ended.tokens[-1]]
    assert (corpus.num_documents, corpus.document_start(1)) == (2, ended.document_start(1) - 1)
    assert done.record["settings"]["append_eod"] is False
    with pytest.raises(DataError, match=r"corpus\.bin: exists"):
        run_prepare(tmp_path, path)


def test_a_long_text_in_json_gives_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "It's a test,  of  cuts\u00a0 \u3000 at\n\n  spaces. 123 naïve 日本語 text! \t\x1c 😀 we'll see\r\n" * 7
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": text}))
    tokenizer_json = build_tokenizer(TRAIN, [text]).to_str()
    (piece,) = pieces(path, Rules())
    whole = Encoder(tokenizer_json, Rules(cut_text=False))([piece])
    for step in (4, 12, 40, 400):
        monkeypatch.setattr(texts, "PIECE_BYTES", step)
        cut = Encoder(tokenizer_json, Rules())([piece])
        assert (cut.tokens.tolist(), cut.ends.tolist()) == (whole.tokens.tolist(), whole.ends.tolist())
    assert len(list(text_parts(piece, Rules(), Tally(Rules())))) == 6  # 532 characters, 100 and up to a space each


def test_the_limit_has_a_floor(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-line-bytes: 1000 .*1024"):
        run_prepare(tmp_path, tmp_path, rules=Rules(max_line_bytes=1000))
    assert os.listdir(tmp_path) == []


def test_what_is_no_file_and_no_dataset(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt: neither"):
        find_files([tmp_path / "pipe.txt"])
    (tmp_path / "data.arrow").write_bytes(b"")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{bad")
    with pytest.raises(DataError, match=r"state\.json: .*save_to_disk"):
        find_files([tmp_path])


def test_an_indented_array_gets_the_hint_of_one_on_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    documents = [{"text": "one"}, {"text": "two"}]
    for indent in (None, 2, 0, "\t"):
        path.write_text(json.dumps(documents, indent=indent))
        with pytest.raises(DataError, match=r"x\.json, line 1: .*; write each of its objects on its own line \(jq -c"):
            texts_in(path, Rules())
    path.write_text('[{"text": "one"},\n{"text": "two"}]')
    with pytest.raises(DataError, match=r"line 1: .* \(jq -c \.\[\]\)"):
        texts_in(path, Rules())
    path.write_text(json.dumps(documents[0], indent=2))
    with pytest.raises(DataError, match=r"line 1: .*; write each object on its own line \(jq -c \.\)"):
        texts_in(path, Rules())


# Files that systems, editors and browsers leave in a folder


def test_files_that_are_not_text_are_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {
        "._a.txt": "hidden",
        ".ipynb_checkpoints/a.txt": "hidden",
        "__MACOSX/a.txt": "hidden",
        "a.txt~": "an editor's copy",
        "#a.txt#": "an editor's copy",
        "~$a.txt": "an editor's copy",
        "a.txt.bak": "an editor's copy",
        "b.jsonl.crdownload": "an unfinished download or write",
        "b.jsonl.gz.part": "an unfinished download or write",
        "c.parquet.tmp": "an unfinished download or write",
        "d.jsonl.lz4": r"\.lz4 can't be read here; unpack it",
        "e.zip": r"\.zip can't be read here; unpack it",
    }
    for name in ("a.txt", ".DS_Store", "Thumbs.db", "notes.csv", *names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    for name, problem in names.items():
        for other in set(names) - {name}:
            (tmp_path / other).unlink(missing_ok=True)
        (tmp_path / name).write_text("content")
        assert find_files([tmp_path]) == [tmp_path / "a.txt"]
        warnings = capsys.readouterr().err
        assert re.fullmatch(rf"warning: {re.escape(str(tmp_path / name))}: {problem}.*; left out\n", warnings), warnings
        (tmp_path / name).unlink()
    assert find_files([tmp_path]) == [tmp_path / "a.txt"]
    assert capsys.readouterr().err == ""
    (tmp_path / "b.txt").symlink_to("absent.txt")
    assert find_files([tmp_path]) == [tmp_path / "a.txt"]
    assert "b.txt: a link to a file that does not exist; left out" in capsys.readouterr().err
    (tmp_path / ".notes.txt").write_text("named by the user")
    assert find_files([tmp_path / ".notes.txt"]) == [tmp_path / ".notes.txt"]
    (tmp_path / "b.jsonl.part").write_text("")
    with pytest.raises(DataError, match=r"b\.jsonl\.part: unknown suffix '\.part'; an unfinished download"):
        find_files([tmp_path / "b.jsonl.part"])


def test_many_files_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(8):
        (tmp_path / f".{number}.txt").write_text("")
    (tmp_path / "a.txt").write_text("a")
    find_files([tmp_path])
    warnings = capsys.readouterr().err.splitlines()
    assert (len(warnings), warnings[-1]) == (6, "warning: and 3 files more like these")


def test_the_order_of_names_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("part9.txt", "part10.txt", "part11.txt", "zone.txt"):
        (tmp_path / name).write_text(name)
    assert [path.name for path in find_files([tmp_path])] == ["part10.txt", "part11.txt", "part9.txt", "zone.txt"]
    warning = capsys.readouterr().err
    assert warning.count("warning") == 1
    assert (
        f"{tmp_path}: files are read in the order of the characters in their names, part11.txt before part9.txt"
        in warning
    )
    (tmp_path / "part9.txt").rename(tmp_path / "part09.txt")
    find_files([tmp_path])
    assert capsys.readouterr().err == ""


def test_copies_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in {"a.txt": "same", "b.txt": "same", "c.txt": "else", "e1.txt": "", "e2.txt": ""}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"else"))
    assert len(find_files([tmp_path])) == 6
    first, second = sorted(capsys.readouterr().err.splitlines())
    assert first.startswith(
        f"warning: {tmp_path / 'b.txt'}: has the size, the beginning and the end of {tmp_path / 'a.txt'}"
    )
    assert second.startswith(f"warning: {tmp_path / 'c.txt.gz'}: c.txt in the same folder seems to be the same text")
    (tmp_path / "link.txt").symlink_to("a.txt")
    with pytest.raises(DataError, match=r"link\.txt: given twice, also as .*a\.txt"):
        find_files([tmp_path])
