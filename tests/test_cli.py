"""Errors of a launch are printed once: processes with ranks as launchers start them, without torch."""

import os
import re
import subprocess
import sys
import tempfile

import pytest
from helpers import launchers
from helpers.launching import ROOT

from seqlen_curriculum.cli import COMMANDS, common, flags

SCRIPT = """
import sys, time
from seqlen_curriculum.cli import common
from seqlen_curriculum.errors import ConfigError, DivergenceError
from seqlen_curriculum.launchers import global_rank

def main():
    kind, _, seconds = sys.argv[1 + global_rank()].partition(":")
    time.sleep(float(seconds or 0))
    if kind == "config":
        raise ConfigError("training.seed: -1 is below 0")
    if kind == "diverged":
        raise DivergenceError("step 3: the loss is nan")

common._PATIENCE = float(sys.argv[3])
common.run(main, ranked=True)
"""


def launch(folder, variables, *outcomes, patience=60):
    """(status, stderr) of two ranks of one launcher; the outcome ``config:0.5`` is an error after 0.5 seconds."""
    command = [sys.executable, "-c", SCRIPT, *outcomes, str(patience)]
    # Launchers differ by their process id, which here is that of the tests each time.
    plain = {**launchers.without_launcher(), "TMPDIR": tempfile.mkdtemp(dir=folder)}
    ranks = [
        subprocess.Popen(
            command,
            env={**plain, **variables(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    printed = [process.communicate()[1] for process in ranks]
    return [(process.returncode, text) for process, text in zip(ranks, printed, strict=True)]


@pytest.mark.parametrize("variables", [launchers.torchrun, launchers.mpirun, launchers.srun])
@pytest.mark.parametrize(("kind", "status"), [("config", 1), ("diverged", 3)])
def test_an_error_of_every_rank_is_printed_once(tmp_path, variables, kind, status):
    for delays in (("", ":1"), (":1", "")):  # whichever rank comes first
        first, second = launch(tmp_path, variables, *(kind + delay for delay in delays))
        assert (first[0], second[0]) == (status, status)
        assert first[1].startswith("error: ")
        assert second[1] == ""


def test_an_error_of_one_rank_alone_names_the_rank(tmp_path):
    for ends in ("fine:3", "fine", "config"):  # rank 0 goes on, has ended, or has another error
        first, second = launch(tmp_path, launchers.torchrun, ends, "diverged", patience=0.5)
        assert first[0] == (1 if ends == "config" else 0)
        assert second == (3, "rank 1: error: step 3: the loss is nan\n")


def test_an_error_is_never_lost_where_no_rank_0_is_to_be_seen(tmp_path):
    command = [sys.executable, "-c", SCRIPT, "-", "config", "0.5"]
    for environment in ({"RANK": "1"}, {"RANK": "1", "LOCAL_RANK": "1"}, {"RANK": "1", "LOCAL_RANK": "0"}):
        environment |= {"TMPDIR": tempfile.mkdtemp(dir=tmp_path)}
        environment |= launchers.without_launcher()
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (1, "rank 1: error: training.seed: -1 is below 0\n")


def test_commands_without_ranks_always_print(tmp_path):
    script = str(ROOT / "scripts" / "plan.py")
    environment = {**os.environ, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "RANK": "1"}
    result = subprocess.run([sys.executable, script, "nothing.json"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: nothing.json: can't be read")


def test_markers_of_earlier_launches_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, young, other = (tmp_path / name for name in (f"{common._MARKER}-1", f"{common._MARKER}-2", "other"))
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    common.run(lambda: None, ranked=True)
    assert sorted(tmp_path.iterdir()) == sorted([young, other])


def test_the_status_that_a_command_returns_is_its_exit_status():
    code = "from seqlen_curriculum.cli.common import run; run(lambda: {})"
    for status in (0, 75):
        assert subprocess.run([sys.executable, "-c", code.format(status)]).returncode == status


def test_flags_are_not_abbreviated(capsys):
    parser = flags.Parser(prog="slw")
    parser.add_argument("--deepspeed_config")
    kind = parser.add_subparsers().add_parser("data")
    kind.add_argument("--rounds")
    for arguments in (["--deepspeed=run.json"], ["data", "--round=1"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        assert end.value.code == 2
        assert "no such flag" in capsys.readouterr().err


def test_every_script_is_a_subcommand():
    for script in (ROOT / "scripts").glob("*.py"):
        (name,) = re.findall(r'^    script\("(\w+)"\)$', script.read_text(), re.MULTILINE)
        assert name in COMMANDS


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train_gpt2.py", ["--config", "nothing.json", "--save", "."]),
        ("evaluate.py", ["nothing"]),
        ("benchmark.py", ["data", "--config", "nothing.json"]),
    ],
)
def test_flags_that_launchers_add_are_accepted(script, arguments):
    flags = ["--deepspeed", "--local_rank=1", "--local-rank=1"]
    command = [sys.executable, str(ROOT / "scripts" / script), *flags, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=launchers.without_launcher())
    assert result.returncode == 1, result.stderr  # it would be 2 for an unknown flag
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_memory_segments_grow_unless_the_user_has_set_up_the_allocator(monkeypatch, own):
    names = {name for name in os.environ if name.endswith("_ALLOC_CONF")} | {"PYTORCH_CUDA_ALLOC_CONF"}
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)
    common.grow_memory_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv(own, "backend:native")
    common.grow_memory_segments()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") in (None, "backend:native")


def test_training_asks_for_growing_segments_before_it_imports_torch():
    script = (ROOT / "seqlen_curriculum" / "cli" / "train.py").read_text()
    assert script.index("    grow_memory_segments()") < script.index("from seqlen_curriculum.training")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/r/a", "/r/b.json"], ["a", "b"]),
        (["/r/1/x", "/r/2/x"], ["1/x", "2/x"]),
        (["/r/1/x/y", "/r/2/x/y", "/r/2/x/z"], ["1/x/y", "2/x/y", "2/x/z"]),
        (["/x", "/r/x"], ["x", "r/x"]),
        (["/r/x", "/r/x.json"], ["x", "x.json"]),
        (["/"], ["/"]),
    ],
)
def test_runs_are_named_by_the_shortest_ends_that_differ(paths, names):
    assert common.short_names("RUN", paths) == dict(zip(names, paths, strict=True))


def test_names_may_have_more_parts_than_needed():
    assert [*common.short_names("CHECKPOINT", ["/r/a/step1", "/r/b/step2"], parts=2)] == ["a/step1", "b/step2"]
