"""Files that a folder may name as its own. Somebody else may have made the folder, so its names and links aren't trusted."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.strict_json import not_text, shown

__all__ = ["check_own", "is_lfs_pointer", "not_own", "wrong_name"]

_NAME_BYTES = 255
"""The longest name of a file on Linux."""
_POINTER_BYTES = 1024
"""The longest pointer, by Git LFS's specification."""


def wrong_name(name: str) -> str:
    """Return why ``name`` can't be the relative path of a file inside a folder, "" if it can."""
    if reason := not_text(name):
        return f"{shown(name)} {reason}"
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        return f"{shown(name)} leads out of the folder"
    if "" in parts or any(len(part.encode()) > _NAME_BYTES for part in parts):
        return f"{shown(name)} is not the name of a file"
    return ""


def not_own(folder: Path, name: str) -> str:
    """Return why the file ``name`` in ``folder`` must not be opened, "" if it may be. A missing file may be opened.

    A link may lead to any file of this user. A pipe blocks its reader, and a device may have no end. The links of Hugging
    Face's cache are followed: models--gpt2/snapshots/COMMIT/config.json is a link to models--gpt2/blobs/DIGEST.
    """
    real, target = os.path.realpath(folder), os.path.realpath(folder / name)
    parent, kind = os.path.split(os.path.dirname(real))
    inside = [real, os.path.join(parent, "blobs")] if kind == "snapshots" else [real]
    if not any(target.startswith(os.path.join(place, "")) for place in inside):
        return f"is a link to {target}, which is outside the folder; put the file itself there"
    if os.path.lexists(target) and not stat.S_ISREG(os.stat(target).st_mode):
        return "is not a regular file; delete it"
    return ""


def check_own(path: Path, error: type[Exception] = CheckpointError) -> None:
    """Raise ``error`` for a file that must not be opened (``not_own``). Raises OSError for a folder that can't be read."""
    if reason := not_own(path.parent, path.name):
        raise error(f"{path}: {reason}")


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is the pointer that git leaves in its place where Git LFS isn't set up. Raises OSError."""
    if path.stat().st_size > _POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(30) == b"version https://git-lfs.github"
