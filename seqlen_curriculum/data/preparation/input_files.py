"""Finds the input files of a corpus and opens each as one stream of bytes, whatever it is packed in."""

from __future__ import annotations

import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from seqlen_curriculum.errors import DataError

__all__ = ["JSON_SUFFIXES", "SUFFIXES", "TABLE_SUFFIXES", "Source", "find_files", "plain_suffix", "stdlib_files"]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + TABLE_SUFFIXES
_KNOWN = f"{', '.join(SUFFIXES)} (text and JSON also as .gz or .zst)"
_READ_BYTES = 2**16
_PACKED_BYTES = 2**12  # what 4 KiB unpack to is held at once: 4 MiB of gzip at most
_ROWS = 16  # of a table, decoded at once


def find_files(inputs: Sequence[Path], ours: Iterable[Path] = ()) -> list[Path]:
    """The files of ``inputs`` in order; folders give theirs with a known suffix, sorted, but never ``ours`` (outputs).

    Of a folder made by Hugging Face's ``save_to_disk`` only its data files are taken. Raises ``DataError`` for a
    missing path, an unknown suffix, a folder without files, one of several splits, and a file given twice.
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
        files = sorted(path for path in given.rglob("*") if plain_suffix(path) in SUFFIXES and path.is_file())
        files = [path for path in files if os.path.realpath(path) not in own and _is_content(path)]
        if not files:
            raise DataError(f"{given}: this folder has no file with a suffix of {_KNOWN}")
        return files
    if not given.is_file():
        problem = "neither a file nor a folder" if given.exists() else "no such file or folder"
        raise DataError(f"{given}: {problem}; check the path")
    if plain_suffix(given) not in SUFFIXES:
        raise DataError(f"{given}: unknown suffix {given.suffix!r}; rename it to one of {_KNOWN}")
    return [given]


def _is_content(path: Path) -> bool:
    """False for what ``save_to_disk`` and its caches put beside a dataset's data."""
    if path.name == "dataset_dict.json":
        raise DataError(
            f"{path.parent}: a dataset of several splits; name one of its folders, as in {path.parent}/train"
        )
    state = path.with_name("state.json")
    if not path.with_name("dataset_info.json").exists() or not state.exists():
        return True
    try:
        return path.name in {data["filename"] for data in json.loads(state.read_bytes())["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{state}: not as save_to_disk writes it; save the dataset again, or name its files") from None


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


def plain_suffix(path: Path) -> str:
    """The suffix in lower case, that of the content where text or JSON is packed."""
    stem, suffix = os.path.splitext(path.name.lower())
    inner = os.path.splitext(stem)[1]
    return inner if suffix in _UNPACKERS and inner not in TABLE_SUFFIXES else suffix


class Source:
    """The content of an input file: unpacked, rows of a table as lines of JSON with ``json_keys``.

    Where the file turns out to be truncated or damaged the content ends, and ``damage`` says so.
    """

    def __init__(self, chunks: Iterator[tuple[bytes, int]]) -> None:
        self._chunks = chunks
        self._held = bytearray()
        self.position = 0
        """Bytes of the file read so far."""
        self.damage = ""

    @staticmethod
    @contextmanager
    def open(path: Path, json_keys: Sequence[str]) -> Iterator[Source]:
        """Raises ``DataError`` for a file that can't be opened or read at all."""
        try:
            with open(path, "rb") as raw:
                table = plain_suffix(path) in TABLE_SUFFIXES
                yield Source(_rows(path, json_keys) if table else _bytes(raw, path.suffix.lower()))
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror}); check the file and its permissions") from None

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer at the end only."""
        while len(self._held) < size and (chunk := self._next()):
            self._held += chunk
        data = bytes(memoryview(self._held)[:size])
        del self._held[:size]
        return data

    def _next(self) -> bytes:
        try:
            chunk, self.position = next(self._chunks, (b"", self.position))
        except _DamageError as error:
            self.damage = str(error)
            return b""
        return chunk


class _DamageError(Exception):
    """The file breaks off or is broken here."""


_UNPACKERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


def _bytes(raw: BinaryIO, suffix: str) -> Iterator[tuple[bytes, int]]:
    if suffix in _UNPACKERS:
        yield from _unpacked(raw, _UNPACKERS[suffix])
    else:
        while chunk := raw.read(_READ_BYTES):
            yield chunk, raw.tell()
    yield b"", raw.tell()


def _unpacked(raw: BinaryIO, unpacker: Callable[[], Any]) -> Iterator[tuple[bytes, int]]:
    """Not by gzip.open and the like: what they unpacked in front of a break is lost."""
    unpack = unpacker()
    try:
        while packed := raw.read(_PACKED_BYTES):
            while packed:
                if unpack.eof:  # a file may be several, one after the other; zeros fill up blocks of tapes
                    packed = packed.lstrip(b"\0")
                    unpack = unpacker() if packed else unpack
                if packed and (chunk := unpack.decompress(packed)):
                    yield chunk, raw.tell()
                packed = unpack.unused_data
    except (zlib.error, zstandard.ZstdError) as error:
        raise _DamageError(str(error)) from None
    if not unpack.eof:
        raise _DamageError("it ends too early")


def _rows(path: Path, json_keys: Sequence[str]) -> Iterator[tuple[bytes, int]]:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: tables need Hugging Face's datasets; run: pip install datasets") from None
    try:
        for rows, position in (_parquet if plain_suffix(path) == ".parquet" else _arrow)(path, list(json_keys)):
            # A value JSON doesn't know becomes a list, which is no text either.
            lines = (
                json.dumps(row, ensure_ascii=False, default=lambda value: [str(value)]) for row in rows.to_pylist()
            )
            yield "".join(line + "\n" for line in lines).encode(), position
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _DamageError(" ".join(str(error).split())) from None


def _parquet(path: Path, columns: list[str]) -> Iterator[tuple[Any, int]]:
    import pyarrow.parquet

    # Read by pages: a group of rows may have any size.
    with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as table:
        _check_columns(path, columns, table.schema_arrow.names)
        size, done = path.stat().st_size, 0
        for rows in table.iter_batches(_ROWS, columns=columns, use_threads=False):
            done += rows.num_rows
            yield rows, size * done // table.metadata.num_rows


def _arrow(path: Path, columns: list[str]) -> Iterator[tuple[Any, int]]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as stream:  # not mapped: pages read would count as memory held
        in_blocks = stream.read(6) == b"ARROW1"
        stream.seek(0)
        table = pyarrow.ipc.open_file(stream) if in_blocks else pyarrow.ipc.open_stream(stream)
        _check_columns(path, columns, table.schema.names)
        for batch in map(table.get_batch, range(table.num_record_batches)) if in_blocks else table:
            for start in range(0, batch.num_rows, _ROWS):
                yield batch.select(columns).slice(start, _ROWS), stream.tell()


def _check_columns(path: Path, columns: Iterable[str], names: list[str]) -> None:
    for column in columns:
        if column not in names:
            has = ", ".join(map(repr, names)) or "none"
            raise DataError(f"{path}: no column {column!r}, it has {has}; name the column with --json-keys")
