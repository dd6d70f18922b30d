"""Strict JSON: keys are unique, numbers are finite, and comments are allowed only if the caller allows them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from seqlen_curriculum.errors import ConfigError

__all__ = ["loads", "not_text", "shown", "without_comments"]

_STRING = r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"?'
_COMMENT = re.compile(rf"{_STRING}|(?://|#)[^\n]*|/\*.*?(?P<end>\*/|\Z)", re.DOTALL)
_LAST_COMMA = re.compile(rf'(?:{_STRING}|[^\s\[{{,:"])\s*+(?P<comma>,)(?=\s*+[\]}}])|{_STRING}')
_TOKEN = re.compile(rf'{_STRING}|[\[\]{{}},]|[^\s\[\]{{}},:"]++')


def loads(text: str) -> Any:
    """Return the value of ``text``.

    Raises json.JSONDecodeError for a mistake in the syntax. Raises ConfigError, with the key path, line and column, for a
    duplicate key, a number that isn't finite or is above 1.8e308, a string that is not text, and deep nesting.
    """
    try:
        value = json.loads(text, parse_int=lambda digits: int(digits[:_DIGITS]))
    except RecursionError:  # thousands of brackets, of which this finds the first one too many
        _refuse_ambiguous(text)
        raise
    _refuse_ambiguous(text)
    return value


def shown(value: object, most: int = 80) -> str:
    """Return ``repr(value)`` for a message, with at most about ``most`` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits; a value that is nested too deep
        text = f"{type(value).__name__} that is too large to print"
    return text if len(text) <= most else f"{text[: most * 3 // 4]}...{text[-most // 8 :]}"


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


_SHOWN_KEYS = 6
_DIGITS = 400
"""Digits of a whole number that are read. Of more than 309 the number is too large; of 4,300 Python raises ValueError."""
_DEEPEST = 64


def not_text(string: str) -> str:
    """Return why ``string`` can't be a key, a name or a path; empty if it can."""
    if "\0" in string:
        return "has a NUL character; remove it"
    try:
        string.encode()
    except UnicodeEncodeError as error:
        return f"has half of a surrogate pair, \\u{ord(string[error.start]):04x}; remove it"
    return ""


@dataclass
class _Container:
    """An object or an array that is being read."""

    at: str | int | None
    """The key of the current value, None while a key is expected; the index in an array."""
    keys: set[str] = field(default_factory=set)


def _refuse_ambiguous(text: str) -> None:
    """Raise ConfigError for the first key that is given twice, and the first value that ``loads`` refuses.

    ``text`` is valid for Python's json, whose hooks don't know where in the text they are.
    """
    inside: list[_Container] = []

    def problem(message: str) -> ConfigError:
        place = json.JSONDecodeError("", text, found.start())
        keys = [shown(str(container.at))[1:-1] for container in inside if container.at is not None]
        path = ".".join(keys[:_SHOWN_KEYS]) + ("..." if len(keys) > _SHOWN_KEYS else "")
        where = f"(line {place.lineno}, column {place.colno})"
        return ConfigError(f"{path}: {message} {where}" if path else f"{message} {where}")

    for found in _TOKEN.finditer(text):
        token, container = found[0], inside[-1] if inside else None
        if token in "{[":
            if len(inside) == _DEEPEST:
                raise problem(f"is nested more than {_DEEPEST} levels deep; remove the excess brackets")
            inside.append(_Container(None if token == "{" else 0))
        elif token in "}]":
            inside.pop()
        elif container is not None and token == ",":
            container.at = container.at + 1 if isinstance(container.at, int) else None
        elif container is not None and container.at is None:
            key = json.loads(token)
            if reason := not_text(key):
                raise problem(f"key {shown(key)} {reason}")
            if key in container.keys:
                raise problem(f"key {shown(key)} is given twice in one object; keep one")
            container.keys.add(key)
            container.at = key
        elif token[0] == '"':
            if ("\\" in token or not token.isascii()) and (reason := not_text(json.loads(token))):
                raise problem(f"{shown(json.loads(token))} {reason}")
        elif token in ("NaN", "Infinity", "-Infinity"):
            raise problem(f"{token} is not a JSON number; write a finite one")
        elif token[0] in "-0123456789" and math.isinf(float(token)):
            raise problem(f"{shown(token)[1:-1]} is too large for a number; write a smaller one")
