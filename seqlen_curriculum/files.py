"""File utilities: reading JSON, durable writes and renames, locks, and checks of output paths."""

from __future__ import annotations

import errno
import fcntl
import functools
import glob
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.strict_json import loads, shown, without_comments

__all__ = [
    "apply_override",
    "discard_folder",
    "follow_umask",
    "is_locked",
    "lock_folder",
    "lock_of",
    "move",
    "new_folder",
    "output_file",
    "picture_path",
    "read_json",
    "remove",
    "replace",
    "replace_text",
    "set_aside",
    "sync",
    "sync_tree",
    "try_lock",
    "writable_folder",
]

_LEFTOVER_SECONDS = 3600
"""Older temporary files are leftovers of killed processes: no process takes an hour to write one."""

_MOST_CHARACTERS = 2**22
"""Characters of a run's file. More of them are a corpus, or a device that has no end."""

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of flock on a file system without locks: Lustre without ``-o flock``, NFS without a lock daemon."""


def read_json(path: Path, comments: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file; ``comments`` allows comments and trailing commas (``without_comments``).

    Raises ConfigError with the file, the line and the column, also for a duplicate key and a number that isn't finite.
    """
    try:
        # "utf-8-sig" skips the byte order mark that some editors on Windows write.
        with path.open(encoding="utf-8-sig" if comments else "utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1 if comments else -1)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"is not UTF-8 at byte {error.start + 1}; save it as UTF-8 (in PowerShell, > writes UTF-16)", str(path)
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"can't be read ({reason}); give the path of a run's JSON file", str(path)) from error
    if comments and len(text) > _MOST_CHARACTERS:
        raise ConfigError(
            f"has more than {_MOST_CHARACTERS:,} characters; give the path of a run's JSON file", str(path)
        )
    if not text.strip():
        raise ConfigError("is empty; write {...}", str(path))
    try:
        value = loads(without_comments(text) if comments else text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}", str(path)
        ) from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, deeply nested brackets
        raise ConfigError(str(error), str(path)) from error
    if not isinstance(value, dict):
        raise ConfigError(f"holds {type(value).__name__}, not an object; write {{...}}", str(path))
    return value


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in place; the value is read as JSON, or as a string if it isn't JSON. Raises ConfigError."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {shown(override)}: write section.key=value, as in --set training.train_tokens=2e9")
    try:
        value = loads(text)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--set {shown(override)}: {error}") from error
    *parents, key = path.split(".")
    target = raw
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(
                f"--set {shown(override)}: {shown(parent)} holds {shown(target)}, not an object with keys"
            )
    target[key] = value


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Replace the file ``path`` with the one that ``write(temporary_path)`` writes. On return it is on disk.

    A reader sees the old content or the new one, never a part. On an error (OSError) the old file is unchanged.
    """
    # The process id keeps two processes from writing to the same temporary file.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # left by killed processes
        if leftover.lstat().st_mtime < time.time() - _LEFTOVER_SECONDS:
            leftover.unlink(missing_ok=True)
    unfinished.unlink(missing_ok=True)  # a link with this name would be followed
    try:
        write(unfinished)
        # Sync before the rename: otherwise a power cut could leave an empty file under the final name.
        sync(unfinished)
        move(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replace the file ``path`` with ``text`` in UTF-8, as ``replace`` does."""
    replace(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def move(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target`` on the same file system; on return the disk has the new name. Raises OSError."""
    os.replace(source, target)
    sync(target.parent)  # the name is part of the folder


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on disk. Raises OSError."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_tree(folder: Path) -> None:
    """Wait until ``folder``, all files below it and their names are on disk. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def follow_umask(path: Path) -> None:
    """Set ``path`` to the mode of a new file; safetensors makes files that only the owner can read. Raises OSError."""
    # Copied from a new file: reading the umask requires setting it, which affects files of other threads.
    new = path.with_name(f".{path.name}.{os.getpid()}.mode")
    new.touch()
    shutil.copymode(new, path)
    new.unlink()


def discard_folder(folder: Path) -> None:
    """Delete ``folder``. A kill leaves it intact or renamed to ``.NAME.discarded.tmp``. Raises OSError.

    If ``folder`` is a link, only the link is deleted.
    """
    hidden = folder.with_name(f".{folder.name}.discarded.tmp")
    with suppress(OSError):
        remove(hidden)
    move(folder, hidden)
    remove(hidden)


def remove(path: Path) -> None:
    """Delete a file or a folder, but not what a link points to. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename ``path`` to the first unused name of ``PATH.damaged``, ``PATH.damaged2``, ... and return it. Raises OSError."""
    names = (f"{path.name}.damaged{number if number > 1 else ''}" for number in itertools.count(1))
    target = next(free for free in map(path.with_name, names) if not free.exists())
    move(path, target)
    return target


def lock_of(folder: Path) -> Path:
    """Return the lock file of ``folder``."""
    return folder / ".lock"


def try_lock(path: Path) -> int | None:
    """Lock the file ``path`` and return its descriptor, which holds the lock until all copies of it are closed.

    Return None if another process holds the lock or has just deleted the file. On a file system without locks, print a
    warning and return the descriptor without a lock. Raises CheckpointError for a link, and OSError.
    """
    if path.is_symlink():
        raise CheckpointError(f"{path}: is a link, but a lock must be a file; delete it")
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _warn_of_no_locks(path.parent, str(error.strerror))
        # The holder may delete the file between our open and its release. No other process can see our lock then.
        is_current = os.path.samestat(os.fstat(file), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        is_current = False
    if not is_current:
        os.close(file)
        return None
    return file


@functools.cache  # once per folder
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    """Warn that a second process can write to ``folder`` unnoticed."""
    print(
        f"warning: {folder}: its file system has no locks ({reason}); make sure that no two commands write to it at the "
        "same time (Lustre: mount it with -o flock)",
        file=sys.stderr,
    )


def is_locked(path: Path) -> bool:
    """Return whether a running process, this one included, holds the lock of ``path``."""
    if not path.exists():
        return False
    file = try_lock(path)
    if file is not None:
        os.close(file)
    return file is None


def lock_folder(folder: Path, flag: str, what: str) -> None:
    """Make ``folder`` if needed, and lock it until this process ends.

    Raises CheckpointError, naming ``flag``, if another process holds the lock. ``what`` describes the work of both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if try_lock(lock_of(folder)) is None:  # closed when the process ends
        raise CheckpointError(
            f"{flag} {folder}: another process is {what}; stop that one (also ranks left behind by a killed launcher), or "
            "choose another folder"
        )


def output_file(flag: str, path: Path, overwrite: bool) -> Path:
    """Return ``path`` if a file can be written there, after making its folder. Raises ConfigError naming ``flag``.

    Without ``overwrite`` an existing file is an error. Every command calls this before its work, for each file that the user
    names.
    """
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a folder; give a file in it")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{flag} {path}: is not a regular file; choose another name")
    if path.exists() and not overwrite:
        raise ConfigError(f"{flag} {path}: exists already; choose another name, or replace the file with --overwrite")
    writable_folder(flag, path.resolve().parent)
    return path


def picture_path(flag: str, path: Path, overwrite: bool) -> Path:
    """Return ``path`` if an image can be written there, as ``output_file`` does."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg") or path.is_dir():
        raise ConfigError(f"{flag} {path}: not the name of an image file; give one that ends in .png, .pdf or .svg")
    return output_file(flag, path, overwrite)


def new_folder(flag: str, folder: Path) -> None:
    """Raise ConfigError naming ``flag`` if ``folder`` exists and is not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{flag} {folder}: exists and is not empty; name a new folder, nothing is overwritten")


def writable_folder(flag: str, folder: Path) -> None:
    """Make ``folder`` and check that files can be written to it. Raises ConfigError naming ``flag``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {folder}: can't be written to ({error.strerror}); choose another folder") from error
