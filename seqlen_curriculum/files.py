"""Files and folders: JSON without surprises, durable writes and renames, locks, and checks before any work starts."""

from __future__ import annotations

import errno
import fcntl
import functools
import glob
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import CheckpointError, ConfigError

__all__ = [
    "apply_override",
    "discard_folder",
    "follow_umask",
    "is_locked",
    "lock_folder",
    "lock_of",
    "move",
    "new_folder",
    "picture_path",
    "read_json",
    "replace",
    "replace_text",
    "set_aside",
    "sync",
    "sync_tree",
    "try_lock",
    "without_comments",
    "writable_folder",
]

_LEFTOVER_SECONDS = 3600
"""The age at which a temporary file belongs to no process: none takes an hour to write one."""

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""How flock fails where a file system has no locks: Lustre without ``-o flock``, NFS without a lock daemon."""


def read_json(path: Path, comments: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file; with ``comments`` also from JSON as people write it (``without_comments``).

    Duplicate keys and numbers that aren't finite are errors. Raises ConfigError with the file, the line and the column.
    """
    try:
        # "utf-8-sig" skips the byte order mark that some editors on Windows put first.
        text = path.read_text(encoding="utf-8-sig" if comments else "utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't be read ({error}); give the path of a run's JSON file", str(path)) from error
    try:
        value = _loads(without_comments(text) if comments else text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}", str(path)
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a tower of brackets
        raise ConfigError(str(error), str(path)) from error
    if not isinstance(value, dict):
        raise ConfigError(f"holds {type(value).__name__}, not an object; write {{...}}", str(path))
    return value


_STRING = r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"?'
_COMMENT = re.compile(rf"{_STRING}|(?://|#)[^\n]*|/\*.*?(?P<end>\*/|\Z)", re.DOTALL)
_LAST_COMMA = re.compile(rf'(?:{_STRING}|[^\s\[{{,:"])\s*+(?P<comma>,)(?=\s*+[\]}}])|{_STRING}')


def without_comments(text: str) -> str:
    """Return ``text`` with spaces in place of ``// ...``, ``# ...``, ``/* ... */`` and commas after a last element.

    Every other character stays where it is, so that an error in the result has its line and column in ``text``. This is
    the part of Hjson that can't hide a mistake: strings without quotes, which Hjson reads too, would make a text of
    ``tru``. Raises json.JSONDecodeError for a comment without an end.
    """

    def blank(found: re.Match[str]) -> str:
        if found[0].startswith('"'):
            return found[0]
        if found["end"] == "":
            raise json.JSONDecodeError("Comment without its end '*/'", text, found.start())
        return re.sub(r"[^\n]", " ", found[0])

    def without_comma(found: re.Match[str]) -> str:
        return found[0][:-1] + " " if found["comma"] else found[0]

    return _LAST_COMMA.sub(without_comma, _COMMENT.sub(blank, text))


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)


def _no_constant(name: str) -> None:
    raise ConfigError(f"{name} is no JSON number; write a finite one")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ConfigError(f"{digits[:20]} is too large for a number; write a smaller one")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise ConfigError(f"key '{key}' is given twice in one object; keep one")
        keys[key] = value
    return keys


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in place; the value is read as JSON, or as a string if it is none. Raises ConfigError."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"--set {override!r}: write section.key=value, as in --set training.train_tokens=2e9")
    try:
        value = _loads(text)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--set {override[:80]!r}: {error}") from error
    *parents, key = path.split(".")
    target = raw
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: '{parent}' holds {target!r}, not an object with keys")
    target[key] = value


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Replace the file ``path`` by what ``write(temporary_path)`` writes; on return the new content is on disk.

    A reader sees the old content or the new one, never a part. Raises OSError, which leaves the old file as it was.
    """
    # The process id keeps two processes that replace one file from writing into each other's.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a process that was killed
        if leftover.stat().st_mtime < time.time() - _LEFTOVER_SECONDS:
            leftover.unlink(missing_ok=True)
    try:
        write(unfinished)
        # Content before name: a power cut between a rename and its data would leave an empty file under the final name.
        sync(unfinished)
        move(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """``replace`` with ``text``, as UTF-8."""
    replace(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def move(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target`` on the same file system; on return the disk has the new name. Raises OSError."""
    os.replace(source, target)
    sync(target.parent)  # a name belongs to its folder


def sync(path: Path) -> None:
    """Wait until the disk has the content of a file, or the names in a folder. Raises OSError."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_tree(folder: Path) -> None:
    """Wait until the disk has ``folder``, all files below it and their names. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def follow_umask(path: Path) -> None:
    """Give ``path`` the mode of a new file: safetensors makes files that only their owner can read. Raises OSError."""
    # A new file shows the mode. Reading the umask would mean to change it, which another thread's files might catch.
    new = path.with_name(f".{path.name}.{os.getpid()}.mode")
    new.touch()
    shutil.copymode(new, path)
    new.unlink()


def discard_folder(folder: Path) -> None:
    """Delete ``folder``; a kill leaves it whole, or hidden as ``.NAME.discarded.tmp``. Raises OSError."""
    hidden = folder.with_name(f".{folder.name}.discarded.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    move(folder, hidden)
    shutil.rmtree(hidden)


def set_aside(path: Path) -> Path:
    """Rename ``path`` to the first free one of ``PATH.damaged``, ``PATH.damaged2``, ... and return it. Raises OSError."""
    names = (f"{path.name}.damaged{number if number > 1 else ''}" for number in itertools.count(1))
    target = next(free for free in map(path.with_name, names) if not free.exists())
    move(path, target)
    return target


def lock_of(folder: Path) -> Path:
    """Return the file whose lock stands for ``folder``."""
    return folder / ".lock"


def try_lock(path: Path) -> int | None:
    """Lock the file ``path`` and return its descriptor, which holds the lock until all copies of it are closed.

    None while another process holds the lock, and where it has just deleted the file. On a file system without locks a
    warning is printed and the lock counts as held.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _warn_of_no_locks(path.parent, str(error.strerror))
        # The holder may delete the file between our open and its release: then we hold a lock that nobody else can see.
        is_current = os.path.samestat(os.fstat(file), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        is_current = False
    if not is_current:
        os.close(file)
        return None
    return file


@functools.cache  # once per folder
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    """Warn that nothing keeps a second process out of ``folder``."""
    print(
        f"warning: {folder}: its file system has no locks ({reason}), so make sure yourself that no two commands write into "
        "it at once (Lustre: mount it with -o flock)",
        file=sys.stderr,
    )


def is_locked(path: Path) -> bool:
    """Return whether a living process, this one included, holds the lock of ``path``."""
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


def picture_path(flag: str, path: Path) -> Path:
    """Return ``path`` if a picture can be written there. Raises ConfigError naming ``flag``."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg") or path.is_dir():
        raise ConfigError(f"{flag} {path}: not the name of a picture; give one that ends in .png, .pdf or .svg")
    writable_folder(flag, path.resolve().parent)
    return path


def new_folder(flag: str, folder: Path) -> None:
    """Raise ConfigError naming ``flag`` if ``folder`` exists and is anything but an empty folder."""
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
