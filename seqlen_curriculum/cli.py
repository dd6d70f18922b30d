"""What every command shares: errors told in one line, folders checked before work begins."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import DIVERGED, ConfigError, DivergenceError, SeqlenCurriculumError

__all__ = ["need_launcher", "run", "short_names", "warn"]


def run(main: Callable[[], None]) -> None:
    """Call ``main``; a user's mistake is printed as ``error: ...`` and ends the process with status 1, DIVERGED for training
    that must not go on."""
    try:
        main()
        distributed: Any = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_initialized():
            distributed.destroy_process_group()  # else its threads may abort the process as it exits
    except SeqlenCurriculumError as error:
        rank = os.environ.get("RANK", "0")  # set by the launcher
        print(f"error: {error}" if rank == "0" else f"rank {rank}: error: {error}", file=sys.stderr)
        sys.exit(DIVERGED if isinstance(error, DivergenceError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `command | head` closed the pipe: not an error
        sys.stderr.close()


def need_launcher(script: str) -> None:
    """Raises ConfigError in a process that neither a launcher nor ``mpirun`` has started."""
    if "RANK" not in os.environ and importlib.util.find_spec("mpi4py") is None:
        raise ConfigError(f"{script}: no launcher has started it; begin the command with deepspeed instead of python")


def warn(messages: Iterable[str]) -> None:
    """Print each as ``warning: ...`` on stderr, on the first rank only."""
    if os.environ.get("RANK", "0") == "0":  # set by the launcher
        for message in messages:
            print(f"warning: {message}", file=sys.stderr)


def short_names(flag: str, paths: Sequence[str]) -> dict[str, str]:
    """Paths by the last parts of their names, or by their whole names where two have the same. ConfigError for one twice."""
    real = [Path(path).resolve() for path in paths]
    if len(set(real)) < len(real):
        raise ConfigError(f"{flag}: {max(real, key=real.count)} is given twice; name each once")
    names = [path.name.removesuffix(".json") for path in real]
    return dict(zip(names if len(set(names)) == len(names) else paths, paths, strict=True))
