"""Read input files as a stream of pieces, each with documents or a part of a long one.

A text file is one document. In other files each JSON line or table row is one. The reader only splits bytes: workers
decode, parse and encode the pieces, so that one reader is fast enough for many workers.
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

PIECE_BYTES = 2**18  # 256 KiB, about 0.1 s of encoding: balances the workers and needs little memory
MAX_WORD_BYTES = 2**19  # no language has longer words; a tokenizer needs 200 times that memory: 100 MiB
NO_TEXT = f"over {MAX_WORD_BYTES:,} bytes without a space or a newline; this is not text, remove it"
ProblemKind = Literal["empty", "not_utf8", "bad_json", "no_text", "too_long", "damaged"]


class InputProblem(NamedTuple):
    """A part of the inputs that can't be used, or an empty document."""

    kind: ProblemKind
    message: str
    """File, line, problem and fix."""


@dataclass(frozen=True)
class Rules:
    """The rules that turn inputs into documents."""

    json_keys: Sequence[str] = ("text",)
    """Keys of a JSON line (columns of a table). Their texts, joined by newlines, form the document."""
    cut_text: bool = True
    """True if cutting a text before a space that follows a non-space doesn't change its tokens."""
    max_line_bytes: int = 2**24
    """Maximum bytes of a JSON line, and of a text if texts can't be cut."""
    append_eod: bool = True
    """Append ``eod_token`` to each document."""
    eod_token: str | None = None
    """The token that ends a document; None for the tokenizer's own end-of-sequence token."""
    on_bad_input: Literal["stop", "skip"] = "stop"
    """``stop`` at input that can't be used, or ``skip`` the line."""
    on_empty: Literal["stop", "skip"] = "skip"
    """The same for documents that contain only white space."""

    def stops_at(self, kind: str) -> bool:
        """Return whether a problem of this kind stops the preparation."""
        return (self.on_empty if kind == "empty" else self.on_bad_input) == "stop"


@dataclass(frozen=True)
class FilePiece:
    """A part of one file: a whole document, whole JSON lines, or a part of a long document."""

    path: Path
    first_line: int
    """Number of its first line, from 1."""
    data: bytes
    starts: bool
    """True for the first piece of a file."""
    ends: bool
    """True for the last piece of a file."""
    input_bytes: int
    """Bytes of the file read for this piece, before decompression."""
    problems: tuple[InputProblem, ...] = ()
    """Problems that were skipped before ``data``, in the last piece also those after it."""


class _CutRule(NamedTuple):
    """The places at which a kind of input may be cut into pieces."""

    find_last: Callable[[bytes], int]
    """Returns the last such place in a buffer, or 0."""
    next: re.Pattern[bytes]
    """Matches up to the next such place, where reading continues after skipped input."""
    longest: int
    """Maximum bytes without such a place."""
    problem: str
    """The message if there are more bytes."""


def _cut_rule(path: Path, rules: Rules) -> _CutRule:
    longest = rules.max_line_bytes
    if not is_text(path):
        problem = f"over {longest:,} bytes long; give a larger --max-line-bytes"
        return _CutRule(last_line_end, re.compile(rb"\n"), longest, problem)
    if rules.cut_text:
        return _CutRule(last_word_end, re.compile(rb"\S(?=[ \n])"), MAX_WORD_BYTES, NO_TEXT)
    problem = f"over {longest:,} bytes, and this tokenizer can't encode a text in parts; give a larger --max-line-bytes"
    nowhere = re.compile(rb"(?!)")
    return _CutRule(lambda data: 0, nowhere, longest, problem)  # noqa: ARG005


def is_text(path: Path) -> bool:
    """Return whether the file is a single document; other files have one per line or row."""
    return plain_suffix(path) not in JSON_SUFFIXES + TABLE_SUFFIXES


def last_line_end(data: bytes) -> int:
    """Return the place after the last newline, or 0."""
    return data.rfind(b"\n") + 1


def last_word_end(data: bytes) -> int:
    """Return the last place before a newline that follows a non-space, else the same for a space, else 0.

    Newlines are preferred, because a line that can't be decoded is skipped as a whole and should be in one piece.
    """
    for space in (b"\n", b" "):
        place = len(data)
        while (place := data.rfind(space, 0, place)) > 0:
            # Unicode has more spaces than ASCII, such as U+3000 with 3 bytes. A UTF-8 character has up to 4 bytes, so the
            # last 4 bytes contain the whole last character. The end of an earlier one is ignored.
            if not data[max(place - 4, 0) : place].decode("utf-8", "ignore")[-1:].isspace():
                return place
    return 0


class _PieceReader:
    """An open input file, and the first line of its next piece."""

    def __init__(self, path: Path, stream: InputStream) -> None:
        self.path = path
        self.stream = stream
        self.line = 1
        self.starts = True
        self.problems: list[InputProblem] = []
        self._counted_bytes = 0

    def piece(self, data: bytes, ends: bool = False) -> FilePiece:
        """Return the next piece, with ``data``."""
        input_bytes = self.stream.position - self._counted_bytes
        piece = FilePiece(self.path, self.line, data, self.starts, ends, input_bytes, tuple(self.problems))
        self._counted_bytes = self.stream.position
        self.starts = False
        self.problems.clear()
        self.line += data.count(b"\n")
        return piece

    def without_damage(self, data: bytes) -> bytes:
        """Report the damage that the stream met after ``data``, and return the complete lines of ``data``."""
        line = self.line + data.count(b"\n")
        kind = f"truncated or damaged {self.path.suffix} ({self.stream.damage})"
        self.problems.append(InputProblem("damaged", f"{self.path}, line {line}: {kind}; copy it again"))
        self.stream.damage = ""
        return data[: last_line_end(data)]

    def skip_to_cut(self, left_out: bytes, cut: _CutRule) -> bytes:
        """Read up to the next place to cut without keeping the bytes before it; return the bytes read after it."""
        while left_out:
            self.line += left_out.count(b"\n")
            # The place may be between two blocks: a word ends the first, a space starts the second. One byte of overlap
            # finds it, so a match that ends at `end` ends at `end - 1` of the second block.
            overlap, left_out = left_out[-1:], self.stream.read(min(PIECE_BYTES, cut.longest))
            if self.stream.damage:  # the line ends here, unread
                return b""
            if match := cut.next.search(overlap + left_out):
                self.line += left_out.count(b"\n", 0, match.end() - 1)
                return left_out[match.end() - 1 :]
        return b""


def pieces(path: Path, rules: Rules) -> Iterator[FilePiece]:
    """Yield the pieces of a file in order, about ``PIECE_BYTES`` each: whole JSON lines, or text cut before a space.

    Raises ``DataError`` for a file that can't be read at all. Other problems are stored in a piece.
    """
    with open_input(path, rules.json_keys) as stream:
        reader, held, first = _PieceReader(path, stream), b"", True
        cut = _cut_rule(path, rules)
        while True:
            # The buffer grows 256 KiB, 512 KiB, 1 MiB, ... until it has a place to cut, so that searching a line of n bytes
            # costs 2 n. It stops one byte above the limit, which shows that the line is too long.
            wanted = min(max(PIECE_BYTES, len(held)), cut.longest + 1 - len(held))
            block = stream.read(wanted)
            held += block.removeprefix(codecs.BOM_UTF8) if first else block
            first = False
            if stream.damage:
                held = reader.without_damage(held)  # reading continues after the damage
                continue
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
        yield reader.piece(held, ends=True)


def batches(paths: Iterable[Path], rules: Rules) -> Iterator[list[FilePiece]]:
    """Yield the pieces of all files in order, in lists of at least half of ``PIECE_BYTES``."""
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
