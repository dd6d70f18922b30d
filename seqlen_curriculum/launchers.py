"""The launcher that started this process: its rank, the world size, and the address of rank 0.

``deepspeed`` and ``torchrun`` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which torch reads. ``mpirun``
and ``srun`` set other variables; ``fill_environment`` derives the five from them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from seqlen_curriculum.errors import ConfigError

__all__ = [
    "DEFAULT_PORT",
    "Launch",
    "be_only_rank",
    "device_number",
    "fill_environment",
    "global_rank",
    "launch",
    "port_errors",
    "port_problem",
    "read_launch",
]

DEFAULT_PORT = 29500
"""The port on which ranks connect if neither the launcher nor MASTER_PORT sets another one; DeepSpeed's default."""

_COMM_WORLD = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
_MPI_VARIABLES = (
    tuple(f"OMPI_COMM_WORLD_{name}" for name in _COMM_WORLD),  # Open MPI
    tuple(f"MV2_COMM_WORLD_{name}" for name in _COMM_WORLD),  # MVAPICH
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
)
"""Variables in which each mpirun stores the rank, the world size, the local rank and the local world size."""

_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""Variables that limit the devices a process sees."""


class Launch(NamedTuple):
    """The rank of this process in the launch that started it."""

    launcher: str
    rank: int
    ranks: int
    local_rank: int
    """The rank within this node."""
    local_ranks: int
    """Number of ranks on this node."""
    address: str
    """The host of rank 0; empty if the launcher doesn't set it."""
    common: str
    """A string shared by all ranks of this launch and unique among the launches on the host of rank 0."""


def read_launch(environment: Mapping[str, str]) -> Launch | None:
    """Return the launch described by the variables in ``environment``, or None without a launcher.

    If launchers are nested, the innermost one is returned: ``deepspeed`` in a Slurm job, ``mpirun`` whose daemons were
    started by ``srun``. A Slurm step with one task is not treated as a launch, because an interactive shell is one too.
    Neither is a batch script, which has SLURM_PROCID=0 and no step.
    """

    def number(*names: str, default: int = 0) -> int:
        return next((int(value) for name in names if (value := environment.get(name, "")).isdigit()), default)

    ranks = number("WORLD_SIZE", default=1)
    if environment.get("RANK", "").isdigit():
        local_ranks = number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=ranks)  # torchrun's name, deepspeed's
        return Launch("deepspeed or torchrun", number("RANK"), ranks, number("LOCAL_RANK"), local_ranks, "", "")
    for rank, size, local_rank, local_size in _MPI_VARIABLES:
        if all(environment.get(name, "").isdigit() for name in (rank, size, local_rank, local_size)):
            ranks, local_ranks = number(size), number(local_size)
            address = "127.0.0.1" if ranks == local_ranks else ""
            common = environment.get("PMIX_NAMESPACE") or str(os.getppid())  # without PMIx: mpirun itself, on one node
            return Launch("mpirun", number(rank), ranks, number(local_rank), local_ranks, address, common)
    if number("SLURM_STEP_NUM_TASKS") > 1 and environment.get("SLURM_PROCID", "").isdigit():
        return Launch(
            "srun",
            number("SLURM_PROCID"),
            number("SLURM_STEP_NUM_TASKS"),
            number("SLURM_LOCALID"),
            _tasks_of_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"), number("SLURM_NODEID")),
            _first_host(environment.get("SLURM_STEP_NODELIST", "")),
            f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}",
        )
    return None


def _first_host(nodes: str) -> str:
    """Return the first host of Slurm's node list, which runs rank 0: gpu03 for ``gpu[03-05,9],login1``."""
    # SLURM_LAUNCH_NODE_IPADDR is the host that runs srun, which may be a login node.
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]


def _tasks_of_node(tasks: str, node: int) -> int:
    """Return the number of tasks on node number ``node`` in Slurm's list: ``4(x2),3`` means 4, 4 and 3."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(times or 1)
    return counts[node] if node < len(counts) else 1


@functools.cache  # DeepSpeed and fill_environment change the variables later
def launch() -> Launch | None:
    """Return the launch of this process, read from its environment at the first call, or None without a launcher."""
    return read_launch(os.environ)


def global_rank() -> int:
    """Return the global rank of this process, 0 without a launcher."""
    found = launch()
    return found.rank if found else 0


def fill_environment() -> None:
    """Set those of torch's five variables that the launcher left unset. Raises ConfigError if the host is unknown."""
    found = launch()
    if found is None:
        return
    address = os.environ.get("MASTER_ADDR") or found.address
    if not address and found.ranks > 1:
        raise ConfigError(
            f"MASTER_ADDR: not set, and {found.launcher} doesn't give the host of rank 0 of {found.ranks} ranks; set it: "
            "mpirun -x MASTER_ADDR=HOST (MPICH, Intel MPI: -genv MASTER_ADDR HOST), and MASTER_PORT the same way"
        )
    known: dict[str, int | str] = {"RANK": found.rank, "LOCAL_RANK": found.local_rank, "WORLD_SIZE": found.ranks}
    known |= {"MASTER_ADDR": address or "127.0.0.1", "MASTER_PORT": _port(found.common)}
    for name, value in known.items():
        if not os.environ.get(name):
            os.environ[name] = str(value)


def be_only_rank(port: int | None = None) -> None:
    """Set torch's five variables for a process that no launcher started: rank 0 of 1, listening at ``port`` or a free one.

    Raises ConfigError if WORLD_SIZE says that there are other ranks, because RANK is then missing.
    """
    ranks = os.environ.get("WORLD_SIZE") or "1"
    if ranks != "1":
        raise ConfigError(
            f"RANK: not set, but WORLD_SIZE is {ranks}; start the script with deepspeed, torchrun, mpirun or srun, or set "
            "RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT too, for each process"
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        known: dict[str, int | str] = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        known["MASTER_PORT"] = port or free.getsockname()[1]
    for name, value in known.items():
        if not os.environ.get(name):
            os.environ[name] = str(value)


def port_problem() -> Iterator[str]:
    """Yield an error line if this is rank 0 and it can't listen at MASTER_PORT."""
    found, port = launch(), os.environ.get("MASTER_PORT", "")
    if found and port == "0":  # torchrun passes 0 to its ranks unchanged, and they never connect
        yield "MASTER_PORT: 0 is not a valid port; give another (torchrun: --standalone finds a free one on one node)"
        return
    # Under torchrun the agent itself listens at that port.
    if not found or found.rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not port.isdigit():
        return
    try:
        with socket.create_server(("", int(port))):
            pass
    except (OSError, OverflowError) as error:
        yield _port_line(port, getattr(error, "strerror", None) or error)


@contextlib.contextmanager
def port_errors() -> Iterator[None]:
    """Raise ConfigError for torch's error that MASTER_PORT is in use: of two runs started together, both saw it free."""
    try:
        yield
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(_port_line(os.environ.get("MASTER_PORT", ""), "Address already in use")) from None


def _port_line(port: str, reason: object) -> str:
    return (
        f"MASTER_PORT: can't listen at port {port} ({reason}); choose another "
        "(deepspeed --master_port N; else set MASTER_PORT on all ranks), or end the run that uses it"
    )


def _port(common: str) -> int:
    """Return a port below the ephemeral range (32768 and up on Linux), derived from ``common``, if it is not empty."""
    digest = hashlib.blake2b(common.encode(), digest_size=8).digest()
    return 15_000 + int.from_bytes(digest, "little") % 14_000 if common else DEFAULT_PORT


def device_number(local_rank: int, devices: int) -> int:
    """Return the index of this rank's device among the visible ``devices``. Raises ConfigError if there are too few.

    It is 0 if the launcher makes only one device visible to each process (Slurm's ``--gpus-per-task``).
    """
    is_shown_one = devices == 1 and any(os.environ.get(name) for name in _VISIBLE_DEVICES)
    if local_rank >= devices and not is_shown_one:
        raise ConfigError(
            f"LOCAL_RANK {local_rank}: this node has {devices} visible GPUs, numbers 0 to {devices - 1}; start at most "
            f"{devices} ranks per node"
        )
    return 0 if is_shown_one else local_rank
