"""A checkpoint's ``complete.json``: what a checkpoint folder ``global_step<N>`` holds, and whether all of it is there.

It is written last of all, with the step, over how many ranks the data was spread and under which ZeRO stage, the settings
that make the run what it is, the rollbacks that its weights have seen, and the size of every file. A folder without it, or
with a file of another size, is not a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.fields import Count, CountOrZero, Section
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.rollbacks import Rollback

__all__ = ["MANIFEST", "Checkpoint", "checkpoint_folders", "differences", "read_checkpoint"]

MANIFEST = "complete.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. ``run`` holds the settings it was made under, ``rollbacks`` those begun by its step,
    ``evaluations`` what is to be known of those up to it."""

    folder: Path
    step: int
    data_ranks: int
    zero_stage: int
    zero: dict[str, Any]
    run: dict[str, Any]
    rollbacks: Sequence[Rollback] = ()
    evaluations: Evaluations = field(default_factory=Evaluations)


class _Manifest(Section):
    """``complete.json``."""

    step: CountOrZero
    data_ranks: Count
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    zero: dict[str, Any]
    run: dict[str, Any]
    rollbacks: list[Rollback] = Field(default_factory=list)
    evaluations: Evaluations = Field(default_factory=Evaluations)
    files: dict[str, int]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint folder against its ``complete.json``. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder; give one named global_step<N>")
    try:
        manifest = _Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no readable {MANIFEST}, so it is no complete checkpoint") from error
    for name, size in manifest.files.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(f"{folder}: {name} {state}, {size} bytes were saved")
    return Checkpoint(folder, **{name: getattr(manifest, name) for name in _Manifest.model_fields if name != "files"})


def checkpoint_folders(save: Path) -> list[Path]:
    """What looks like checkpoints of the run in ``save``, oldest first."""
    return sorted(save.glob("global_step*"), key=_step_of)


def differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """Each setting that differs, and how."""
    keys = sorted({*saved, *ours})
    return {
        key: f"{saved.get(key)!r} in the checkpoint, {ours.get(key)!r} now"
        for key in keys
        if saved.get(key) != ours.get(key)
    }


def _step_of(folder: Path) -> int:
    digits = folder.name.removeprefix("global_step")
    return int(digits) if digits.isdigit() else -1
