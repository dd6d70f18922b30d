"""Start the ranks of a command on this machine, with DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.launchers import DEFAULT_PORT, launch

__all__ = [
    "add_ranks",
    "check_ranks",
    "check_this_machine",
    "local_launcher",
    "local_ranks",
    "start_ranks",
    "visible_devices",
]

_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""The variables from which DeepSpeed's launcher reads the visible devices."""


def add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="processes to start on this machine (default: one per accelerator, or 1 on the CPU); leave it out under a "
        "launcher, which starts them itself",
    )


def check_ranks(ranks: int | None) -> None:
    """Raise ConfigError if --ranks is below 1, or if it is given and a launcher has started this process."""
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--ranks: {ranks} is not valid; give 1 or more")
    if ranks is not None and (found := launch()) is not None:
        raise ConfigError(f"--ranks {ranks}: {found.launcher} has already started {found.ranks} ranks; leave it out")


def local_ranks(ranks: int | None) -> int:
    """Return the number of ranks to start here: ``ranks``, else one per accelerator of this machine, else 1.

    Without an accelerator, DS_ACCELERATOR=cpu and OMP_NUM_THREADS=1 are set for the ranks unless they are set already.
    """
    if importlib.util.find_spec("deepspeed") is None:  # before torch, which takes seconds to import
        raise ModuleNotFoundError("deepspeed is not installed", name="deepspeed")
    accelerators = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else _accelerators()
    if accelerators == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    return ranks or accelerators or 1


def check_this_machine(deepspeed_config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a package or a precision that ranks on this machine lack; call it after ``local_ranks``."""
    from seqlen_curriculum.config.deepspeed_part import missing_packages  # after --help: pydantic takes a moment

    problems = list(missing_packages(deepspeed_config))
    fp16 = deepspeed_config.get("fp16")
    if isinstance(fp16, Mapping) and fp16.get("enabled") and os.environ.get("DS_ACCELERATOR") == "cpu":
        from seqlen_curriculum.training.machine import precision_problems  # takes seconds to import

        problems += precision_problems(deepspeed_config)
    if problems:
        raise ConfigError(problems)


def local_launcher(ranks: int) -> list[str]:
    """Return the start of the command by which DeepSpeed launches ``ranks`` processes here, on a free port."""
    port = _free_port()
    on_port = [] if port == DEFAULT_PORT else ["--master_port", str(port)]
    # Not the script `deepspeed`, which is not on PATH unless the environment of this Python is activated.
    return [sys.executable, "-m", "deepspeed.launcher.runner", *_devices(ranks), *on_port]


def start_ranks(ranks: int, module: str, arguments: Sequence[str]) -> NoReturn:
    """Print the command that launches ``module`` on ``ranks`` ranks, and replace this process with it.

    Signals reach the launcher, and its exit status is that of this command.
    """
    command = [*local_launcher(ranks), "--module", module, *_without_ranks(arguments)]
    print(shlex.join(["deepspeed", *command[3:]]), flush=True)
    os.execv(sys.executable, command)


def _devices(ranks: int) -> list[str]:
    """Return the launcher's flags for the first ``ranks`` devices visible to this process. Raises ConfigError."""
    name = next((name for name in _VISIBLE_DEVICES if os.environ.get(name)), "")
    if not name or os.environ.get("DS_ACCELERATOR") == "cpu":
        return ["--num_accelerators", str(ranks)]
    # With --num_accelerators 2 the launcher ignores CUDA_VISIBLE_DEVICES=4,5 and takes devices 0 and 1.
    visible = os.environ[name].split(",")
    if not all(number.isdigit() for number in visible):
        raise ConfigError(
            f"{name}: {os.environ[name]} are not all numbers, as DeepSpeed's launcher requires; give numbers, or launch "
            "with torchrun"
        )
    if ranks > len(visible):
        raise ConfigError(
            f"--ranks {ranks}: {name} lists only {len(visible)} devices, {os.environ[name]}; give fewer ranks"
        )
    return ["--include", f"localhost:{','.join(visible[:ranks])}"]


def visible_devices() -> list[tuple[str, str]]:
    """Return a variable and a value for each accelerator that this process sees, which make it the only visible one."""
    name = next((name for name in _VISIBLE_DEVICES if os.environ.get(name)), _VISIBLE_DEVICES[0])
    numbers = os.environ[name].split(",") if os.environ.get(name) else map(str, range(_accelerators()))
    return [(name, number) for number in numbers]


def _accelerators() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _free_port() -> int:
    """Return DeepSpeed's default port, or another free one if it is in use."""
    for port in (DEFAULT_PORT, 0):
        try:
            with socket.create_server(("", port)) as free:
                return int(free.getsockname()[1])
        except OSError:
            continue
    return DEFAULT_PORT


def _without_ranks(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` without ``--ranks N`` and ``--ranks=N``."""
    words = [word for word in arguments if not word.startswith("--ranks=")]
    while "--ranks" in words:
        del words[(at := words.index("--ranks")) : at + 2]
    return words
