"""Errors of a launch are printed once: processes with ranks as launchers start them, without torch."""

import os
import subprocess
import sys

import pytest

from seqlen_curriculum.cli import _RANK_VARIABLES, global_rank

SCRIPT = """
import sys, time
from seqlen_curriculum import cli
from seqlen_curriculum.errors import ConfigError, DivergenceError

def main():
    rank = cli.global_rank()
    time.sleep(float(sys.argv[1 + rank].partition(":")[2] or 0))
    kind = sys.argv[1 + rank].partition(":")[0]
    if kind == "config":
        raise ConfigError("training.seed: -1 is below 0")
    if kind == "diverged":
        raise DivergenceError("step 3: the loss is nan")

cli._PATIENCE = float(sys.argv[3])
cli.run(main)
"""


def launch(variable, *outcomes, patience=60):
    """(status, stderr) of two ranks of one launcher; the outcome ``config:0.5`` is an error after 0.5 seconds."""
    command = [sys.executable, "-c", SCRIPT, *outcomes, str(patience)]
    plain = {name: value for name, value in os.environ.items() if "RANK" not in name and "SLURM" not in name}
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
def test_an_error_of_every_rank_is_printed_once(variable, kind, status):
    for delays in (("", ":1"), (":1", "")):  # whichever rank comes first
        first, second = launch(variable, *(kind + delay for delay in delays))
        assert (first[0], second[0]) == (status, status)
        assert first[1].startswith("error: ")
        assert second[1] == ""


def test_an_error_of_one_rank_alone_names_the_rank():
    first, second = launch("RANK", "fine:3", "config", patience=0.5)
    assert first == (0, "")
    assert second == (1, "rank 1: error: training.seed: -1 is below 0\n")


def test_ranks_are_read_as_launchers_set_them():
    assert global_rank({}) == 0
    assert global_rank({"RANK": "3"}) == 3
    assert global_rank({"SLURM_PROCID": "12"}) == 12
    assert global_rank({"RANK": "0", "SLURM_PROCID": "12"}) == 0
