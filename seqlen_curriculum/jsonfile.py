"""A JSON object from a file, strictly, ``a.b=value`` overrides of it, and files replaced as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import ConfigError

__all__ = ["apply_override", "read_json", "replace_text"]


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
