"""Errors of a launch are printed once: processes with ranks as launchers start them, without torch."""

import os
import subprocess
import sys
import tempfile

import pytest
from helpers.launching import ROOT

from seqlen_curriculum.cli import _RANK_VARIABLES, global_rank, grow_memory_segments

SCRIPT = """
import sys, time
from seqlen_curriculum import cli
from seqlen_curriculum.errors import ConfigError, DivergenceError

def main():
    rank = cli.global_rank()
    kind, _, seconds = sys.argv[1 + rank].partition(":")
    time.sleep(float(seconds or 0))
    if kind == "config":
        raise ConfigError("training.seed: -1 is below 0")
    if kind == "diverged":
        raise DivergenceError("step 3: the loss is nan")

cli._PATIENCE = float(sys.argv[3])
cli.run(main, ranked=True)
"""


def launch(folder, variable, *outcomes, patience=60):
    """(status, stderr) of two ranks of one launcher; the outcome ``config:0.5`` is an error after 0.5 seconds."""
    command = [sys.executable, "-c", SCRIPT, *outcomes, str(patience)]
    plain = {name: value for name, value in os.environ.items() if "RANK" not in name and "SLURM" not in name}
    # Launchers differ by their process id, which here is that of the tests each time.
    plain["TMPDIR"] = tempfile.mkdtemp(dir=folder)
    ranks = [
        subprocess.Popen(
            command,
            env={**plain, variable: str(rank), _RANK_VARIABLES[variable]: str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    printed = [process.communicate()[1] for process in ranks]
    return [(process.returncode, text) for process, text in zip(ranks, printed, strict=True)]


@pytest.mark.parametrize("variable", ["RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"])
@pytest.mark.parametrize(("kind", "status"), [("config", 1), ("diverged", 3)])
def test_an_error_of_every_rank_is_printed_once(tmp_path, variable, kind, status):
    for delays in (("", ":1"), (":1", "")):  # whichever rank comes first
        first, second = launch(tmp_path, variable, *(kind + delay for delay in delays))
        assert (first[0], second[0]) == (status, status)
        assert first[1].startswith("error: ")
        assert second[1] == ""


def test_an_error_of_one_rank_alone_names_the_rank(tmp_path):
    for ends in ("fine:3", "fine", "config"):  # rank 0 goes on, has ended, or has another error
        first, second = launch(tmp_path, "RANK", ends, "diverged", patience=0.5)
        assert first[0] == (1 if ends == "config" else 0)
        assert second == (3, "rank 1: error: step 3: the loss is nan\n")


def test_an_error_is_never_lost_where_no_rank_0_is_to_be_seen(tmp_path):
    command = [sys.executable, "-c", SCRIPT, "-", "config", "0.5"]
    for environment in ({"RANK": "1"}, {"RANK": "1", "LOCAL_RANK": "1"}, {"RANK": "1", "LOCAL_RANK": "0"}):
        environment |= {"TMPDIR": tempfile.mkdtemp(dir=tmp_path)}
        result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (1, "rank 1: error: training.seed: -1 is below 0\n")


def test_commands_without_ranks_always_print(tmp_path):
    script = str(ROOT / "scripts" / "plan.py")
    environment = {**os.environ, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "RANK": "1"}
    result = subprocess.run([sys.executable, script, "nothing.json"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: nothing.json: can't be read")


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, 0), ({"RANK": "3"}, 3), ({"SLURM_PROCID": "12"}, 12), ({"RANK": "0", "SLURM_PROCID": "12"}, 0)],
)
def test_ranks_are_read_as_launchers_set_them(monkeypatch, environment, rank):
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert global_rank() == rank


@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_memory_segments_grow_unless_the_user_has_set_up_the_allocator(monkeypatch, own):
    names = {name for name in os.environ if name.endswith("_ALLOC_CONF")} | {"PYTORCH_CUDA_ALLOC_CONF"}
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)
    grow_memory_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv(own, "backend:native")
    grow_memory_segments()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") in (None, "backend:native")


def test_training_asks_for_growing_segments_before_it_imports_torch():
    script = (ROOT / "scripts" / "train_gpt2.py").read_text()
    assert script.index("    grow_memory_segments()") < script.index("from seqlen_curriculum.training")
