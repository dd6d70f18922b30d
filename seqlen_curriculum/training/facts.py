"""Facts about this machine and this environment, read without torch unless it is needed."""

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
    """Return the name of an accelerator, of a GPU with its memory."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return str(torch.accelerator.current_accelerator())
    properties = torch.cuda.get_device_properties(number)
    return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"


def compiler_problem() -> tuple[str, str]:
    """Return what is missing to compile DeepSpeed's C++ parts, and what to type; two empty strings if nothing is.

    Needed are ninja, a C++ compiler, which CXX may name, and Python's headers.
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
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Return the bytes that are available, of the machine or of this container; None where Linux's files are missing."""
    found = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        cgroup = Path("/sys/fs/cgroup")
        found.append(int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return min(found, default=None)


def can_listen(number: int) -> bool:
    """Return whether a port of this machine is free; with 0, whether any is."""
    try:
        with socket.create_server(("", number)):
            return True
    except OSError:
        return False


def hub_problem() -> str:
    """Return why the Hub can't be reached, within ``_HUB_SECONDS``; empty if it can."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    answers: list[str] = []
    # In a thread, because the resolver of names has a time limit of its own, of up to a minute.
    thread = threading.Thread(target=lambda: answers.append(_ask_hub()), daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return answers[0] if answers else f"no answer in {_HUB_SECONDS:.0f} s"


def _ask_hub() -> str:
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError as error:  # it answers
        return "" if error.code < 500 else f"status {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""


def find_command(name: str) -> str | None:
    """Return the path of a command, on PATH or beside Python: an environment works without being activated."""
    beside = Path(sys.executable).with_name(name)
    return shutil.which(name) or (str(beside) if beside.exists() else None)
