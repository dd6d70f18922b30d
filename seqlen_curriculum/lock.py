"""One process at a time, by locks that the system frees with the process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from seqlen_curriculum.errors import CheckpointError

__all__ = ["is_locked", "lock_folder", "lock_of", "try_lock"]


def lock_of(folder: Path) -> Path:
    """The file that stands for ``folder``."""
    return folder / ".lock"


def try_lock(path: Path) -> int | None:
    """An open file that holds the lock of ``path`` until all its copies are closed; None while another one holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def is_locked(path: Path) -> bool:
    """Whether a living process, this one included, holds the lock of ``path``."""
    if not path.exists():
        return False
    file = try_lock(path)
    if file is not None:
        os.close(file)
    return file is None


def lock_folder(folder: Path, flag: str, what: str) -> None:
    """Keep other processes out of ``folder`` for as long as this one lives; make it if need be.

    Raises CheckpointError, naming ``flag``, while another process does ``what`` in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if try_lock(lock_of(folder)) is None:  # never closed
        raise CheckpointError(
            f"{flag} {folder}: another process is {what}; stop that one (also ranks left behind by a killed launcher), or "
            "choose another folder"
        )
