"""The texts in a piece of an input, and what of it can't be used."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from seqlen_curriculum.data.preparation.input_files import TABLE_SUFFIXES, plain_suffix
from seqlen_curriculum.data.preparation.pieces import (
    MAX_WORD_BYTES,
    NO_TEXT,
    PIECE_BYTES,
    Kind,
    Piece,
    Problem,
    Rules,
    is_text,
)
from seqlen_curriculum.errors import DataError

__all__ = ["TOLD", "Part", "Tally", "parts"]

TOLD = 5  # problems of a kind that are told, the others are counted only
_BEFORE_SPACE = re.compile(r"\S(?=[ \n])")


class Tally:
    """Counts what is left out; raises ``DataError`` where the rules say stop."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.counts: Counter[str] = Counter()
        self.told: list[Problem] = []
        """The first ``TOLD`` of each kind."""

    def report(self, problem: Problem) -> None:
        """Take note of ``problem``, or refuse it."""
        if self._rules.stops_at(problem.kind):
            flag = "--on-empty" if problem.kind == "empty" else "--on-bad-input"
            raise DataError(f"{problem.told}; {flag} skip leaves out what can't be used and goes on")
        self.counts[problem.kind] += 1
        if self.counts[problem.kind] <= TOLD:
            self.told.append(problem)


class Part(NamedTuple):
    """The text of a document or of a part of one."""

    text: str
    ends: bool


def parts(piece: Piece, rules: Rules, tally: Tally) -> Iterator[Part]:
    """The texts in a piece, without empty documents; what is empty or can't be used is reported to ``tally``."""
    for problem in piece.problems:
        tally.report(problem)
    yield from (_text_parts if is_text(piece.path) else _json_parts)(piece, rules, tally)


def _text_parts(piece: Piece, rules: Rules, tally: Tally) -> Iterator[Part]:  # noqa: ARG001 - one of two
    text = _decoded(piece, tally)
    if not (piece.starts and piece.ends and _is_blank(text)):
        yield Part(text, piece.ends)
    elif _is_blank(piece.data) and not piece.problems:
        tally.report(Problem("empty", f"{piece.path}, line 1: an empty document"))


def _is_blank(text: str | bytes) -> bool:
    return not text or text.isspace()


def _decoded(piece: Piece, tally: Tally) -> str:
    """The text of a piece, without the lines that aren't UTF-8."""
    try:
        return piece.data.decode()
    except UnicodeDecodeError:
        lines = enumerate(piece.data.split(b"\n"), start=piece.first_line)
        texts = [_usable(_utf8, line, piece.path, number, tally) for number, line in lines]
        return "\n".join(text for text in texts if text is not None)


def _json_parts(piece: Piece, rules: Rules, tally: Tally) -> Iterator[Part]:
    for number, line in enumerate(piece.data.split(b"\n"), start=piece.first_line):
        if line.strip():
            stretches = _usable(lambda line: _stretches_of(line, rules), line, piece.path, number, tally)
            last = len(stretches or ()) - 1
            yield from (Part(text, place == last) for place, text in enumerate(stretches or ()))


class _UnusableError(Exception):
    """Why a line can't be used: a kind and what to tell."""

    def __init__(self, kind: Kind, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


_T = TypeVar("_T")


def _usable(read: Callable[[bytes], _T], line: bytes, path: Path, number: int, tally: Tally) -> _T | None:
    """What ``read`` makes of the line; ``None`` where it is left out."""
    try:
        return read(line)
    except _UnusableError as error:
        place = "row" if plain_suffix(path) in TABLE_SUFFIXES else "line"
        tally.report(Problem(error.kind, f"{path}, {place} {number}: {error}"))
        return None


def _utf8(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte 0x{line[error.start]:02x}); convert the file to UTF-8"
        raise _UnusableError("not_utf8", problem) from None


def _stretches_of(line: bytes, rules: Rules) -> list[str]:
    """The text of a line of JSON, in stretches that give the tokens of the whole."""
    text = _text_of(_utf8(line), rules.json_keys)
    if _is_blank(text):
        raise _UnusableError("empty", "an empty document")
    stretches = list(_stretches(text)) if rules.cut_text else [text]
    if rules.cut_text and max(map(len, stretches)) > MAX_WORD_BYTES:
        raise _UnusableError("too_long", NO_TEXT)
    return stretches


def _stretches(text: str) -> Iterator[str]:
    start = 0
    while found := _BEFORE_SPACE.search(text, start + PIECE_BYTES // 4):  # a character has up to 4 bytes
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _text_of(line: str, keys: Sequence[str]) -> str:
    """The texts under ``keys``, a newline between them."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg} at column {error.colno}); each line is one JSON object"
        raise _UnusableError("bad_json", problem) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, a tower of brackets
        problem = "a number or a nesting too large for JSON; remove the line"
        raise _UnusableError("bad_json", problem) from None
    if not isinstance(record, dict):
        hint = "; write each of its objects on a line of its own (jq -c .[])" if isinstance(record, list) else ""
        problem = f"{_kind_of(record)}, not a JSON object; each line is one JSON object{hint}"
        raise _UnusableError("bad_json", problem)
    return "\n".join(_value(record, key) for key in keys)


def _kind_of(value: object) -> str:
    """In JSON's words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _value(record: dict[str, object], key: str) -> str:
    if key not in record:
        problem = f"no key {key!r}, it has {', '.join(map(repr, record)) or 'none'}; name the key with --json-keys"
        raise _UnusableError("no_text", problem)
    text = record[key]
    if not isinstance(text, str):
        problem = f"{key!r} is {_kind_of(text)}, not a string; name another key with --json-keys"
        raise _UnusableError("no_text", problem)
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = f"{key!r} has half of a surrogate pair, which is no character; repair the text"
        raise _UnusableError("not_utf8", problem) from None
    return text
