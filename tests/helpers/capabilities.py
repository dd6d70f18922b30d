"""Capabilities of this machine, probed once by pytest's controller and inherited by workers and launched processes.

``SEQLEN_TEST_WITHOUT=fp16,compiler`` runs the tests as if these were missing, and hides their commands.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from seqlen_curriculum.training.extensions import extensions_folder
from seqlen_curriculum.training.facts import compiler_problem

ANSWERS = "SEQLEN_TEST_CAPABILITIES"
"""The environment variable with the inherited results: JSON of name to what is missing, "" if nothing is."""
WITHOUT = "SEQLEN_TEST_WITHOUT"
GIB = 2**30


def _fp16() -> str:
    from deepspeed.accelerator import get_accelerator

    return "" if get_accelerator().is_fp16_supported() else "DeepSpeed supports no fp16 on this device"


def _bf16() -> str:
    from deepspeed.accelerator import get_accelerator

    return "" if get_accelerator().is_bf16_supported() else "DeepSpeed supports no bf16 on this device"


def _gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "torch finds no GPU"


def _compiler() -> str:
    """Probe ninja, a C++ compiler and Python's headers, with which DeepSpeed compiles."""
    problem, fix = compiler_problem()
    return f"{problem}: {fix}" if problem else ""


def _browser() -> str:
    return "" if find_browser() else "no browser (Debian: apt-get install chromium)"


def _npm() -> str:
    return "" if shutil.which("npm") else "no npm (Debian: apt-get install npm)"


def _ports() -> str:
    """Probe a port of this machine, at which the ranks of a launch connect."""
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return ""
    except OSError as error:
        return f"no port of 127.0.0.1 can be listened on: {error}"


def _memory() -> str:
    """Probe memory for two simultaneous launches of up to 4 ranks of 0.5 GiB each."""
    available = psutil.virtual_memory().available
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            available = min(available, int(Path(limit).read_text()))
    return "" if available >= 4 * GIB else f"{available / GIB:.1f} GiB of memory are free; the largest launches need 4"


def _shm() -> str:
    """Probe /dev/shm: each rank fills a buffer of 67 MB there, and is killed by SIGBUS if it is full."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return f"no /dev/shm: {error}"
    return "" if free >= GIB / 2 else f"{free / 2**20:.0f} MiB are free in /dev/shm; launches need 512"


def _package(name: str) -> str:
    return "" if importlib.util.find_spec(name) else f"no {name} (pip install {name})"


def _mpirun() -> str:
    return "" if shutil.which("mpirun") else "no mpirun (Debian: apt-get install openmpi-bin)"


def _slurm() -> str:
    """Probe a node on which srun can start processes."""
    if not shutil.which("srun"):
        return "no srun (Debian: apt-get install slurm-wlm)"
    done = subprocess.run(["sinfo", "--noheader", "--states=idle,mixed,allocated"], capture_output=True, text=True)
    return "" if done.returncode == 0 and done.stdout else f"no node of Slurm is up: {done.stderr.strip()}"


def _namespaces() -> str:
    """Probe the namespaces that scripts/two_nodes.sh uses as nodes."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "no ip or no unshare (Debian: apt-get install iproute2 util-linux)"
    user = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    node = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc"]
    cable = ["ip", "link", "add", "cable", "type", "veth", "peer", "name", "other"]
    done = subprocess.run([*user, *node, *cable], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"no namespaces can be made: {done.stderr.strip()}"


PROBES = {
    "fp16": _fp16,
    "bf16": _bf16,
    "gpu": _gpu,
    "compiler": _compiler,
    "browser": _browser,
    "npm": _npm,
    "ports": _ports,
    "memory": _memory,
    "shm": _shm,
    "wandb": functools.partial(_package, "wandb"),
    "tensorboard": functools.partial(_package, "tensorboard"),
    "mpirun": _mpirun,
    "slurm": _slurm,
    "namespaces": _namespaces,
}
COMMANDS = {
    "compiler": ("c++*", "g++*", "gcc*", "cc", "c89*", "c99*", "clang*", "*-g++*", "*-gcc*"),
    "browser": ("chromium*", "google-chrome*"),
    "npm": ("npm",),
    "mpirun": ("mpirun", "mpirun.*"),
    "slurm": ("srun", "sinfo"),
}
"""Commands that SEQLEN_TEST_WITHOUT hides in PATH."""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def disabled() -> set[str]:
    """Return the names in SEQLEN_TEST_WITHOUT. Raises ValueError for an unknown one."""
    names = {name.strip() for name in os.environ.get(WITHOUT, "").split(",")} - {""}
    if unknown := sorted(names - PROBES.keys()):
        raise ValueError(f"{WITHOUT}: unknown {', '.join(unknown)}; valid are {', '.join(PROBES)}")
    return names


def missing(name: str) -> str:
    """Return the reason why the capability is missing, "" if it is present."""
    answers = json.loads(os.environ.get(ANSWERS, "{}"))
    if name not in answers:
        answers[name] = f"disabled by {WITHOUT}" if name in disabled() else PROBES[name]()
        os.environ[ANSWERS] = json.dumps(answers)
    return str(answers[name])


def ask_all() -> None:
    for name in PROBES:
        missing(name)


def lacking(names: tuple[str, ...]) -> str:
    """Return the first missing capability of ``names`` with the reason, "" if all are present."""
    return next((f"needs {name}: {reason}" for name in names if (reason := missing(name))), "")


def require(*names: str) -> None:
    """Skip the running test, or the fixture's tests, unless the machine has all of these."""
    if reason := lacking(names):
        pytest.skip(reason)


@functools.cache
def extension_is_built(name: str) -> bool:
    return (Path(os.environ["TORCH_EXTENSIONS_DIR"]) / name / f"{name}.so").exists()


def require_launches() -> None:
    """Skip unless DeepSpeed can start here. On a CPU it loads a C++ extension, compiled at the first launch."""
    require("ports", "shm")
    if not extension_is_built("deepspeed_shm_comm"):
        require("compiler")


@contextlib.contextmanager
def hidden_commands(names: set[str]) -> Iterator[None]:
    """Hide the commands of these capabilities in PATH, and with the compiler also compiled extensions.

    A folder with one of the commands is replaced by a folder of links to its other files.
    """
    patterns = [pattern for name in sorted(names & COMMANDS.keys()) for pattern in COMMANDS[name]]
    if not patterns:
        yield
        return
    before = {name: os.environ.get(name) for name in ("PATH", "CC", "CXX", "TORCH_EXTENSIONS_DIR")}
    with TemporaryDirectory(prefix="seqlen-without-") as temporary:
        folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep) if Path(folder).is_dir()]
        os.environ["PATH"] = os.pathsep.join(
            str(_without(folder, patterns, Path(temporary) / str(number))) for number, folder in enumerate(folders)
        )
        if "compiler" in names:
            os.environ.pop("CC", None)
            os.environ.pop("CXX", None)
            os.environ["TORCH_EXTENSIONS_DIR"] = f"{temporary}/torch_extensions"
        yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _without(folder: Path, patterns: list[str], links: Path) -> Path:
    kept = [path for path in folder.iterdir() if not any(fnmatch(path.name, pattern) for pattern in patterns)]
    if len(kept) == len(list(folder.iterdir())):
        return folder
    links.mkdir()
    for path in kept:
        (links / path.name).symlink_to(path)
    return links


def set_up_environment() -> None:
    """Set the paths for launched processes: ninja beside Python, C++ extensions in the virtual environment."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder() or Path(sys.prefix) / "torch_extensions")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["DS_ACCELERATOR"] = "cpu"
