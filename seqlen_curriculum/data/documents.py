"""Finds the input files of a corpus and reads their documents as a stream of pieces.

A text file is one document, a line of JSON is one document. The reader only moves bytes; decoding, parsing and encoding
a piece is left to whoever gets it, so that one reader feeds many workers.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from seqlen_curriculum.errors import DataError

__all__ = ["SUFFIXES", "Part", "Piece", "batches", "find_files", "parts", "pieces", "stdlib_files"]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES
PIECE_BYTES = 2**18  # 256 KiB, about 0.1 s of encoding: even work for all workers, little to hold


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


class Part(NamedTuple):
    """The text of a document or of a part of one."""

    text: str
    starts: bool
    ends: bool

    @property
    def is_empty(self) -> bool:
        """A whole document with nothing but white space."""
        return self.starts and self.ends and not self.text.strip()


def find_files(inputs: Sequence[Path], ours: Iterable[Path] = ()) -> list[Path]:
    """The files of ``inputs`` in order; folders give theirs with a known suffix, sorted, but never ``ours`` (outputs).

    Raises ``DataError`` for a missing path, an unknown suffix, a folder without files, and a file given twice.
    """
    own = {os.path.realpath(path) for path in ours}
    found = [path for given in inputs for path in _files_of(given, own)]
    seen: set[str] = set()
    for path in found:
        if os.path.realpath(path) in seen:
            raise DataError(f"{path}: given twice; name each file once, or only the folder it is in")
        seen.add(os.path.realpath(path))
    return found


def _files_of(given: Path, own: set[str]) -> list[Path]:
    if given.is_dir():
        files = sorted(path for path in given.rglob("*") if _plain_suffix(path) in SUFFIXES and path.is_file())
        files = [path for path in files if os.path.realpath(path) not in own]
        if not files:
            raise DataError(f"{given}: this folder has no file with a suffix of {', '.join(SUFFIXES)} (or those .gz)")
        return files
    if not given.exists():
        raise DataError(f"{given}: no such file or folder; check the path")
    if _plain_suffix(given) not in SUFFIXES:
        raise DataError(f"{given}: unknown suffix {given.suffix!r}; rename it to one of {', '.join(SUFFIXES)} (or .gz)")
    return [given]


def stdlib_files() -> list[Path]:
    """The running Python's own ``.py`` files, sorted; without installed packages and files that aren't UTF-8."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)]
    return sorted(path for path in files if path.is_file() and _is_utf8(path.read_bytes()))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _plain_suffix(path: Path) -> str:
    name = path.name.lower()
    return os.path.splitext(name[:-3] if name.endswith(".gz") else name)[1]


def pieces(path: Path, cut_text: bool) -> Iterator[Piece]:
    """The pieces of a file in order, of about ``PIECE_BYTES``: lines of JSON whole, text cut before a space.

    Without ``cut_text`` a text file is one piece. Raises ``DataError`` for a file that can't be read to its end.
    """
    is_json = _plain_suffix(path) in JSON_SUFFIXES
    cut = _line_cut if is_json else _space_cut if cut_text else _no_cut
    with _reading(path) as (stream, raw):
        line, told, kept, starts = 1, 0, b"", True
        while block := stream.read(max(PIECE_BYTES, len(kept))):  # doubles while there is no place to cut
            data = _without_mark(kept + block) if starts else kept + block
            place = cut(data)
            kept = data[place:]
            if place:
                yield Piece(path, line, data[:place], starts, False, raw.tell() - told)
                line, told, starts = line + data.count(b"\n", 0, place), raw.tell(), False
        yield Piece(path, line, kept, starts, True, raw.tell() - told)


@contextmanager
def _reading(path: Path) -> Iterator[tuple[BinaryIO | gzip.GzipFile, BinaryIO]]:
    """The file's content, and the file itself to tell how far it was read."""
    try:
        with open(path, "rb") as raw:
            if path.name.lower().endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield stream, raw
            else:
                yield raw, raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or damaged gzip ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); check the file and its permissions") from None


def _without_mark(data: bytes) -> bytes:
    return data[3:] if data.startswith(codecs.BOM_UTF8) else data


def _no_cut(data: bytes) -> int:  # noqa: ARG001 - one of three with this signature
    return 0


def _line_cut(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def _space_cut(data: bytes) -> int:
    """The last space or newline after a non-space (in Unicode's sense), or 0."""
    place = len(data)
    while (place := max(data.rfind(b" ", 0, place), data.rfind(b"\n", 0, place))) > 0:
        # A character has up to 4 bytes; a cut-off one in front of the last is ignored.
        before = data[max(place - 4, 0) : place].decode("utf-8", "ignore")[-1:]
        if not before.isspace():
            return place
    return 0


def batches(paths: Iterable[Path], cut_text: bool) -> Iterator[list[Piece]]:
    """The pieces of all files in order, small ones together: each list holds half of ``PIECE_BYTES`` or more."""
    batch: list[Piece] = []
    held = 0
    for path in paths:
        for piece in pieces(path, cut_text):
            batch.append(piece)
            held += len(piece.data)
            if held >= PIECE_BYTES // 2:  # a cut piece is a little short of the whole
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


def parts(piece: Piece, json_keys: Sequence[str]) -> Iterator[Part]:
    """The texts in a piece. Raises ``DataError`` that names file and line for bad UTF-8, bad JSON or a missing key."""
    if _plain_suffix(piece.path) not in JSON_SUFFIXES:
        yield Part(_decode(piece.data, piece.path, piece.first_line), piece.starts, piece.ends)
        return
    for number, line in enumerate(piece.data.split(b"\n"), start=piece.first_line):
        if line.strip():
            text = _text_of(_decode(line, piece.path, number), json_keys, _fail(piece.path, number))
            yield Part(text, True, True)


def _decode(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number = line + data.count(b"\n", 0, error.start)
        raise _fail(path, number)(f"not UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8") from None


def _fail(path: Path, line: int) -> Callable[[str], DataError]:
    return lambda problem: DataError(f"{path}, line {line}: {problem}")


def _text_of(line: str, keys: Sequence[str], fail: Callable[[str], DataError]) -> str:
    """The texts under ``keys``, a newline between them."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise fail(f"not valid JSON ({error.msg} at column {error.colno}); each line is one JSON object") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, a tower of brackets
        raise fail("a number or a nesting too large for JSON; remove the line") from None
    if not isinstance(record, dict):
        raise fail(f"a {type(record).__name__}, not a JSON object; each line is one JSON object")
    return "\n".join(_value(record, key, fail) for key in keys)


def _value(record: dict[str, object], key: str, fail: Callable[[str], DataError]) -> str:
    if key not in record:
        raise fail(f"no key {key!r}, it has {', '.join(map(repr, record)) or 'none'}; name the key with --json-keys")
    text = record[key]
    if not isinstance(text, str):
        raise fail(f"{key!r} is a {type(text).__name__}, not a string; name another key with --json-keys")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise fail(f"{key!r} has half of a surrogate pair, which is no character; repair the text") from None
    return text
