"""Files and folders: strict JSON in, whole files out, locks, and checks made before any work."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import CheckpointError, ConfigError

__all__ = [
    "apply_override",
    "is_locked",
    "lock_folder",
    "lock_of",
    "new_folder",
    "picture_path",
    "read_json",
    "replace_text",
    "try_lock",
    "writable_folder",
]


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. ConfigError names the file and, for bad JSON, the line; duplicate keys are errors."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't be read ({error}); give the path of a run's JSON file", str(path)) from error
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}", str(path)
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a tower of brackets
        raise ConfigError(str(error), str(path)) from error
    if not isinstance(value, dict):
        raise ConfigError(f"holds {type(value).__name__}, not an object; write {{...}}", str(path))
    return value


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ConfigError(f"{name} is no JSON number; write a finite one")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(f"key '{twice[0]}' is given twice in one object; keep one")
    return dict(pairs)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in place; the value is read as JSON, else taken as a string."""
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


def replace_text(path: Path, text: str) -> None:
    """Make ``text`` the content of ``path`` in one rename; on return the disk has it. Raises OSError."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)  # holds the name
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


def picture_path(flag: str, path: Path) -> Path:
    """``path`` if a picture can be written there. Raises ConfigError naming ``flag``."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg") or path.is_dir():
        raise ConfigError(f"{flag} {path}: not the name of a picture; give one that ends in .png, .pdf or .svg")
    writable_folder(flag, path.resolve().parent)
    return path


def new_folder(flag: str, folder: Path) -> None:
    """Raise ConfigError naming ``flag`` if there is something at ``folder`` already; an empty folder is nothing."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{flag} {folder}: exists and is not empty; name a new folder, nothing is overwritten")


def writable_folder(flag: str, folder: Path) -> None:
    """Make ``folder`` and prove that files can be written to it. Raises ConfigError naming ``flag``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {folder}: can't be written to ({error.strerror}); choose another folder") from error
