"""Read input files as a stream of pieces, which hold documents or parts of long ones.

A text file is one document. Of other files each line of JSON or row of a table is one. The reader only moves bytes;
whoever gets a piece decodes, parses and encodes it, so that one reader feeds many workers.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from seqlen_curriculum.data.preparation.input_files import JSON_SUFFIXES, TABLE_SUFFIXES, plain_suffix
from seqlen_curriculum.data.preparation.input_stream import InputStream, open_input

__all__ = [
    "MAX_WORD_BYTES",
    "NO_TEXT",
    "PIECE_BYTES",
    "FilePiece",
    "InputProblem",
    "ProblemKind",
    "Rules",
    "batches",
    "is_text",
    "last_line_end",
    "last_word_end",
    "pieces",
]

PIECE_BYTES = 2**18  # 256 KiB, about 0.1 s of encoding: even work for all workers, little to hold
MAX_WORD_BYTES = 2**19  # no language has one that long, and a tokenizer needs 200 times its memory: 100 MiB
NO_TEXT = f"over {MAX_WORD_BYTES:,} bytes without a space or an end of line; that is no text, remove it"
ProblemKind = Literal["empty", "not_utf8", "bad_json", "no_text", "too_long", "damaged"]


class InputProblem(NamedTuple):
    """A place of the inputs that can't be used, or an empty document."""

    kind: ProblemKind
    message: str
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
        """Return whether such a problem ends the work."""
        return (self.on_empty if kind == "empty" else self.on_bad_input) == "stop"


@dataclass(frozen=True)
class FilePiece:
    """A part of one file: a whole document, whole lines of JSON, or a part of a long document."""

    path: Path
    first_line: int
    """Number of the line it starts on, from 1."""
    data: bytes
    starts: bool
    """Whether the file starts here."""
    ends: bool
    """Whether the file ends here."""
    input_bytes: int
    """Bytes of the file, packed if it is, read for this piece."""
    problems: tuple[InputProblem, ...] = ()
    """What was left out before ``data``; of the last piece also what was left out after it."""


class _CutRule(NamedTuple):
    """Where a kind of input may be cut into pieces."""

    find_last: Callable[[bytes], int]
    """Returns the last such place in what was read, or 0."""
    next: re.Pattern[bytes]
    """Matches up to the next such place, where reading resumes after what is left out."""
    longest: int
    """Most bytes without such a place."""
    problem: str
    """The message about more bytes than that."""


def _cut_rule(path: Path, rules: Rules) -> _CutRule:
    longest = rules.max_line_bytes
    if not is_text(path):
        problem = f"over {longest:,} bytes long; give a larger --max-line-bytes"
        return _CutRule(last_line_end, re.compile(rb"\n"), longest, problem)
    if rules.cut_text:
        return _CutRule(last_word_end, re.compile(rb"\S(?=[ \n])"), MAX_WORD_BYTES, NO_TEXT)
    problem = (
        f"this tokenizer takes no text in parts, and this is over {longest:,} bytes; give a larger --max-line-bytes"
    )
    nowhere = re.compile(rb"(?!)")
    return _CutRule(lambda data: 0, nowhere, longest, problem)  # noqa: ARG005


def is_text(path: Path) -> bool:
    """Return whether the file is one document; other files hold one per line or row."""
    return plain_suffix(path) not in JSON_SUFFIXES + TABLE_SUFFIXES


def last_line_end(data: bytes) -> int:
    """Return the place after the last newline, or 0."""
    return data.rfind(b"\n") + 1


def last_word_end(data: bytes) -> int:
    """Return the last place before a newline that follows a non-space; without one the same for a space, or 0.

    Newlines come first because a line that can't be decoded is left out whole, so it should be in one piece.
    """
    for space in (b"\n", b" "):
        place = len(data)
        while (place := data.rfind(space, 0, place)) > 0:
            # Unicode has more spaces than ASCII, such as the 3 bytes of U+3000. A UTF-8 character has up to 4 bytes, so
            # 4 hold the whole last one; the end of another before it is ignored.
            if not data[max(place - 4, 0) : place].decode("utf-8", "ignore")[-1:].isspace():
                return place
    return 0


class _PieceReader:
    """A file being read, and the line that its next piece starts on."""

    def __init__(self, path: Path, stream: InputStream) -> None:
        self.path = path
        self.stream = stream
        self.line = 1
        self.starts = True
        self.problems: list[InputProblem] = []
        self._counted_bytes = 0

    def piece(self, data: bytes, ends: bool = False) -> FilePiece:
        """Return the next piece, which holds ``data``."""
        input_bytes = self.stream.position - self._counted_bytes
        piece = FilePiece(self.path, self.line, data, self.starts, ends, input_bytes, tuple(self.problems))
        self._counted_bytes = self.stream.position
        self.starts = False
        self.problems.clear()
        self.line += data.count(b"\n")
        return piece

    def last_piece(self, data: bytes) -> FilePiece:
        """Return the piece that ends the file; of a damaged file it holds only the complete lines of ``data``."""
        if self.stream.damage:
            line = self.line + data.count(b"\n")
            kind = f"truncated or damaged {self.path.suffix} ({self.stream.damage})"
            self.problems.append(InputProblem("damaged", f"{self.path}, line {line}: {kind}; copy it again"))
            data = data[: last_line_end(data)]
        return self.piece(data, ends=True)

    def skip_to_cut(self, left_out: bytes, cut: _CutRule) -> bytes:
        """Read on to the next place to cut without holding what is before it; return what was read after it."""
        while left_out:
            self.line += left_out.count(b"\n")
            # The place may lie between two blocks: a word that ends the first, a space that starts the second. One byte
            # of overlap finds it, so a match that ends at `end` ends at `end - 1` of the second block.
            overlap, left_out = left_out[-1:], self.stream.read(min(PIECE_BYTES, cut.longest))
            if match := cut.next.search(overlap + left_out):
                self.line += left_out.count(b"\n", 0, match.end() - 1)
                return left_out[match.end() - 1 :]
        return b""


def pieces(path: Path, rules: Rules) -> Iterator[FilePiece]:
    """Yield the pieces of a file in order, of about ``PIECE_BYTES``: lines of JSON whole, text cut before a space.

    Raises ``DataError`` for a file that can't be read at all; other problems come with a piece.
    """
    with open_input(path, rules.json_keys) as stream:
        reader, held, first = _PieceReader(path, stream), b"", True
        cut = _cut_rule(path, rules)
        while True:
            # What is held grows 256 KiB, 512 KiB, 1 MiB, ... until it has a place to cut, so that the search of a line of
            # n bytes costs 2 n; one byte over the longest is enough to know that it is too long.
            wanted = min(max(PIECE_BYTES, len(held)), cut.longest + 1 - len(held))
            block = stream.read(wanted)
            held += block.removeprefix(codecs.BOM_UTF8) if first else block
            first = False
            if len(block) < wanted:
                break
            if place := cut.find_last(held):
                yield reader.piece(held[:place])
                held = held[place:]
            elif len(held) > cut.longest:
                reader.problems.append(InputProblem("too_long", f"{path}, line {reader.line}: {cut.problem}"))
                if rules.stops_at("too_long"):
                    yield reader.piece(b"", ends=True)
                    return
                held = reader.skip_to_cut(held, cut)
        yield reader.last_piece(held)


def batches(paths: Iterable[Path], rules: Rules) -> Iterator[list[FilePiece]]:
    """Yield the pieces of all files in order, small ones together: a list holds half of ``PIECE_BYTES`` or more."""
    batch: list[FilePiece] = []
    held_bytes = 0
    for path in paths:
        for piece in pieces(path, rules):
            batch.append(piece)
            held_bytes += len(piece.data)
            if held_bytes >= PIECE_BYTES // 2:  # a cut piece is a little shorter than PIECE_BYTES
                yield batch
                batch, held_bytes = [], 0
    if batch:
        yield batch
