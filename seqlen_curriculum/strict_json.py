"""Strict JSON: keys are unique, numbers are finite, and comments are allowed only if the caller allows them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from seqlen_curriculum.errors import ConfigError

__all__ = ["loads", "without_comments"]

_STRING = r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"?'
_COMMENT = re.compile(rf"{_STRING}|(?://|#)[^\n]*|/\*.*?(?P<end>\*/|\Z)", re.DOTALL)
_LAST_COMMA = re.compile(rf'(?:{_STRING}|[^\s\[{{,:"])\s*+(?P<comma>,)(?=\s*+[\]}}])|{_STRING}')
_TOKEN = re.compile(rf'{_STRING}|[\[\]{{}},]|[^\s\[\]{{}},:"]++')


def loads(text: str) -> Any:
    """Return the value of ``text``.

    Raises json.JSONDecodeError for a mistake in the syntax, and ConfigError for a duplicate key or a number that isn't
    finite, with its key path, line and column. Raises ValueError for an integer of thousands of digits and RecursionError
    for deeply nested brackets.
    """
    value = json.loads(text)
    _refuse_ambiguous(text)
    return value


def without_comments(text: str) -> str:
    """Replace ``// ...``, ``# ...``, ``/* ... */`` and commas after a last element with spaces.

    Every other character keeps its position, so that errors in the result have the line and column of ``text``. Strings
    without quotes, which Hjson also allows, are not accepted, because they would hide a misspelling such as ``tru``.
    Raises json.JSONDecodeError for a comment without an end.
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


@dataclass
class _Container:
    """An object or an array that is being read."""

    at: str | int | None
    """The key of the current value, None while a key is expected; the index in an array."""
    keys: set[str] = field(default_factory=set)


def _refuse_ambiguous(text: str) -> None:
    """Raise ConfigError for the first key that is given twice and the first number that isn't finite.

    ``text`` is valid for Python's json, whose hooks for both don't know where in the text they are.
    """
    inside: list[_Container] = []

    def problem(message: str) -> ConfigError:
        place = json.JSONDecodeError("", text, found.start())
        path = ".".join(str(container.at) for container in inside if container.at is not None)
        where = f"(line {place.lineno}, column {place.colno})"
        return ConfigError(f"{path}: {message} {where}" if path else f"{message} {where}")

    for found in _TOKEN.finditer(text):
        token, container = found[0], inside[-1] if inside else None
        if token in "{[":
            inside.append(_Container(None if token == "{" else 0))
        elif token in "}]":
            inside.pop()
        elif container is not None and token == ",":
            container.at = container.at + 1 if isinstance(container.at, int) else None
        elif container is not None and container.at is None:
            key = json.loads(token)
            if key in container.keys:
                raise problem(f"key '{key}' is given twice in one object; keep one")
            container.keys.add(key)
            container.at = key
        elif token in ("NaN", "Infinity", "-Infinity"):
            raise problem(f"{token} is not a JSON number; write a finite one")
        elif token[0] in "-0123456789" and math.isinf(float(token)):
            raise problem(f"{token[:20]} is too large for a number; write a smaller one")
