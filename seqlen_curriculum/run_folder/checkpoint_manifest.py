"""A checkpoint's ``complete.json``: what the folder ``global_step<N>`` holds.

It is written last of all. A folder without it, or with a file that is missing or of another size, is no checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.fields import Count, CountOrZero, Section
from seqlen_curriculum.files import replace_text
from seqlen_curriculum.run_folder import CHECKPOINT_PREFIX, MANIFEST
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.rollbacks import Rollback, begun_by, skip_same_steps

__all__ = [
    "Checkpoint",
    "Manifest",
    "checkpoint_folders",
    "differences",
    "file_sizes",
    "read_checkpoint",
    "write_manifest",
]


class Manifest(Section):
    """The content of ``complete.json``."""

    step: CountOrZero
    """The last step that was trained."""
    data_ranks: Count
    """Data-parallel ranks that the optimizer's state was sharded over."""
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    zero: dict[str, Any]
    """The ``zero_optimization`` section."""
    run: dict[str, Any]
    """The settings that decide what is trained, ``RunConfig.settings``."""
    rollbacks: list[Rollback] = Field(default_factory=list)
    """Those whose skipped steps begin by ``step``: the weights depend on them."""
    evaluations: Evaluations = Field(default_factory=Evaluations)
    """Those up to ``step``."""
    files: dict[str, int]
    """``file_sizes`` of the folder, all its files but this one."""


class Checkpoint(Manifest):
    """A complete checkpoint on disk: its manifest, and the folder that it was read from."""

    folder: Path

    def includes_rollbacks(self, rollbacks: Iterable[Rollback]) -> bool:
        """Return whether it was trained with the steps skipped that ``rollbacks`` skip up to it, and no others."""
        return skip_same_steps(self.rollbacks, begun_by(rollbacks, self.step))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint folder against its ``complete.json``. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder; give one named {CHECKPOINT_PREFIX}<N>")
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable {MANIFEST}, so it is no complete checkpoint") from error
    # Sizes tell a cut file from a whole one without reading gigabytes; damaged bytes show when the file is loaded.
    for name, size in manifest.files.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{folder}: {name} is missing, {size} bytes were saved")
        if path.stat().st_size != size:
            raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes, {size} bytes were saved")
    return Checkpoint(folder=folder, **dict(manifest))


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of each file below ``folder``, by its path from there."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``complete.json`` into ``folder``. Raises OSError."""
    replace_text(folder / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=2))


def checkpoint_folders(save: Path) -> list[Path]:
    """Return the folders in ``save`` that are named like checkpoints, oldest first, whole or not."""

    # By number: as text, global_step9 would come after global_step10.
    def step(folder: Path) -> int:
        digits = folder.name.removeprefix(CHECKPOINT_PREFIX)
        return int(digits) if digits.isdigit() else -1

    return sorted(save.glob(f"{CHECKPOINT_PREFIX}*"), key=step)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Return each setting that differs between a checkpoint and the current run, and how."""
    keys = sorted({*saved, *current})
    return {
        key: f"{saved.get(key)!r} in the checkpoint, {current.get(key)!r} now"
        for key in keys
        if saved.get(key) != current.get(key)
    }
