"""A preparation that is killed resumes where it was, and writes the same bytes."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.command import slw

from seqlen_curriculum.data import writer
from seqlen_curriculum.data.preparation import pieces, prepare, resumable
from seqlen_curriculum.data.preparation.corpus_record import PreparedCorpus
from seqlen_curriculum.data.preparation.input_files import stdlib_files
from seqlen_curriculum.data.preparation.pieces import Rules
from seqlen_curriculum.data.preparation.prepare import Request
from seqlen_curriculum.data.preparation.resumable import PartialCorpus
from seqlen_curriculum.data.tokenizer import TokenizerChoice
from seqlen_curriculum.errors import DataError

ROOT = Path(__file__).parents[1]
SUFFIXES = (".bin", ".idx", ".json", ".tokenizer.json")
SKIP = Rules(on_bad_input="skip")


def run_prepare(folder: Path, *inputs: Path, **options: Any) -> PreparedCorpus:
    options = {"workers": 1, "rules": SKIP, **options}
    return prepare.prepare(Request(str(folder / "corpus"), TokenizerChoice(train_vocab=300), inputs, **options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard a batch, batches of 100 bytes or so."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    monkeypatch.setattr(resumable, "SHARD_BYTES", 1)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """20 documents in a dozen batches, one line that can't be used and an empty document among them."""
    texts = [{"text": f"document {number} " * 4} for number in range(20)]
    rows = [json.dumps(text) for text in texts]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join([*rows[:9], "{", '{"text": ""}', *rows[9:]]))
    return path


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: BaseException) -> None:
    """Let the next preparation end by ``error`` when so many batches are encoded."""
    real = prepare.encode

    def encode(*given: Any) -> Iterator[Any]:
        for number, encoded in enumerate(real(*given)):
            if number == batches:
                monkeypatch.setattr(prepare, "encode", real)
                raise error
            yield encoded

    monkeypatch.setattr(prepare, "encode", encode)


def test_kill_and_the_same_command(tmp_path: Path) -> None:
    """SIGTERM, SIGKILL and the end, each a process of its own with two workers; no worker outlives its parent."""
    sources = b"".join(path.read_bytes() for path in stdlib_files())[:300_000]
    (tmp_path / "x.txt").write_bytes(sources[:150_000] + b"\n\xff\n" + sources[150_000:])
    command = ["--input", "x.txt", "--train-vocab", "300", "--on-bad-input", "skip", "--workers", "2"]
    code = (
        "import runpy, sys; from seqlen_curriculum.data.preparation import pieces, resumable\n"
        "pieces.PIECE_BYTES, resumable.SHARD_BYTES = 2**13, 2**14\n"
        f"sys.argv[0] = {str(ROOT / 'scripts/prepare_data.py')!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )

    def start(prefix: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", code, *command, "--output-prefix", f"{prefix}/corpus"]
        return subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    journal = tmp_path / "killed" / "corpus.partial" / "journal"
    done = 1
    for sent in (signal.SIGTERM, signal.SIGKILL):
        process = start("killed")
        while not journal.exists() or journal.read_bytes().count(b"\n") < done + 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == (130 if sent == signal.SIGTERM else -signal.SIGKILL)
        assert ("corpus.partial: rerun the same command" in stderr) == (sent == signal.SIGTERM)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == []
        done = journal.read_bytes().count(b"\n")
        assert not (tmp_path / "killed" / "corpus.bin").exists()
    last = start("killed")
    whole = start("whole")
    stdout, stderr = last.communicate(timeout=60)
    assert last.returncode == 0, stderr
    assert re.search(r"resuming killed/corpus\.partial: 0 documents, \d[\d,]{5,} tokens", stderr)
    assert "training the tokenizer" not in stderr
    assert "left out: 1 not_utf8" in stdout
    assert whole.wait(timeout=60) == 0
    whole.communicate()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(("batches", "workers"), [(0, 1), (1, 1), (5, 1), (6, 2), (10, 1)])
def test_interrupted_anywhere(
    tmp_path: Path, lines: Path, batches: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_prepare(tmp_path / "whole", lines)
    stop_after(monkeypatch, batches, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_prepare(tmp_path / "out", lines)
    folder = tmp_path / "out" / "corpus.partial"
    assert (folder / "journal").read_bytes().count(b"\n") == batches + 1
    with open(folder / "journal", "a") as journal, open(folder / "corpus.bin.part", "ab") as tokens:
        journal.write('{"batches": 9')  # what a process was writing when it was killed
        tokens.write(b"torn")
    assert run_prepare(tmp_path / "out", lines, workers=workers).record["left_out"] == {"bad_json": 1, "empty": 1}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_interrupted_twice(tmp_path: Path, lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_prepare(tmp_path / "whole", lines)
    for _ in range(2):
        stop_after(monkeypatch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run_prepare(tmp_path / "out", lines)
    assert (tmp_path / "out" / "corpus.partial" / "journal").read_bytes().count(b"\n") == 9
    run_prepare(tmp_path / "out", lines)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("moves", range(4))
def test_killed_while_the_outputs_move_to_their_place(
    tmp_path: Path, lines: Path, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_prepare(tmp_path / "whole", lines)
    (tmp_path / "out").mkdir()
    for name in contents(tmp_path / "whole"):
        (tmp_path / "out" / name).write_bytes(b"older")
    real, left = os.replace, [moves]

    def replace(source: Path, target: Path) -> None:
        if target.parent == tmp_path / "out":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            run_prepare(tmp_path / "out", lines, overwrite=True)
    assert not (tmp_path / "out" / "corpus.idx").exists()  # neither the older one nor the new one
    assert run_prepare(tmp_path / "out", lines, overwrite=True).already
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_what_is_of_other_settings_is_discarded(
    tmp_path: Path, lines: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(monkeypatch, 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_prepare(tmp_path / "out", lines)
    other = Rules(on_bad_input="skip", append_eod=False)
    run_prepare(tmp_path / "whole", lines, rules=other)
    capsys.readouterr()
    run_prepare(tmp_path / "out", lines, rules=other)
    assert f"discarding {tmp_path}/out/corpus.partial: " in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_refused_input_may_be_left_out_by_the_next_command(
    tmp_path: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = TokenizerChoice(tokenizer_file=Path(run_prepare(tmp_path / "t", lines).prefix + ".tokenizer.json"))

    def attempt(name: str, rules: Rules) -> PreparedCorpus:
        return prepare.prepare(Request(str(tmp_path / name / "corpus"), tokenizer, [lines], rules=rules, workers=1))

    with pytest.raises(DataError, match=r"line 10: not valid JSON .*--on-bad-input skip"):
        attempt("out", Rules())
    capsys.readouterr()
    attempt("out", SKIP)
    assert "resuming" in capsys.readouterr().err
    attempt("whole", SKIP)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(DataError, match=r"corpus\.bin: exists"):
        attempt("out", Rules())  # which would not have made it


def test_what_was_left_out_may_not_be_refused_later(
    tmp_path: Path, lines: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 10, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_prepare(tmp_path / "out", lines)
    with pytest.raises(DataError, match="line 10: not valid JSON"):
        run_prepare(tmp_path / "out", lines, rules=Rules())


def test_one_process_at_a_time(tmp_path: Path, lines: Path) -> None:
    (tmp_path / "out").mkdir()
    with PartialCorpus(str(tmp_path / "out" / "corpus"), {}, SKIP.stops_at):
        with pytest.raises(DataError, match=r"corpus\.partial: another process"):
            run_prepare(tmp_path / "out", lines)
        assert not (tmp_path / "out" / "corpus.bin").exists()
    run_prepare(tmp_path / "out", lines)


def test_tokens_that_got_lost_are_noticed(tmp_path: Path, lines: Path, small_shards: None, monkeypatch: Any) -> None:
    stop_after(monkeypatch, 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_prepare(tmp_path / "out", lines)
    (tmp_path / "out" / "corpus.partial" / "corpus.bin.part").write_bytes(b"short")
    with pytest.raises(DataError, match=r"corpus\.bin\.part: .*\d+ bytes"):
        run_prepare(tmp_path / "out", lines)


def test_a_full_disk(tmp_path: Path, lines: Path) -> None:
    lines.write_text("some words\n" * 20_000)
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), "--input", lines.rename(tmp_path / "x.txt")]
    command += ["--train-vocab", 260, "--workers", 1, "--output-prefix", tmp_path / "out" / "corpus"]

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, preexec_fn=limited)

    full = run(100_000)
    assert full.returncode == 1
    assert "error: " + str(tmp_path / "out/corpus.partial: can't be written (File too large)") in full.stderr
    assert "Traceback" not in full.stderr
    done = run(-1)
    assert done.returncode == 0, done.stderr
    assert sorted(contents(tmp_path / "out")) == sorted(f"corpus{suffix}" for suffix in SUFFIXES)


def test_an_input_folder_may_hold_a_partial(tmp_path: Path, lines: Path, small_shards: None, monkeypatch: Any) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    lines.rename(texts / "lines.jsonl")
    stop_after(monkeypatch, 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_prepare(texts, texts)
    assert run_prepare(texts, texts).record["documents"] == 20


# What may lie in the way


def _prepared(tmp_path, *arguments):
    if not (tmp_path / "good.txt").exists():
        (tmp_path / "good.txt").write_text("some words to train on " * 30)
    options = ["--train-vocab", "270", "--workers", "1", "--output-prefix", tmp_path / "out", *arguments]
    return slw("prepare", "--input", tmp_path / "good.txt", *options)


def test_a_journal_with_a_broken_line_is_good_up_to_it(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "journal").write_bytes(b'{"a": 1}\n\0\0\0\n')
    result = _prepared(tmp_path)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "out.partial").exists()
    # A folder whose removal was cut short goes with the next command, which finds the corpus done.
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "corpus.lengths.part").write_text("x")
    result = _prepared(tmp_path)
    assert result.stdout.startswith("already prepared")
    assert not (tmp_path / "out.partial").exists()


def test_foreign_files_are_left_alone_and_reported(tmp_path):
    (tmp_path / "out.partial").write_text("a file")
    result = _prepared(tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "out.partial: can't be written (Not a directory)" in result.stderr
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out.partial" / "mine").mkdir(parents=True)
    result = _prepared(tmp_path)
    assert "out.partial: " in result.stderr
    assert "'mine'" in result.stderr
    assert (tmp_path / "out.partial" / "mine").is_dir()
