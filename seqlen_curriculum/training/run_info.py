"""``run.json``: what a run folder was trained with, so that a report needs nothing but the folder."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.files import replace_text

__all__ = ["record_launch"]

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "seqlen-curriculum")


def record_launch(save: Path, config: Mapping[str, Any], ranks: int, first_step: int) -> None:
    """Write ``SAVE/run.json`` whole or not at all: ``config`` (the newest launch's), and a launch more in ``launches``.

    A launch is ``started`` (UTC), ``ranks``, ``first_step``, ``versions`` and ``device``. Call it on rank 0, before the
    first step. Raises CheckpointError when it can't be written.
    """
    path = save / "run.json"
    launch = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": ranks,
        "first_step": first_step,
        "versions": _versions(),
        "device": _device(),
    }
    text = json.dumps({"config": config, "launches": [*_launches(path), launch]}, indent=2, default=str)
    try:
        replace_text(path, text)
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be written ({error.strerror}); free space or choose another --save"
        ) from error


def _launches(path: Path) -> list[Any]:
    """Those of earlier launches; none of a file that is damaged, which must not keep the run from going on."""
    try:
        launches = json.loads(path.read_text(encoding="utf-8"))["launches"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return launches if isinstance(launches, list) else []


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout on the path that was never installed
            continue
    return found


def _device() -> dict[str, Any]:
    """Of the node of rank 0. ``accelerator`` is None on a CPU; memory is in bytes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {**_accelerator(), "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "memory_bytes": memory}


def _accelerator() -> dict[str, Any]:
    name = str(get_accelerator().device_name())
    if name == "cpu":
        return {"accelerator": None}
    model = getattr(getattr(torch, name, None), "get_device_name", lambda: name)  # not every kind tells its model
    return {"accelerator": model(), "accelerator_memory_bytes": int(get_accelerator().total_memory())}


def _cpu() -> str:
    """The model's name where Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()
