"""Start the ranks of a command on this machine, with DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.launchers import launch

__all__ = ["add_ranks", "local_launcher", "local_ranks", "start_ranks"]

_PORT = 29500
"""Where ranks meet unless the launcher names another port."""
_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""The variables by which users choose devices that DeepSpeed's launcher reads."""


def add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="processes to start on this machine (default: one per accelerator, or 1 on the CPU); under a launcher, which "
        "starts them itself, leave it out",
    )


def local_ranks(ranks: int | None) -> int:
    """Return how many ranks to start here: ``ranks``, else one for each accelerator of this machine, and 1 without any.

    Without an accelerator DS_ACCELERATOR and OMP_NUM_THREADS are set for the ranks where they are unset. Raises ConfigError
    for a number that is no number of ranks, and where a launcher has started this process as a rank.
    """
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--ranks: {ranks} is not valid; give 1 or more")
    if ranks is not None and (found := launch()) is not None:
        raise ConfigError(f"--ranks {ranks}: {found.launcher} has started {found.ranks} already; leave it out")
    if importlib.util.find_spec("deepspeed") is None:  # before the seconds that torch takes
        raise ModuleNotFoundError("deepspeed is not installed", name="deepspeed")
    accelerators = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else _accelerators()
    if accelerators == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    return ranks or accelerators or 1


def local_launcher(ranks: int) -> list[str]:
    """Return the words that begin DeepSpeed's launch of ``ranks`` processes on this machine, on a port that is free."""
    port = _free_port()
    on_port = [] if port == _PORT else ["--master_port", str(port)]
    # Not the script `deepspeed`: it is not on PATH where the environment of this Python is not activated.
    return [sys.executable, "-m", "deepspeed.launcher.runner", *_devices(ranks), *on_port]


def start_ranks(ranks: int, module: str, arguments: Sequence[str]) -> NoReturn:
    """Become the launcher of ``module`` on ``ranks`` ranks, after printing its command.

    The launcher takes the place of this process, so signals reach it and its exit status is that of the command.
    """
    command = [*local_launcher(ranks), "--module", module, *_without_ranks(arguments)]
    print(shlex.join(["deepspeed", *command[3:]]), flush=True)
    os.execv(sys.executable, command)


def _devices(ranks: int) -> list[str]:
    """Return the launcher's flags for the first ``ranks`` devices that this process may see. Raises ConfigError."""
    name = next((name for name in _VISIBLE_DEVICES if os.environ.get(name)), "")
    if not name or os.environ.get("DS_ACCELERATOR") == "cpu":
        return ["--num_accelerators", str(ranks)]
    # With --num_accelerators 2 the launcher ignores CUDA_VISIBLE_DEVICES=4,5 and takes devices 0 and 1.
    visible = os.environ[name].split(",")
    if not all(number.isdigit() for number in visible):
        raise ConfigError(
            f"{name}: {os.environ[name]} are not all numbers, which DeepSpeed's launcher needs; give numbers, or launch "
            "with torchrun"
        )
    if ranks > len(visible):
        raise ConfigError(f"--ranks {ranks}: {name} shows {len(visible)} devices, {os.environ[name]}; give fewer ranks")
    return ["--include", f"localhost:{','.join(visible[:ranks])}"]


def _accelerators() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _free_port() -> int:
    """Return DeepSpeed's own port, or one that the system knows to be free where another launch uses it."""
    for port in (_PORT, 0):
        try:
            with socket.create_server(("", port)) as free:
                return int(free.getsockname()[1])
        except OSError:
            continue
    return _PORT


def _without_ranks(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` without ``--ranks N`` and ``--ranks=N``."""
    words = [word for word in arguments if not word.startswith("--ranks=")]
    while "--ranks" in words:
        del words[(at := words.index("--ranks")) : at + 2]
    return words
