"""Reads input files as a stream of pieces that hold documents, or parts of long ones.

A text file is one document, a line of JSON or a row of a table is one document. The reader only moves bytes; decoding,
parsing and encoding a piece is left to whoever gets it, so that one reader feeds many workers.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from seqlen_curriculum.data.preparation.input_files import JSON_SUFFIXES, TABLE_SUFFIXES, Source, plain_suffix

__all__ = ["MAX_WORD_BYTES", "NO_TEXT", "Kind", "Piece", "Problem", "Rules", "batches", "is_text", "pieces"]

PIECE_BYTES = 2**18  # 256 KiB, about 0.1 s of encoding: even work for all workers, little to hold
MAX_WORD_BYTES = 2**19  # one that long is no language, and a tokenizer needs 200 times its memory for it
NO_TEXT = f"over {MAX_WORD_BYTES:,} bytes without a space or an end of line; that is no text, remove it"
Kind = Literal["empty", "not_utf8", "bad_json", "no_text", "too_long", "damaged"]


class Problem(NamedTuple):
    """A place of the inputs that can't be used, or an empty document."""

    kind: Kind
    told: str
    """File, line, what is wrong and what to do."""


@dataclass(frozen=True)
class Rules:
    """How inputs become documents."""

    json_keys: Sequence[str] = ("text",)
    """Keys of a JSON line (columns of a table) whose texts, joined by newlines, are the document."""
    cut_text: bool = True
    """Whether the tokenizer gives the same tokens for a text cut before a space that follows a non-space."""
    max_line_bytes: int = 2**24
    """Longest line of JSON, and longest text where texts can't be cut."""
    append_eod: bool = True
    """Close each document with ``<|endoftext|>``."""
    on_bad_input: Literal["stop", "skip"] = "stop"
    """Refuse what can't be used, or leave out the line."""
    on_empty: Literal["stop", "skip"] = "skip"
    """The same for documents with nothing but white space."""

    def stops_at(self, kind: str) -> bool:
        """Whether such a problem ends the work."""
        return (self.on_empty if kind == "empty" else self.on_bad_input) == "stop"


@dataclass(frozen=True)
class Piece:
    """A stretch of one file: a whole document, whole lines of JSON, or a part of a long document."""

    path: Path
    first_line: int
    """Number of the line it starts on, from 1."""
    data: bytes
    starts: bool
    """Whether the file starts here."""
    ends: bool
    """Whether the file ends here."""
    input_bytes: int
    """Bytes of the file, compressed if it is, read for this piece."""
    problems: tuple[Problem, ...] = ()
    """What was left out before ``data``, or behind it at the end."""


class _Cut(NamedTuple):
    """Where a kind of input may be cut."""

    last: Callable[[bytes], int]
    """The last such place in what was read, or 0."""
    next: re.Pattern[bytes]
    """What ends at the next such place, to find it behind what is left out."""
    longest: int
    """Bytes without such a place that are taken at most."""
    problem: str
    """What to tell about more."""


def _cut_of(path: Path, rules: Rules) -> _Cut:
    most = rules.max_line_bytes
    if not is_text(path):
        return _Cut(_line_cut, re.compile(rb"\n"), most, f"over {most:,} bytes long; give a larger --max-line-bytes")
    if rules.cut_text:
        return _Cut(_text_cut, re.compile(rb"\S(?=[ \n])"), MAX_WORD_BYTES, NO_TEXT)
    problem = f"this tokenizer takes no text in parts, and this is over {most:,} bytes; give a larger --max-line-bytes"
    return _Cut(lambda data: 0, re.compile(rb"(?!)"), most, problem)  # noqa: ARG005 - nowhere


def is_text(path: Path) -> bool:
    """Whether a file is one document; the others hold one a line or row."""
    return plain_suffix(path) not in JSON_SUFFIXES + TABLE_SUFFIXES


def _line_cut(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def _text_cut(data: bytes) -> int:
    """At the end of a line if one ends: a line that can't be decoded is left out whole."""
    return _space_cut(data, b"\n") or _space_cut(data, b" ")


def _space_cut(data: bytes, space: bytes) -> int:
    """The last ``space`` after a non-space (in Unicode's sense), or 0."""
    place = len(data)
    while (place := data.rfind(space, 0, place)) > 0:
        # A character has up to 4 bytes; a cut-off one in front of the last is ignored.
        if not data[max(place - 4, 0) : place].decode("utf-8", "ignore")[-1:].isspace():
            return place
    return 0


class _File:
    """A file being read: how far, and in what line."""

    def __init__(self, path: Path, source: Source) -> None:
        self.path = path
        self.source = source
        self.line = 1
        self.starts = True
        self.problems: list[Problem] = []
        self._told = 0

    def piece(self, data: bytes, ends: bool = False) -> Piece:
        """The next piece, which holds ``data``."""
        read, self._told = self.source.position - self._told, self.source.position
        piece = Piece(self.path, self.line, data, self.starts, ends, read, tuple(self.problems))
        self.starts = False
        self.problems.clear()
        self.line += data.count(b"\n")
        return piece

    def last(self, held: bytes) -> Piece:
        """What is left at the end; of a damaged file the complete lines."""
        if not self.source.damage:
            return self.piece(held, True)
        line = self.line + held.count(b"\n")
        told = (
            f"{self.path}, line {line}: truncated or damaged {self.path.suffix} ({self.source.damage}); copy it again"
        )
        self.problems.append(Problem("damaged", told))
        return self.piece(held[: _line_cut(held)], True)


def pieces(path: Path, rules: Rules) -> Iterator[Piece]:
    """The pieces of a file in order, of about ``PIECE_BYTES``: lines of JSON whole, text cut before a space.

    Raises ``DataError`` for a file that can't be read at all; other problems come with a piece.
    """
    with Source.open(path, rules.json_keys) as source:
        file, held, first = _File(path, source), b"", True
        cut = _cut_of(path, rules)
        while True:
            wanted = min(max(PIECE_BYTES, len(held)), cut.longest + 1 - len(held))  # doubles without a place to cut
            block = source.read(wanted)
            held += block.removeprefix(codecs.BOM_UTF8) if first else block
            first = False
            if len(block) < wanted:
                break
            if place := cut.last(held):
                yield file.piece(held[:place])
                held = held[place:]
            elif len(held) > cut.longest:
                file.problems.append(Problem("too_long", f"{path}, line {file.line}: {cut.problem}"))
                if rules.stops_at("too_long"):
                    yield file.piece(b"", True)
                    return
                held = _behind(file, held, cut)
        yield file.last(held)


def _behind(file: _File, lost: bytes, cut: _Cut) -> bytes:
    """Read on to the next place to cut, hold nothing on the way; what was read behind it."""
    while lost:
        file.line += lost.count(b"\n")
        before, lost = lost[-1:], file.source.read(min(PIECE_BYTES, cut.longest))
        if found := cut.next.search(before + lost):
            file.line += lost.count(b"\n", 0, found.end() - 1)
            return lost[found.end() - 1 :]
    return b""


def batches(paths: Iterable[Path], rules: Rules) -> Iterator[list[Piece]]:
    """The pieces of all files in order, small ones together: each list holds half of ``PIECE_BYTES`` or more."""
    batch: list[Piece] = []
    held = 0
    for path in paths:
        for piece in pieces(path, rules):
            batch.append(piece)
            held += len(piece.data)
            if held >= PIECE_BYTES // 2:  # a cut piece is a little short of the whole
                yield batch
                batch, held = [], 0
    if batch:
        yield batch
