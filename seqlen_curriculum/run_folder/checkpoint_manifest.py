"""A checkpoint's ``complete.json``: the manifest of the folder ``global_step<N>``.

It is written last. A folder without it, or with a file that is missing or has another size, is not a checkpoint. A
checkpoint whose files have changed, or can't be read from a bad disk, is damaged.
"""

from __future__ import annotations

import errno
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.fields import Count, CountOrZero, Section
from seqlen_curriculum.files import replace_text, sync
from seqlen_curriculum.run_folder import CHECKPOINT_PREFIX, MANIFEST
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.json_file import first_problem
from seqlen_curriculum.run_folder.own_files import not_own, wrong_name
from seqlen_curriculum.run_folder.rollbacks import Rollback, begun_by, skip_same_steps
from seqlen_curriculum.strict_json import shown

__all__ = [
    "Checkpoint",
    "Manifest",
    "checkpoint_folders",
    "crc32",
    "damage",
    "differences",
    "read_checkpoint",
    "seal",
]

_OWN_CRC32 = "crc32_of_this_file"
_BLOCK_BYTES = 2**20


def _own_name(name: str) -> str:
    if reason := wrong_name(name):
        raise ValueError(reason)
    return name


FileName = Annotated[str, AfterValidator(_own_name)]
"""The relative path of a file in the folder."""


class Manifest(Section):
    """The content of ``complete.json``."""

    step: CountOrZero
    """The last trained step."""
    data_ranks: Count
    """Number of data-parallel ranks over which the optimizer's state was sharded."""
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    zero: dict[str, Any]
    """The ``zero_optimization`` section."""
    run: dict[str, Any]
    """The settings that determine the training, ``RunConfig.settings``."""
    rollbacks: list[Rollback] = Field(default_factory=list)
    """Rollbacks whose skipped steps start by ``step``, on which the weights depend."""
    evaluations: Evaluations = Field(default_factory=Evaluations)
    """The summary of evaluations up to ``step``."""
    files: dict[FileName, CountOrZero]
    """The size in bytes of each file in the folder except this one, by relative path."""
    crc32: dict[FileName, int] = Field(default_factory=dict)
    """The CRC-32 of each of these files. Checkpoints of earlier versions have none."""

    @model_validator(mode="after")
    def _crcs_of_files(self) -> Manifest:
        if unknown := self.crc32.keys() - self.files.keys():
            raise ValueError(f"crc32: {min(unknown)!r} is not one of the files")
        return self


class Checkpoint(Manifest):
    """A complete checkpoint on disk: its manifest and its folder."""

    folder: Path

    def includes_rollbacks(self, rollbacks: Iterable[Rollback]) -> bool:
        """Return whether the checkpoint skipped exactly the steps that ``rollbacks`` skip up to it."""
        return skip_same_steps(self.rollbacks, begun_by(rollbacks, self.step))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint folder against its ``complete.json``. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder; give one named {CHECKPOINT_PREFIX}<N>")
    try:
        if reason := not_own(folder, MANIFEST):
            raise CheckpointError(f"{folder}: {MANIFEST} {reason}")
        manifest = Manifest.model_validate_json(_checked((folder / MANIFEST).read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        reason = f"no readable {MANIFEST} ({_reason(error)}), so it is not a complete checkpoint"
        raise CheckpointError(f"{folder}: {reason}") from error
    # The size detects truncated files without reading gigabytes. ``damage`` compares the bytes.
    for name, size in manifest.files.items():
        try:
            reason, found = not_own(folder, name), (folder / name).stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: {name} is missing, {size} bytes were saved") from None
        except OSError as error:
            raise CheckpointError(f"{folder}: {name} can't be read ({error.strerror})") from error
        if reason:
            raise CheckpointError(f"{folder}: {name} {reason}")
        if found != size:
            raise CheckpointError(f"{folder}: {name} has {found} bytes, {size} bytes were saved")
    return Checkpoint(folder=folder, **dict(manifest))


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return first_problem(error)
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__


def _checked(text: bytes) -> str:
    """Return the content of a ``complete.json`` without its own CRC-32. Raises ValueError if it has changed."""
    content = json.loads(text)
    written = content.pop(_OWN_CRC32, None) if isinstance(content, dict) else None
    if written is not None and written != _crc32_of(content):
        raise ValueError(f"{MANIFEST} has other bytes than were written")
    return json.dumps(content)


def _crc32_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file's content. Raises OSError."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value


def damage(checkpoint: Checkpoint, part: int = 0, parts: int = 1, shards: bool = True) -> str:
    """Verify part ``part`` of ``parts`` of a checkpoint's files, and return a description of the damage, "" if none.

    Without ``shards`` only the Hugging Face files are verified, which suffice to generate text.

    torch and safetensors don't detect changed bytes: a weight with a flipped bit loads as another number. A read error of
    the disk counts as damage. Raises OSError for others.
    """
    names = [name for name in sorted(checkpoint.crc32) if shards or not name.endswith(".pt")]
    for name in names[part::parts]:
        path = checkpoint.folder / name
        try:
            found = crc32(path)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return f"{checkpoint.folder}: {name} can't be read ({error.strerror})"
        if found != checkpoint.crc32[name]:
            return f"{checkpoint.folder}: {name} has other bytes than were written (CRC-32 {found:08x})"
    return ""


def seal(folder: Path, manifest: Manifest, written: Mapping[str, int]) -> None:
    """Flush ``folder`` to disk and write ``manifest``, with the sizes and CRC-32s of the files.

    ``written`` has the CRC-32 of the files that other ranks have flushed. Raises OSError.
    """
    crcs = dict(written)
    paths = sorted(folder.rglob("*"))
    names = {str(path.relative_to(folder)): path for path in paths if path.is_file()}
    for name, path in names.items():
        if name not in crcs:
            sync(path)
            crcs[name] = crc32(path)
    for path in paths:
        if path.is_dir():
            sync(path)
    sizes = {name: path.stat().st_size for name, path in names.items()}
    content = manifest.model_copy(update={"files": sizes, "crc32": dict(sorted(crcs.items()))}).model_dump(mode="json")
    # Also flush the names in the folder.
    replace_text(folder / MANIFEST, json.dumps({**content, _OWN_CRC32: _crc32_of(content)}, indent=2))


def checkpoint_folders(save: Path) -> list[Path]:
    """Return the folders in ``save`` that are named like checkpoints, oldest first, complete or not."""

    # By number: as text, global_step9 would come after global_step10. Not global_step9.damaged.
    folders = {folder.name.removeprefix(CHECKPOINT_PREFIX): folder for folder in save.glob(f"{CHECKPOINT_PREFIX}*")}
    # global_step² has a digit that isn't a number.
    return [folders[step] for step in sorted((name for name in folders if _is_number(name)), key=int)]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that differ between a checkpoint and the current run, each with both values."""
    keys = sorted({*saved, *current})
    return {
        key: f"{shown(saved.get(key), 400)} in the checkpoint, {shown(current.get(key), 400)} now"
        for key in keys
        if saved.get(key) != current.get(key)
    }
