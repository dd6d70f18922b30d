"""Megatron's indexed corpus, ``PREFIX.bin`` and ``PREFIX.idx`` (MMIDIDX version 1), read as one stream of tokens.

The .bin holds the tokens and nothing else. The .idx holds a 34-byte header, then lengths in tokens (i32[N]), byte
offsets (i64[N]) and document indices (i64[M]), all little-endian; the 64-bit blocks may be unaligned.

Shapes: B rows, N sequences, M documents + 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from bisect import bisect_right
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import ArrayLike, NDArray

from seqlen_curriculum.config.data import corpus_prefix
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["DTYPES", "HEADER", "MAGIC", "VERSION", "IndexedCorpus"]

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, M: 9 + 8 + 1 + 8 + 8 = 34 bytes
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats, which aren't token ids


_FINGERPRINT_BLOCK = 1024


class _Index(NamedTuple):
    """The three blocks of an .idx file, as views of its memory map."""

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]  # (N,) tokens
    offsets: IntArray  # (N,) bytes
    documents: IntArray  # (M,) sequences


class IndexedCorpus:
    """A ``.bin/.idx`` pair as one stream of ``num_tokens`` tokens, memory-mapped; opening takes constant time.

    ``prefix`` is the pair's path without suffix (a ``.bin`` or ``.idx`` at its end is dropped). ``vocab_size`` is what
    ``PREFIX.json`` records, ``None`` without one. Raises ``DataError`` for a missing, damaged or mismatched pair.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = corpus_prefix(prefix)
        _require_pair(self.prefix)
        self._index = _read_index(Path(self.prefix + ".idx"))
        _check_ends(self._index, self.prefix)
        self.dtype = self._index.dtype
        self.num_documents = len(self._index.documents) - 1
        self.tokens: NDArray[Any] = np.asarray(np.memmap(self.prefix + ".bin", dtype=self.dtype, mode="r"))
        self.num_tokens = len(self.tokens)
        self.vocab_size = _recorded_vocab_size(Path(self.prefix + ".json"))

    def __repr__(self) -> str:
        return f"IndexedCorpus({self.prefix!r}, {self.num_documents} documents, {self.num_tokens} tokens)"

    def __reduce__(self) -> tuple[type[IndexedCorpus], tuple[str]]:
        # A pickled memory map carries every token; another process opens the files again instead.
        return IndexedCorpus, (self.prefix,)

    def document_start(self, document: int) -> int:
        """Token position where ``document`` starts; ``num_documents`` gives ``num_tokens``. ``IndexError`` outside."""
        return int(self.document_starts(document, document)[0])

    def document_starts(self, first: int, last: int) -> IntArray:
        """Where documents ``first`` to ``last`` start, as ``document_start`` tells of one: (last - first + 1,)."""
        for document in (first, last):
            if not 0 <= document <= self.num_documents:
                raise IndexError(f"{self.prefix}: no document {document}, it has {self.num_documents}")
        sequences, offsets = np.asarray(self._index.documents[first : last + 1]), self._index.offsets
        starts = np.where(sequences == len(offsets), self.num_tokens, -1)
        inside = (sequences >= 0) & (sequences < len(offsets))
        positions, rest = np.divmod(offsets[sequences[inside]], self.dtype.itemsize)
        starts[inside] = np.where(rest == 0, positions, -1)
        wrong = np.flatnonzero((starts < 0) | (starts > self.num_tokens))
        if wrong.size:
            raise DataError(
                f"{self.prefix}.idx: document {first + wrong[0]} starts outside the tokens; prepare the pair again"
            )
        return starts

    def document_at(self, position: int) -> int:
        """The document that has the token at ``position``, by bisection."""
        return bisect_right(range(self.num_documents + 1), position, key=self.document_start) - 1

    def fingerprint(self) -> str:
        """A digest of the corpus, whatever its path: its counts and tokens of 64 evenly spaced blocks; constant time."""
        digest = hashlib.blake2b(f"{self.num_documents} {self.num_tokens} {self.dtype.str}".encode(), digest_size=16)
        for start in np.linspace(0, max(self.num_tokens - _FINGERPRINT_BLOCK, 0), 64, dtype=np.int64).tolist():
            digest.update(self.tokens[start : start + _FINGERPRINT_BLOCK].tobytes())
        return digest.hexdigest()

    def gather(self, starts: ArrayLike, length: int) -> NDArray[Any]:
        """Tokens ``[start, start + length)`` of each of ``starts`` (B,), as (B, length) as stored; ``IndexError`` outside.

        One gather of rows out of overlapping windows of the memory map: only the pages asked for are touched.
        """
        rows = np.asarray(starts, dtype=np.int64)
        windows = self.num_tokens - length + 1
        if length < 1 or (rows.size and not 0 <= rows.min() <= rows.max() < windows):
            raise IndexError(f"{self.prefix}: rows of {length} tokens outside its {self.num_tokens} tokens")
        if not rows.size:
            return np.empty((0, length), dtype=self.dtype)
        step = self.dtype.itemsize
        table = as_strided(self.tokens, (windows, length), (step, step), writeable=False)
        rows_of_tokens: NDArray[Any] = table[rows]
        return rows_of_tokens


def _require_pair(prefix: str) -> None:
    missing = [prefix + suffix for suffix in (".bin", ".idx") if not os.path.isfile(prefix + suffix)]
    if len(missing) == 2:
        raise DataError(
            f"{prefix}: no corpus here, neither {missing[0]} nor {missing[1]} exists; "
            "give the prefix of a .bin/.idx pair, or make one with scripts/prepare_data.py"
        )
    if missing:
        raise DataError(f"{missing[0]}: missing, though the other file of the pair exists; copy or prepare both again")


def _read_index(path: Path) -> _Index:
    size = path.stat().st_size
    if size < HEADER.size:
        raise DataError(f"{path}: {size} bytes is shorter than the {HEADER.size}-byte header; copy or prepare it again")
    with open(path, "rb") as stream:
        magic, version, code, num_sequences, num_indices = HEADER.unpack(stream.read(HEADER.size))
    _check_header(path, magic, version, code)
    expected = HEADER.size + 12 * num_sequences + 8 * num_indices
    if size != expected:
        raise DataError(
            f"{path}: has {size} bytes where its header ({num_sequences} sequences, {num_indices} document indices) "
            f"needs {expected}; it is truncated, multimodal or damaged: copy or prepare it again"
        )
    if num_sequences == 0 or num_indices < 2:
        raise DataError(f"{path}: the corpus is empty ({num_sequences} sequences); prepare it from text with content")
    return _blocks(path, np.dtype(DTYPES[code]), num_sequences, num_indices)


def _check_header(path: Path, magic: bytes, version: int, code: int) -> None:
    if magic != MAGIC:
        raise DataError(f"{path}: starts with {magic!r}, not {MAGIC!r}; it is no MMIDIDX index: prepare the text again")
    if version != VERSION:
        raise DataError(f"{path}: MMIDIDX version {version}, only version {VERSION} is read; prepare the text again")
    if code not in DTYPES:
        raise DataError(f"{path}: dtype code {code}, integers are {', '.join(map(str, DTYPES))}; prepare it again")


def _blocks(path: Path, dtype: np.dtype[Any], num_sequences: int, num_indices: int) -> _Index:
    buffer = np.memmap(path, mode="r")
    lengths_end = HEADER.size + 4 * num_sequences
    offsets_end = lengths_end + 8 * num_sequences
    return _Index(
        dtype,
        np.ndarray((num_sequences,), "<i4", buffer, HEADER.size),
        np.ndarray((num_sequences,), "<i8", buffer, lengths_end),
        np.ndarray((num_indices,), "<i8", buffer, offsets_end),
    )


def _check_ends(index: _Index, prefix: str) -> None:
    """Both ends of every block and the size of the .bin: constant time, and no truncated or foreign file passes."""
    first, last, num_sequences = int(index.documents[0]), int(index.documents[-1]), len(index.lengths)
    if int(index.offsets[0]) != 0:
        raise DataError(f"{prefix}.idx: the first byte offset is {int(index.offsets[0])}, not 0; prepare it again")
    if (first, last) != (0, num_sequences):
        raise DataError(
            f"{prefix}.idx: document indices run from {first} to {last}, not from 0 to {num_sequences}; prepare it again"
        )
    expected = int(index.offsets[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
    found = os.path.getsize(prefix + ".bin")
    if found != expected:
        raise DataError(
            f"{prefix}.bin: has {found} bytes where {prefix}.idx says {expected}; it is truncated or belongs to "
            "another .idx: copy or prepare both files again"
        )
    if found == 0:
        raise DataError(f"{prefix}.bin: the corpus is empty (0 tokens); prepare it from text with content")


def _recorded_vocab_size(path: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); prepare the corpus again, or remove this file") from None
    vocab_size = record.get("vocab_size") if isinstance(record, dict) else None
    if vocab_size is not None and (not isinstance(vocab_size, int) or vocab_size < 1):
        raise DataError(f"{path}: vocab_size is {vocab_size!r}, not a positive integer; prepare the corpus again")
    return vocab_size
