"""Names and paths as people have them: each command uses them, or says in one line what is wrong with them."""

import contextlib
import json

import numpy as np
import pytest
from helpers.command import slw
from helpers.settings import block

from seqlen_curriculum import RunConfig
from seqlen_curriculum.data.writer import CorpusWriter

NAMES = [
    "with space",
    "new\nline",
    "quote'\"",
    "brackets[1]*?",
    "percent%20",
    "ünï",
    "-dash",
    "#hash",
    "{brace}",
    "a" * 200,
]


def run_of(prefix):
    return {
        "train_batch_size": 4,
        "curriculum_learning": block(max_difficulty=16),
        "data": {"train": [str(prefix)], "seq_length": 16, "split": "1"},
        "training": {"train_tokens": 512},
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "text.txt").write_text("hello world " * 50)
    prepared = slw(
        "prepare", "--input", folder, "--train-vocab", 300, "--out", folder / "corpus", "--workers", 1, "--json"
    )
    assert json.loads(prepared.stdout)["documents"] == 1
    (folder / "run.json").write_text(json.dumps(run_of(folder / "corpus")))
    for command in (
        ("inspect", folder / "corpus"),
        ("inspect", folder / "run.json"),
        ("inspect", folder / "run.json", "--step", 1),
        ("plan", folder / "run.json"),
    ):
        result = slw(*command)
        assert (result.returncode, result.stderr) == (0, ""), command


@pytest.fixture
def loop(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path / "loop"


@pytest.mark.parametrize("path", ["x" * 5000, "y" * 300, "{loop}", "{file}/inside"])
@pytest.mark.parametrize(
    "command",
    [
        ["plan", "{path}"],
        ["inspect", "{path}"],
        ["inspect", "{path}.json"],
        ["report", "{path}"],
        ["report", "{file}", "--out", "{path}"],
        ["export", "{path}", "--out", "{folder}/out"],
        ["export", "{folder}", "--out", "{path}"],
        ["generate", "{path}", "--prompt", "a"],
        ["evaluate", "{path}", "--task", "lambada={file}"],
        ["prepare", "--input", "{path}", "--train-vocab", "300", "--out", "{folder}/c"],
        ["prepare", "--input", "{file}", "--train-vocab", "300", "--out", "{path}"],
        ["prepare", "--input", "{file}", "--tokenizer-file", "{path}", "--out", "{folder}/c"],
        ["merge", "{path}", "--out", "{folder}/c"],
    ],
    ids=lambda command: " ".join(command),
)
def test_a_path_that_the_system_refuses_is_one_line(tmp_path, loop, path, command):
    (tmp_path / "file.txt").write_text("a b c")
    places = {"file": tmp_path / "file.txt", "folder": tmp_path, "loop": loop}
    places["path"] = path.format(**places)
    result = slw(*(part.format(**places) for part in command))
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_a_corpus_behind_links(tmp_path):
    with CorpusWriter(tmp_path / "real", 257) as writer:
        writer.add_document(np.arange(200))
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"link{suffix}").symlink_to(tmp_path / f"real{suffix}")
    (tmp_path / "run.json").write_text(json.dumps(run_of(tmp_path / "link")))
    assert "tokens      200" in slw("inspect", tmp_path / "link").stdout
    assert slw("inspect", tmp_path / "run.json", "--step", 1).returncode == 0


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le"])
def test_a_file_in_another_encoding(tmp_path, encoding):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run_of("corpus")), encoding=encoding)
    result = slw("plan", path)
    assert result.returncode == 1
    assert "is not UTF-8 at byte 1; save it as UTF-8" in result.stderr or "not valid JSON" in result.stderr


@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    assert slw("plan", tmp_path / "run.json").stderr == f"error: {tmp_path}/run.json: is empty; write {{...}}\n"


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_other_systems(tmp_path, end):
    text = json.dumps(run_of("corpus"), indent=1)
    (tmp_path / "run.json").write_text(text.replace("\n", end), newline="")
    (tmp_path / "other.json").write_text(text)
    assert RunConfig.load(tmp_path / "run.json").settings() == RunConfig.load(tmp_path / "other.json").settings()


def test_the_current_folder_has_been_deleted(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text(json.dumps(run_of("corpus")))

    def gone(*_):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("os.getcwd", gone)
    monkeypatch.setattr("contextlib.chdir", lambda _: contextlib.nullcontext())  # of the helper, which goes back
    result = slw("plan", "run.json")
    assert result.stderr == "error: the current folder has been deleted; change to another one\n"
