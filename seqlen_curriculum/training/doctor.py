"""Checks of the machine for ``slw doctor``, without a launch. Without torch, the checks that need it are skipped."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from seqlen_curriculum.extras import EXTRAS, install_command, installed_extras
from seqlen_curriculum.launchers import DEFAULT_PORT
from seqlen_curriculum.training.extensions import extensions_folder
from seqlen_curriculum.training.facts import (
    available_memory,
    can_listen,
    compiler_problem,
    device_name,
    find_command,
    hub_problem,
    package_version,
    usable_cores,
)
from seqlen_curriculum.training.versions import untested_deepspeed

__all__ = ["Finding", "can_train", "examine"]

_GIB = 2**30


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    state: Literal["ok", "warning", "missing"]
    """``warning``: some runs need it. ``missing``: all training needs it."""
    found: str
    fix: str = ""
    """The package to install or the command to type; empty if there is nothing to do."""


def examine(folder: Path) -> Iterator[Finding]:
    """Yield the finding of each check. ``folder`` must exist; runs will be saved in it."""
    yield Finding("Python", "ok", f"{platform.python_version()}, {sys.prefix}")
    versions = {name: package_version(name) for name in EXTRAS["train"]}
    yield packages(versions)
    if all(versions.values()):
        yield from _accelerator()
    yield cores(usable_cores(), available_memory())
    yield port(can_listen(DEFAULT_PORT), can_listen(0))
    yield locks(folder)
    yield disk(folder, shutil.disk_usage(folder).free)
    yield hub(hub_problem())
    yield launchers({name: find_command(name) for name in ("deepspeed", "torchrun", "srun", "mpirun", "pdsh")})
    yield extras(installed_extras())


def can_train(findings: list[Finding]) -> bool:
    return not any(finding.state == "missing" for finding in findings)


def packages(versions: dict[str, str]) -> Finding:
    """Check the versions of the packages of the extra ``train``; a missing package has an empty version."""
    if absent := [name for name, found in versions.items() if not found]:
        found = f"no {', '.join(absent)}: planning, reports and inspection work, training doesn't"
        return Finding("packages", "missing", found, install_command("train"))
    listed = ", ".join(f"{name} {found}" for name, found in versions.items())
    if untested := untested_deepspeed(versions["deepspeed"]):
        problem, _, fix = untested.partition(". Install a tested version: ")
        return Finding("packages", "warning", f"{listed}; {problem}", fix)
    return Finding("packages", "ok", f"{listed} (in the tested range)")


def _accelerator() -> Iterator[Finding]:
    """Yield the findings on devices, precisions, compiler, CUDA toolkit and /dev/shm."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout
            import torch

            if not torch.accelerator.is_available():
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            machine = importlib.import_module("seqlen_curriculum.training.machine")
    except Exception as error:  # from a driver, a broken installation or DS_ACCELERATOR
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        yield Finding("devices", "missing", f"DeepSpeed can't be imported: {first_line}", install_command("train"))
        return
    on_cpu = machine.on_cpu()
    names = [] if on_cpu else [device_name(number) for number in range(torch.accelerator.device_count())]
    yield devices(names, shutil.which("nvidia-smi") is not None, torch.version.cuda)
    yield precisions(machine.supported_precisions())
    if (folder := extensions_folder()) is not None:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    yield compiler(*compiler_problem(), machine.must_compile("ShareMemCommBuilder"), on_cpu)
    yield cuda_toolkit(find_command("nvcc"))
    if on_cpu:
        room = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
        yield shared_memory(room, machine.SHM_BYTES)


def devices(names: list[str], has_driver: bool, torch_cuda: str | None) -> Finding:
    """Check the accelerators that torch finds; ``has_driver``: nvidia-smi is installed."""
    if names:
        return Finding("devices", "ok", ", ".join(f"{count} x {name}" for name, count in Counter(names).items()))
    if has_driver and torch_cuda is None:
        found = "nvidia-smi is installed, but this torch is a CPU build; training runs on the CPU"
        return Finding("devices", "warning", found, "install torch's CUDA build: https://pytorch.org/get-started")
    if has_driver:
        found = f"nvidia-smi is installed, but torch for CUDA {torch_cuda} finds no GPU; training runs on the CPU"
        return Finding("devices", "warning", found, "check the driver's version and CUDA_VISIBLE_DEVICES")
    return Finding("devices", "ok", "no GPU: training runs on the CPU, which suits small models")


def precisions(supported: dict[str, bool]) -> Finding:
    lacking = [name for name, is_supported in supported.items() if not is_supported]
    usable = ", ".join(["fp32", *(name for name in supported if name not in lacking)])
    return Finding("precision", "ok", f"{usable}{'; no ' + ', no '.join(lacking) if lacking else ''}")


def compiler(problem: str, fix: str, must_compile: bool, on_cpu: bool) -> Finding:
    """Check the compiler. DeepSpeed compiles a part at the first run on a CPU, and its own Adam if a file selects it."""
    if not problem:
        use = "DeepSpeed compiles a C++ part at the first run" if must_compile else "nothing is left to compile"
        return Finding("compiler", "ok", f"C++ compiler and ninja; {use}")
    if must_compile:
        return Finding(
            "compiler", "missing", f"{problem}; DeepSpeed compiles a C++ part at the first run on a CPU", fix
        )
    needed = "training is compiled already" if on_cpu else "training on a GPU needs no compiler"
    return Finding("compiler", "warning", f"{problem}; {needed}, but DeepSpeed's own Adam would need one", fix)


def cuda_toolkit(nvcc: str | None) -> Finding:
    found = nvcc or "not found; not needed: the shipped configurations use torch's Adam"
    return Finding("CUDA toolkit", "ok", found)


def shared_memory(free: int, rank_bytes: int) -> Finding:
    """Check the free bytes in /dev/shm; each CPU rank takes ``rank_bytes``."""
    found = f"{free >> 20:,} MiB free: room for {free // rank_bytes:,} CPU ranks of {rank_bytes >> 20} MiB"
    if free >= 2 * rank_bytes:
        return Finding("/dev/shm", "ok", found)
    state: Literal["warning", "missing"] = "warning" if free >= rank_bytes else "missing"
    return Finding("/dev/shm", state, found, "make room (a container: --shm-size=1g)")


def cores(count: int, memory: int | None) -> Finding:
    """Check the cores and the bytes of memory that this process may use."""
    if memory is None:
        return Finding("memory", "ok", f"{count} cores")
    found = f"{count} cores, {memory / _GIB:.1f} GiB of memory available"
    if memory >= 2 * _GIB:
        return Finding("memory", "ok", found)
    return Finding("memory", "warning", found, "free 2 GiB: the quick start's two CPU ranks take about 1 GiB each")


def port(is_free: bool, any_free: bool) -> Finding:
    """Check whether ranks can connect: on DeepSpeed's default port, or on any."""
    if is_free:
        return Finding("port", "ok", f"{DEFAULT_PORT}, DeepSpeed's default, is free")
    if any_free:
        found = f"{DEFAULT_PORT}, DeepSpeed's default, is in use; slw train uses another one"
        return Finding("port", "warning", found, "deepspeed --master_port N")
    return Finding("port", "missing", "can't listen on any port", "allow this process to open ports")


def locks(folder: Path) -> Finding:
    """Check that a file in ``folder`` can be locked; a run locks its folder against a second one."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            found = f"{folder} has no locks ({error.strerror}): two runs could write to one folder unnoticed"
            return Finding("locks", "warning", found, "mount it with locks (Lustre: -o flock), or start each run once")
        return Finding("locks", "missing", f"{folder} can't be written to ({error.strerror})", "slw doctor FOLDER")
    return Finding("locks", "ok", f"flock works in {folder}")


def disk(folder: Path, free: int) -> Finding:
    found = f"{free / _GIB:.1f} GiB free in {folder}"
    if free >= _GIB:
        return Finding("disk", "ok", found)
    return Finding("disk", "warning", found, "make room: a checkpoint takes 16 bytes per parameter or more")


def hub(problem: str) -> Finding:
    """Check the connection to the Hugging Face Hub, which only models and tasks given by Hub name need."""
    if not problem:
        return Finding("Hub", "ok", "the Hugging Face Hub is reachable")
    return Finding("Hub", "warning", f"the Hugging Face Hub is not reachable ({problem}); local files don't need it")


def launchers(found: dict[str, str | None]) -> Finding:
    """Check the commands that start ranks: ``deepspeed``, and the others for several nodes."""
    there = [name for name, path in found.items() if path]
    absent = [name for name, path in found.items() if not path]
    several = f"; not found: {', '.join(absent)} (for several nodes)" if absent else ""
    if "deepspeed" in there and not shutil.which("deepspeed"):
        activate = Path(sys.executable).with_name("activate")
        return Finding("launchers", "warning", f"deepspeed is not on PATH{several}", f"source {activate}")
    return Finding("launchers", "ok", f"{', '.join(there) or 'none'}{several}")


def extras(installed: dict[str, bool]) -> Finding:
    there = [name for name, is_there in installed.items() if is_there]
    absent = [name for name, is_there in installed.items() if not is_there and name != "train"]  # see packages
    found = ", ".join(there) or "none"
    if not absent:
        return Finding("extras", "ok", found)
    return Finding("extras", "ok", f"{found}; optional: {', '.join(absent)}", install_command(",".join(absent)))
