"""What every command shares: errors as one line, printed once, and names of runs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import DIVERGED, ConfigError, DivergenceError, SeqlenCurriculumError

__all__ = ["global_rank", "need_launcher", "run", "short_names", "warn"]

_RANK_VARIABLES = {
    "RANK": "LOCAL_RANK",  # deepspeed, torchrun
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",  # Open MPI
    "PMI_RANK": "MPI_LOCALRANKID",  # MPICH, Intel MPI
    "SLURM_PROCID": "SLURM_LOCALID",  # srun
}
"""Where launchers put the rank of a process among all, and among those of its node."""
_PATIENCE = 10.0
"""Seconds in which rank 0 may come to the same error and print it."""
_PRINTED = "seqlen_curriculum/error_printed"


def run(main: Callable[[], None]) -> None:
    """Call ``main``; a user's error is printed as ``error: ...`` once, by rank 0, and ends every rank with its status.

    The status is DIVERGED for a training that diverged, 130 for an interrupt, else 1.
    """
    try:
        main()
        distributed: Any = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_initialized():
            distributed.destroy_process_group()  # else its threads may abort the process as it exits
    except SeqlenCurriculumError as error:
        _print_once(error)
        sys.exit(DIVERGED if isinstance(error, DivergenceError) else 1)
    except KeyboardInterrupt:
        if global_rank() == 0:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `command | head` closed the pipe: not an error
        sys.stderr.close()


def global_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return this process's rank as its launcher set it, 0 without a launcher."""
    name = _rank_variable(environment)
    return int(environment[name]) if name else 0


def _rank_variable(environment: Mapping[str, str]) -> str | None:
    return next((name for name in _RANK_VARIABLES if environment.get(name, "").isdigit()), None)


def _print_once(error: SeqlenCurriculumError) -> None:
    """Print ``error`` on rank 0; on another rank only where rank 0 has not printed it within ``_PATIENCE``.

    Most errors are those of every rank: the file is wrong, or the checkpoint that rank 0 has read. A corpus that one node
    lacks is that node's alone. A rank that exits ends the whole launch, so it waits until rank 0 has come as far.
    """
    rank, store = global_rank(), _store()
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if store is not None:
            store.set(_PRINTED, "1")
        return
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if _rank_0_ended() or (store is not None and _is_set(store)):
            return
        time.sleep(0.1)
    print(f"rank {rank}: error: {error}", file=sys.stderr, flush=True)


def _rank_0_ended() -> bool:
    """Return whether rank 0, started by the same launcher on this node, has ended; False on other nodes."""
    name = _rank_variable(os.environ)
    if name is None or os.environ.get(_RANK_VARIABLES[name]) != os.environ[name]:
        return False  # on the node of rank 0 both numbers are equal: ranks are placed node by node
    import psutil  # DeepSpeed requires it; commands without ranks do not

    for process in psutil.Process(os.getppid()).children():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(name) == "0":
                return False
    return True


def _store() -> Any:
    """Return the key-value store that the ranks share; None before they have met."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def _is_set(store: Any) -> bool:
    """Return whether rank 0 has printed the error; also where it has ended, and the store with it."""
    try:
        return bool(store.check([_PRINTED]))
    except RuntimeError:
        return True


def need_launcher(script: str) -> None:
    """Raise ConfigError in a process that neither a launcher nor ``mpirun`` has started."""
    if "RANK" not in os.environ and importlib.util.find_spec("mpi4py") is None:
        raise ConfigError(f"{script}: no launcher has started it; begin the command with deepspeed instead of python")


def warn(messages: Iterable[str]) -> None:
    """Print each as ``warning: ...`` on stderr, on rank 0 only."""
    if global_rank() == 0:
        for message in messages:
            print(f"warning: {message}", file=sys.stderr)


def short_names(flag: str, paths: Sequence[str]) -> dict[str, str]:
    """Return paths by the last part of their names, or by the whole where two are equal. ConfigError for one given twice."""
    real = [Path(path).resolve() for path in paths]
    if len(set(real)) < len(real):
        raise ConfigError(f"{flag}: {max(real, key=real.count)} is given twice; name each once")
    names = [path.name.removesuffix(".json") for path in real]
    return dict(zip(names if len(set(names)) == len(names) else paths, paths, strict=True))
