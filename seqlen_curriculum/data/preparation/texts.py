"""Extract the texts from a piece of an input, and report parts that can't be used."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqlen_curriculum.data.preparation.input_files import TABLE_SUFFIXES, plain_suffix
from seqlen_curriculum.data.preparation.input_tables import LOST_ROW
from seqlen_curriculum.data.preparation.pieces import (
    MAX_WORD_BYTES,
    NO_TEXT,
    PIECE_BYTES,
    FilePiece,
    InputProblem,
    ProblemKind,
    Rules,
    is_text,
)
from seqlen_curriculum.errors import DataError

__all__ = ["REPORTED_PROBLEMS", "Tally", "TextPart", "UnusableLineError", "document_text", "split_text", "text_parts"]

LOST_KINDS: dict[str, ProblemKind] = {"not_utf8": "not_utf8", "damaged": "damaged"}
REPORTED_PROBLEMS = 5  # of each kind; the others are only counted
_ARRAY_HINT = "; write each of its objects on its own line (jq -c .[])"
_INDENTED_HINT = "; write each object on its own line (jq -c .)"
_WORD_END = re.compile(r"\S(?=[ \n])")


class UnusableLineError(Exception):
    """A line that can't be used: the kind of problem, and the fix."""

    def __init__(self, kind: ProblemKind, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


class Tally:
    """Counts of skipped input. Raises ``DataError`` if the rules refuse it."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.counts: Counter[str] = Counter()
        self.problems: list[InputProblem] = []
        """The first ``REPORTED_PROBLEMS`` problems of each kind."""

    def report(self, problem: InputProblem) -> None:
        """Count ``problem``, or raise ``DataError``."""
        if self._rules.stops_at(problem.kind):
            flag = "--on-empty" if problem.kind == "empty" else "--on-bad-input"
            raise DataError(f"{problem.message}; or give {flag} skip to leave it out and continue")
        self.counts[problem.kind] += 1
        if self.counts[problem.kind] <= REPORTED_PROBLEMS:
            self.problems.append(problem)

    def report_line(self, path: Path, number: int, error: UnusableLineError) -> None:
        """Report line ``number`` (from 1) of ``path``."""
        place = "row" if plain_suffix(path) in TABLE_SUFFIXES else "line"
        self.report(InputProblem(error.kind, f"{path}, {place} {number}: {error}"))


class TextPart(NamedTuple):
    """The text of a document or of a part of one."""

    text: str
    ends: bool
    """True for the last part of a document."""


def text_parts(piece: FilePiece, rules: Rules, tally: Tally) -> Iterator[TextPart]:
    """Yield the non-empty texts in a piece; report empty and unusable ones to ``tally``."""
    for problem in piece.problems:
        tally.report(problem)
    if is_text(piece.path):
        yield from _plain_parts(piece, tally)
    else:
        yield from _json_parts(piece, rules, tally)


def _plain_parts(piece: FilePiece, tally: Tally) -> Iterator[TextPart]:
    try:
        text = piece.data.decode()
    except UnicodeDecodeError:
        lines = []
        for number, line in enumerate(piece.data.split(b"\n"), start=piece.first_line):
            try:
                lines.append(_decode_line(line))
            except UnusableLineError as error:
                tally.report_line(piece.path, number, error)
        text = "\n".join(lines)
    # A blank piece of a longer document is yielded, because its spaces are text and the last piece ends the document.
    is_whole_file = piece.starts and piece.ends
    if text.strip() or not is_whole_file:
        yield TextPart(text, piece.ends)
    elif not piece.data.strip() and not piece.problems:  # the document was empty, and nothing in it was skipped
        tally.report(InputProblem("empty", f"{piece.path}, line 1: an empty document"))


def _json_parts(piece: FilePiece, rules: Rules, tally: Tally) -> Iterator[TextPart]:
    is_table = plain_suffix(piece.path) in TABLE_SUFFIXES
    for number, line in enumerate(piece.data.split(b"\n"), start=piece.first_line):
        if not line.strip():
            continue
        try:
            if is_table and line.startswith(LOST_ROW):
                kind, _, problem = line.removeprefix(LOST_ROW).decode().partition(":")
                raise UnusableLineError(LOST_KINDS[kind], problem)
            text = document_text(line, rules.json_keys)
            texts = list(split_text(text)) if rules.cut_text else [text]
            if rules.cut_text and max(map(len, texts)) > MAX_WORD_BYTES:
                raise UnusableLineError("too_long", NO_TEXT)
        except UnusableLineError as error:
            tally.report_line(piece.path, number, error)
            continue
        for text in texts[:-1]:
            yield TextPart(text, False)
        yield TextPart(texts[-1], True)


def split_text(text: str) -> Iterator[str]:
    """Split a text before spaces that follow a non-space, into parts of about ``PIECE_BYTES / 4`` characters.

    The parts give the same tokens as the whole text, because no word of GPT-2's pre-tokenizer crosses such a place.
    """
    start = 0
    # Offsets count characters of up to 4 bytes: 65,536 of them are 64 KiB of English or 192 KiB of Chinese.
    while match := _WORD_END.search(text, start + PIECE_BYTES // 4):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def document_text(line: bytes, keys: Sequence[str]) -> str:
    """Return the texts under ``keys`` in a JSON line, joined by newlines. Raises ``UnusableLineError``."""
    record = _parse_object(_decode_line(line))
    texts = []
    for key in keys:
        if key not in record:
            problem = f"no key {key!r}, it has {', '.join(map(repr, record)) or 'none'}; select keys with --json-keys"
            raise UnusableLineError("no_text", problem)
        text = record[key]
        if not isinstance(text, str):
            problem = f"{key!r} is {_json_type(text)}, not a string; select another key with --json-keys"
            raise UnusableLineError("no_text", problem)
        try:
            text.encode()
        except UnicodeEncodeError:
            problem = f"{key!r} has half of a surrogate pair, which is not a character; repair the text"
            raise UnusableLineError("not_utf8", problem) from None
        texts.append(text)
    document = "\n".join(texts)
    if not document.strip():
        raise UnusableLineError("empty", "an empty document")
    return document


def _decode_line(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte 0x{line[error.start]:02x}); convert the file to UTF-8"
        raise UnusableLineError("not_utf8", problem) from None


def _parse_object(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        hint = _ARRAY_HINT if line.lstrip().startswith("[") else _INDENTED_HINT if line.strip() == "{" else ""
        problem = f"not valid JSON ({error.msg} at column {error.colno}); each line is one JSON object{hint}"
        raise UnusableLineError("bad_json", problem) from None
    except (ValueError, RecursionError):  # a number with thousands of digits, or thousands of nested brackets
        problem = "a number or a nesting too large for JSON; remove the line"
        raise UnusableLineError("bad_json", problem) from None
    if not isinstance(record, dict):
        hint = _ARRAY_HINT if isinstance(record, list) else ""
        problem = f"{_json_type(record)}, not a JSON object; each line is one JSON object{hint}"
        raise UnusableLineError("bad_json", problem)
    return record


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
