"""Commands replace no file without ``--overwrite``, and leave no file behind if a check fails."""

import json

import pytest
from helpers.command import slw
from helpers.launchers import without_launcher

from seqlen_curriculum import ConfigError
from seqlen_curriculum.files import output_file, picture_path

COMMANDS = {
    "plan": (["plan", "nothing.json"], "--png"),
    "inspect": (["inspect", "nothing.json"], "--png"),
    "report": (["report", "nothing"], "--png"),
    "evaluate": (["evaluate", "nothing", "--task", "lambada=nothing"], "--out"),
    "throughput as numbers": (["benchmark", "throughput", "nothing.json"], "--out"),
    "throughput as a picture": (["benchmark", "throughput", "nothing.json"], "--png"),
    "data": (["benchmark", "data", "nothing.json"], "--out"),
    "loop": (["benchmark", "loop", "nothing.json"], "--out"),
    "documents": (["benchmark", "documents", "nothing.json"], "--out"),
}
"""Commands that write a file, whose inputs don't exist."""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Remove a launcher's variables, and drop at the end those that a command sets for its ranks."""
    monkeypatch.setattr("os.environ", without_launcher())


@pytest.mark.parametrize("name", COMMANDS)
def test_an_existing_file_is_refused_before_any_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, flag = COMMANDS[name]
    path = tmp_path / "mine.png"
    path.write_text("mine")
    refused = slw(*command, flag, path)
    assert refused == (
        1,
        "",
        f"error: {flag} {path}: exists already; choose another name, or replace the file with --overwrite\n",
    )
    allowed = slw(*command, flag, path, "--overwrite")
    assert allowed.returncode == 1
    assert "nothing" in allowed.stderr
    assert "exists already" not in allowed.stderr
    assert path.read_text() == "mine"


def test_a_file_is_replaced_if_that_is_asked_for(tmp_path):
    run, picture = tmp_path / "run.json", tmp_path / "plan.svg"
    for path in (run, picture):
        path.write_text("mine")
    copy = ["configs", "copy", "tiny_cpu", "--out", run]
    assert "--overwrite" in slw(*copy).stderr
    assert run.read_text() == "mine"
    assert slw(*copy, "--overwrite") == (0, f"{run}\n", "")
    assert json.loads(run.read_text())["$schema"] == "run.schema.json"
    assert slw("plan", run, "--png", picture, "--overwrite").returncode == 0
    assert "<svg" in picture.read_text()


def test_what_is_no_file_is_never_replaced(tmp_path):
    for path in (tmp_path, "/dev/null"):
        with pytest.raises(ConfigError, match=f"--out {path}: is (a folder; give|not a regular file)"):
            output_file("--out", type(tmp_path)(path), overwrite=True)
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ConfigError, match="not the name of an image file"):
        picture_path("--png", tmp_path / "a.png", overwrite=True)


def test_training_that_cannot_start_leaves_no_folder(tiny_run, tmp_path):
    file, save = tmp_path / "run.json", tmp_path / "runs" / "a"
    file.write_text(json.dumps(tiny_run))
    for arguments, message in (
        (["--set", 'data.train=["nowhere/corpus"]'], "nowhere/corpus"),
        (["--ranks", 3], "train_batch_size: 8"),
    ):
        failed = slw("train", file, "--save", save, *arguments)
        assert failed.returncode == 1
        assert message in failed.stderr
    assert not save.parent.exists()


@pytest.mark.parametrize(
    "command", [["train", "nothing.json", "--save", "a"], ["benchmark", "throughput", "nothing.json"]]
)
def test_ranks_are_checked_before_anything_is_read(command):
    assert slw(*command, "--ranks", 0) == (1, "", "error: --ranks: 0 is not valid; give 1 or more\n")


def test_a_suggestion_ends_its_sentence():
    assert slw("configs", "show", "tiny_cpuu").stderr.endswith("did you mean 'tiny_cpu'? See slw configs list\n")
    assert slw("configs", "show", "xyzzy").stderr.endswith("; see slw configs list\n")
