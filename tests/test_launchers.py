"""Rank and meeting point are read from the variables of every launcher, and from nothing that only resembles one."""

import os
import socket

import pytest
from helpers import launchers

from seqlen_curriculum import ConfigError
from seqlen_curriculum.launchers import (
    be_only_rank,
    device_number,
    fill_environment,
    launch,
    port_errors,
    port_problem,
    read_launch,
)


@pytest.fixture
def started_by(monkeypatch):
    """Make this process believe that a launcher started it with these variables."""

    def start(**variables):
        for name in [name for name in os.environ if name not in launchers.without_launcher()]:
            monkeypatch.delenv(name)
        # Set and removed again: what fill_environment sets is taken back after the test.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        launch.cache_clear()

    yield start
    launch.cache_clear()


@pytest.mark.parametrize(
    "variables", [launchers.torchrun, launchers.mpirun, launchers.mvapich, launchers.mpich, launchers.srun]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_launcher_says_its_ranks(variables, rank):
    found = read_launch(variables(rank))
    assert (found.rank, found.ranks, found.local_rank, found.local_ranks) == (rank, 2, rank, 2)


def test_slurm_says_nodes_and_their_tasks_in_short():
    # 4 tasks on each of two nodes and 3 on the third: rank 9 is the second of the third.
    found = read_launch(launchers.srun(9, 11, "4(x2),3", nodes="gpu[03-05],login1", node=2, local_rank=1))
    assert (found.local_rank, found.local_ranks, found.address) == (1, 3, "gpu03")
    for nodes, first in [("a", "a"), ("a-1,b", "a-1"), ("r[1-2]n[07,09],b", "r1n07"), ("n[1-3]-ib0", "n1-ib0")]:
        assert read_launch(launchers.srun(0, nodes=nodes)).address == first


def test_the_launcher_that_started_the_process_itself_counts():
    inside_slurm = launchers.srun(0, 2, "1(x2)", nodes="a,b")  # a step of one task a node, in which others start ranks
    assert read_launch({**inside_slurm, **launchers.mpirun(3, 4)}).rank == 3
    assert read_launch({**inside_slurm, **launchers.mpirun(3, 4), **launchers.torchrun(5, 8)}).rank == 5
    assert read_launch({**launchers.srun(3, 4), "PMI_RANK": "3", "PMI_SIZE": "4"}).launcher == "srun"  # srun --mpi=pmi2


@pytest.mark.parametrize(
    "variables",
    [
        {},
        launchers.srun(0, 1, "1"),  # an interactive shell: srun --pty bash
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"},  # a batch script
        {"SLURM_NTASKS": "16", "SLURM_JOB_ID": "7", "SLURM_NODELIST": "a,b"},  # salloc
        {"PMIX_RANK": "0", "PMI_RANK": "0"},
    ],
)
def test_what_is_no_launch_is_none(variables):
    assert read_launch(variables) is None


def test_missing_variables_are_filled_in_and_set_ones_kept(started_by):
    started_by(**launchers.srun(5, 8, "4(x2)", nodes="n[1-2]", node=1, local_rank=1))
    fill_environment()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    assert [os.environ[name] for name in names] == ["5", "1", "8", "n1"]
    port = int(os.environ["MASTER_PORT"])
    assert 15_000 <= port < 29_000

    started_by(**launchers.srun(2, 8, "4(x2)", nodes="n[1-2]", node=0))
    fill_environment()
    assert int(os.environ["MASTER_PORT"]) == port  # of the same job and step
    started_by(**launchers.srun(2, 8, "4(x2)", nodes="n[1-2]", node=0, job=8))
    fill_environment()
    assert int(os.environ["MASTER_PORT"]) != port

    started_by(**launchers.mpirun(1), MASTER_PORT="30000")
    fill_environment()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["1", "1", "2", "127.0.0.1", "30000"]


def test_mpirun_over_nodes_needs_the_host_of_rank_0(started_by):
    started_by(**launchers.mpirun(2, 4, 2))
    with pytest.raises(ConfigError, match=r"MASTER_ADDR: not set.* of 4 .*mpirun -x MASTER_ADDR=HOST"):
        fill_environment()
    started_by(**launchers.mpirun(2, 4, 2), MASTER_ADDR="n1")
    fill_environment()
    assert os.environ["MASTER_ADDR"] == "n1"


def test_a_process_without_a_launcher_is_the_only_rank(started_by):
    started_by(MASTER_ADDR="localhost")
    be_only_rank()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    assert [os.environ[name] for name in names] == ["0", "0", "1", "localhost"]
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        pass  # it is free
    started_by()
    be_only_rank(port=31234)
    assert os.environ["MASTER_PORT"] == "31234"
    started_by(WORLD_SIZE="4")
    with pytest.raises(
        ConfigError, match="RANK: not set, but WORLD_SIZE is 4; start the script with deepspeed, torchrun"
    ):
        be_only_rank()


def test_a_port_that_another_run_has_just_taken_is_named(started_by):
    from torch.distributed import TCPStore  # takes seconds to import

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        started_by(**launchers.mpirun(0), MASTER_PORT=str(port))
        with pytest.raises(ConfigError, match=f"^MASTER_PORT: can't listen at port {port} ") as raised, port_errors():
            TCPStore("127.0.0.1", port, 1, is_master=True)
        assert raised.value.__suppress_context__
    with pytest.raises(RuntimeError, match="other"), port_errors():
        raise RuntimeError("other")


def test_a_port_in_use_is_named_by_rank_0(started_by):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        started_by(**launchers.mpirun(0), MASTER_PORT=port)
        (problem,) = port_problem()
        assert problem.startswith(f"MASTER_PORT: can't listen at port {port} (Address already in use")
        assert "--master_port" in problem
        started_by(**launchers.mpirun(1), MASTER_PORT=port)
        assert list(port_problem()) == []
        started_by(**launchers.torchrun(0), MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
        assert list(port_problem()) == []
    started_by(**launchers.mpirun(0), MASTER_PORT=port)
    assert list(port_problem()) == []
    started_by(**launchers.torchrun(1), MASTER_PORT="0", TORCHELASTIC_USE_AGENT_STORE="True")
    (problem,) = port_problem()
    assert problem.startswith("MASTER_PORT: 0 is not a valid port")


def test_each_rank_has_a_device_of_its_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [device_number(rank, 8) for rank in (0, 7)] == [0, 7]
    with pytest.raises(ConfigError, match=r"LOCAL_RANK 1: this node has 1 visible GPUs.* at most 1 ranks"):
        device_number(1, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert device_number(3, 1) == 0  # Slurm shows each task its own GPU alone
    with pytest.raises(ConfigError, match=r"LOCAL_RANK 8: this node has 8 visible GPUs.* at most 8 ranks"):
        device_number(8, 8)
