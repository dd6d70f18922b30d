"""Open an input file as a stream of bytes: text and JSON decompressed but otherwise unchanged, tables as JSON lines."""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from seqlen_curriculum.data.preparation.input_files import TABLE_SUFFIXES, plain_suffix
from seqlen_curriculum.data.preparation.input_tables import table_chunks
from seqlen_curriculum.errors import DataError

__all__ = ["InputStream", "open_input"]

_READ_BYTES = 2**16
_PACKED_BYTES = 2**12  # gzip compresses by up to 1,032: 4 KiB give at most 4 MiB, which are held at once
_HEADER_BYTES = 10
Chunks = Iterator[tuple[bytes | str, int]]
"""(content, bytes of the file read so far). A string is the reason why content is missing at this place."""


class InputStream:
    """The content of an input file.

    Where it is truncated or damaged, ``read`` stops and ``damage`` is the reason. After the caller has set ``damage`` to
    an empty string, ``read`` continues with the content after that place, if any.
    """

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._held = bytearray()
        self.position = 0
        """Bytes of the file read so far, before decompression."""
        self.damage = ""

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes, or fewer at the end and before damage."""
        while len(self._held) < size and not self.damage:
            try:
                chunk, self.position = next(self._chunks)
            except StopIteration:
                break
            if isinstance(chunk, str):
                self.damage = chunk
            else:
                self._held += chunk
        data = bytes(memoryview(self._held)[:size])
        del self._held[:size]
        return data


class _Packing(NamedTuple):
    """A kind of compression."""

    unpacker: Callable[[], Any]
    header: re.Pattern[bytes]
    """The beginning of a compressed member."""


_PACKINGS = {
    # 16 for the header of gzip, 15 for windows of 2**15 bytes. The header has flags, a time, and the kind of system.
    ".gz": _Packing(
        lambda: zlib.decompressobj(wbits=31),
        re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", re.DOTALL),
    ),
    # Published dumps have windows of up to 2 GiB (zstd --long=31); the library's own limit is 128 MiB.
    ".zst": _Packing(
        lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(), re.compile(rb"\x28\xb5\x2f\xfd")
    ),
    ".bz2": _Packing(bz2.BZ2Decompressor, re.compile(rb"BZh[1-9]1AY&SY")),
    ".xz": _Packing(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), re.compile(rb"\xfd7zXZ\x00")),
}


@contextmanager
def open_input(path: Path, json_keys: Sequence[str]) -> Iterator[InputStream]:
    """Open ``path``; from a table, read the columns ``json_keys``. Raises ``DataError`` if the file can't be read at all."""
    try:
        with open(path, "rb") as raw:
            if plain_suffix(path) in TABLE_SUFFIXES:
                yield InputStream(table_chunks(path, list(json_keys)))
            elif packing := _packing(path, raw):
                yield InputStream(_unpacked_chunks(raw, packing))
            else:
                yield InputStream(_plain_chunks(raw))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); check the file and its permissions") from None


def _packing(path: Path, raw: BinaryIO) -> _Packing | None:
    """Return the compression of a file by its suffix, or by its header: some downloads keep it under the plain name."""
    if packing := _PACKINGS.get(path.suffix.lower()):
        return packing
    header = raw.read(_HEADER_BYTES)
    raw.seek(0)
    return next((packing for packing in _PACKINGS.values() if packing.header.match(header)), None)


def _plain_chunks(raw: BinaryIO) -> Chunks:
    while chunk := raw.read(_READ_BYTES):
        yield chunk, raw.tell()


def _unpacked_chunks(raw: BinaryIO, packing: _Packing) -> Chunks:
    # gzip.open loses data that it decompressed before damage in the file. A decompression object returns it.
    unpack = packing.unpacker()
    packed = raw.read(_PACKED_BYTES)
    while packed:
        if unpack.eof:
            # `cat a.gz b.gz` is a valid file of two members. Tape archives pad the last block with zeros.
            packed = packed.lstrip(b"\0")
            if packed:
                unpack = packing.unpacker()
        try:
            chunk = unpack.decompress(packed) if packed else b""
            packed = unpack.unused_data if packed else b""
        except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, ValueError) as error:  # bz2 raises OSError
            yield str(error), raw.tell()
            packed, unpack = _next_member(raw, packed, packing), packing.unpacker()
            if not packed:
                return
            continue
        if chunk:
            yield chunk, raw.tell()
        packed = packed or raw.read(_PACKED_BYTES)
    if not unpack.eof:
        yield "it ends too early", raw.tell()
    yield b"", raw.tell()  # the last bytes of the file may decompress to nothing


def _next_member(raw: BinaryIO, packed: bytes, packing: _Packing) -> bytes:
    """Return the file's next bytes from the header of a member on, after the first byte of ``packed``. Empty without one."""
    packed = packed[1:]
    while not (found := packing.header.search(packed)):
        if not (more := raw.read(_PACKED_BYTES)):
            return b""
        packed = packed[1 - _HEADER_BYTES :] + more
    return packed[found.start() :]
