"""Record each launch of a run in its ``run.json``."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.files import move
from seqlen_curriculum.run_folder import RUN_INFO
from seqlen_curriculum.run_folder.run_info import Launch, RunInfo, read_run_info, write_run_info
from seqlen_curriculum.training.utilization import card_name
from seqlen_curriculum.training.versions import package_versions

__all__ = ["record_launch"]


def record_launch(save: Path, config: Mapping[str, Any], ranks: int, first_step: int) -> None:
    """Add a launch to ``SAVE/run.json`` and set its configuration to ``config``.

    Call it on rank 0 before the first step. Raises CheckpointError if the file can't be written.
    """
    launch = Launch(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        ranks=ranks,
        first_step=first_step,
        versions=package_versions(),
        device=_device(),
    )
    try:
        earlier = read_run_info(save) or RunInfo(config={}, launches=[])
    except CheckpointError as error:  # the file is only informative, so training must not depend on it
        if (save / RUN_INFO).is_file():
            damaged = (save / RUN_INFO).with_suffix(".damaged.json")
            print(f"warning: {error}; it is kept as {damaged.name}", file=sys.stderr)
            move(save / RUN_INFO, damaged)
        earlier = RunInfo(config={}, launches=[])
    write_run_info(save, earlier.model_copy(update={"config": dict(config), "launches": [*earlier.launches, launch]}))


def _device() -> dict[str, Any]:
    """Return the devices of rank 0's node; memory is in bytes."""
    accelerator = get_accelerator()
    device: dict[str, Any] = {"accelerator": None}
    if accelerator.device_name() != "cpu":
        device = {"accelerator": card_name(), "accelerator_memory_bytes": int(accelerator.total_memory())}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {**device, "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "memory_bytes": memory}


def _cpu() -> str:
    """Return the CPU's model name if Linux has it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (models[0] if models else "") or platform.machine()
