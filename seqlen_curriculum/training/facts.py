"""Read facts about this machine and environment; only ``device_name`` needs torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = [
    "available_memory",
    "can_listen",
    "compiler_problem",
    "device_name",
    "find_command",
    "hub_problem",
    "package_version",
    "usable_cores",
]

_HUB_SECONDS = 3.0


def package_version(package: str) -> str:
    """Return the version of an installed package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def device_name(number: int) -> str:
    """Return the name of an accelerator; for a GPU, its memory too."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return str(torch.accelerator.current_accelerator())
    properties = torch.cuda.get_device_properties(number)
    return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


def compiler_problem() -> tuple[str, str]:
    """Return (problem, fix) if DeepSpeed's C++ parts can't be compiled, else two empty strings.

    Compilation needs ninja, a C++ compiler (``c++`` or the one in CXX) and Python's headers.
    """
    command = os.environ.get("CXX", "c++")
    if not find_command("ninja"):
        return "no ninja", "pip install ninja"
    if not shutil.which(command):
        return f"no C++ compiler {command}", "apt-get install g++ (Debian), or name one in CXX"
    check = [command, "-x", "c++", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-"]
    done = subprocess.run(check, input="#include <vector>\n#include <Python.h>\n", text=True, capture_output=True)
    if done.returncode == 0:
        return "", ""
    problem = (done.stderr.strip().splitlines() or ["no message"])[0]
    return f"{command} can't compile a file with Python.h: {problem[:200]}", "apt-get install python3-dev (Debian)"


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Return the bytes of memory available on the machine or in this container; None if Linux's files are missing."""
    found = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        cgroup = Path("/sys/fs/cgroup")
        found.append(int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return min(found, default=None)


def can_listen(number: int) -> bool:
    """Return whether this process can listen on the port ``number``; 0 is any port."""
    try:
        with socket.create_server(("", number)):
            return True
    except OSError:
        return False


def hub_problem() -> str:
    """Return why the Hub can't be reached within ``_HUB_SECONDS``; empty if it can."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    answers: list[str] = []
    # In a thread, because name resolution has its own time limit of up to a minute.
    thread = threading.Thread(target=lambda: answers.append(_ask_hub()), daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return answers[0] if answers else f"no answer in {_HUB_SECONDS:.0f} s"


def _ask_hub() -> str:
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError as error:  # the server has responded
        return "" if error.code < 500 else f"status {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""


def find_command(name: str) -> str | None:
    """Return the path of a command on PATH or next to Python, so that an environment needn't be activated."""
    beside = Path(sys.executable).with_name(name)
    return shutil.which(name) or (str(beside) if beside.exists() else None)
