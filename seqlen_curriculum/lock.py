"""One process at a time in a folder, by a lock that the system frees with the process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from seqlen_curriculum.errors import CheckpointError

__all__ = ["is_locked", "lock_folder"]

_NAME = ".lock"


def lock_folder(folder: Path, flag: str, what: str) -> None:
    """Keep other processes out of ``folder`` for as long as this one lives; make it if need be.

    Raises CheckpointError, naming ``flag``, while another process does ``what`` in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT)  # never closed: the system frees the lock with the process
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise CheckpointError(
            f"{flag} {folder}: another process is {what}; stop that one (also ranks left behind by a killed launcher), or "
            "choose another folder"
        ) from error


def is_locked(folder: Path) -> bool:
    """Whether a living process, this one included, holds ``folder``."""
    try:
        file = os.open(folder / _NAME, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
