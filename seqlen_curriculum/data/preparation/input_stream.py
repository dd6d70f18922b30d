"""Open an input file as a stream of bytes: text and JSON decompressed but otherwise unchanged, tables as JSON lines."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from seqlen_curriculum.data.preparation.input_files import TABLE_SUFFIXES, plain_suffix
from seqlen_curriculum.errors import DataError

__all__ = ["InputStream", "open_input"]

_READ_BYTES = 2**16
_PACKED_BYTES = 2**12  # gzip compresses by up to 1,032: 4 KiB give at most 4 MiB, which are held at once
_TABLE_ROWS = 16  # decoded at once


class _DamageError(Exception):
    """Raised where a file is truncated or damaged."""


class InputStream:
    """The content of an input file.

    It ends where the file is truncated or damaged; ``damage`` is then the reason.
    """

    def __init__(self, chunks: Iterator[tuple[bytes, int]]) -> None:
        self._chunks = chunks
        self._held = bytearray()
        self.position = 0
        """Bytes of the file read so far, before decompression."""
        self.damage = ""

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes, or fewer at the end."""
        while len(self._held) < size:
            try:
                chunk, self.position = next(self._chunks)
            except StopIteration:
                break
            except _DamageError as error:
                self.damage = str(error)
                break
            self._held += chunk
        data = bytes(memoryview(self._held)[:size])
        del self._held[:size]
        return data


@contextmanager
def open_input(path: Path, json_keys: Sequence[str]) -> Iterator[InputStream]:
    """Open ``path``; from a table, read the columns ``json_keys``. Raises ``DataError`` if the file can't be read at all."""
    suffix = path.suffix.lower()
    try:
        with open(path, "rb") as raw:
            if plain_suffix(path) in TABLE_SUFFIXES:
                yield InputStream(_table_chunks(path, list(json_keys)))
            elif suffix in _UNPACKERS:
                yield InputStream(_unpacked_chunks(raw, _UNPACKERS[suffix]))
            else:
                yield InputStream(_plain_chunks(raw))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); check the file and its permissions") from None


# Each of these yields (content, bytes of the file read so far).


def _plain_chunks(raw: BinaryIO) -> Iterator[tuple[bytes, int]]:
    while chunk := raw.read(_READ_BYTES):
        yield chunk, raw.tell()


_UNPACKERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # 16 for the header of gzip, 15 for windows of 2**15 bytes
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


def _unpacked_chunks(raw: BinaryIO, unpacker: Callable[[], Any]) -> Iterator[tuple[bytes, int]]:
    # gzip.open loses data that it decompressed before damage in the file. A decompression object returns it.
    unpack = unpacker()
    try:
        while packed := raw.read(_PACKED_BYTES):
            while packed:
                if unpack.eof:
                    # `cat a.gz b.gz` is a valid file of two members. Tape archives pad the last block with zeros.
                    packed = packed.lstrip(b"\0")
                    if not packed:
                        break
                    unpack = unpacker()
                if chunk := unpack.decompress(packed):
                    yield chunk, raw.tell()
                packed = unpack.unused_data
    except (zlib.error, zstandard.ZstdError) as error:
        raise _DamageError(str(error)) from None
    if not unpack.eof:
        raise _DamageError("it ends too early")
    yield b"", raw.tell()  # the last bytes of the file may decompress to nothing


def _table_chunks(path: Path, columns: list[str]) -> Iterator[tuple[bytes, int]]:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: tables need Hugging Face's datasets; run: pip install datasets") from None
    read_rows = _parquet_rows if plain_suffix(path) == ".parquet" else _arrow_rows
    try:
        for rows, position in read_rows(path, columns):
            # A value that JSON can't represent (a date, bytes) becomes a list, which is refused because it is not a string.
            lines = [
                json.dumps(row, ensure_ascii=False, default=lambda value: [str(value)]) for row in rows.to_pylist()
            ]
            yield "".join(line + "\n" for line in lines).encode(), position
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _DamageError(" ".join(str(error).split())) from None


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[Any, int]]:
    import pyarrow.parquet

    # Pages are read one by one, because a row group, parquet's unit, may be larger than memory.
    with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as table:
        _check_columns(path, columns, table.schema_arrow.names)
        file_bytes, rows_read = path.stat().st_size, 0
        for rows in table.iter_batches(_TABLE_ROWS, columns=columns, use_threads=False):
            rows_read += rows.num_rows
            yield rows, file_bytes * rows_read // table.metadata.num_rows  # an estimate, for the progress bar


def _arrow_rows(path: Path, columns: list[str]) -> Iterator[tuple[Any, int]]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as stream:  # not a memory map, whose pages would count as used memory
        is_file_format = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file_format:
            table = pyarrow.ipc.open_file(stream)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            table = pyarrow.ipc.open_stream(stream)
            batches = iter(table)
        _check_columns(path, columns, table.schema.names)
        for batch in batches:
            for start in range(0, batch.num_rows, _TABLE_ROWS):
                yield batch.select(columns).slice(start, _TABLE_ROWS), stream.tell()


def _check_columns(path: Path, columns: list[str], available: list[str]) -> None:
    missing = [column for column in columns if column not in available]
    if missing:
        names = ", ".join(map(repr, available)) or "none"
        raise DataError(f"{path}: no column {missing[0]!r}, it has {names}; select columns with --json-keys")
