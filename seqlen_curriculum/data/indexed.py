"""Megatron's indexed corpus, ``PREFIX.bin`` and ``PREFIX.idx`` (MMIDIDX version 1), read as one stream of tokens.

The .bin holds only tokens. The .idx holds a 34-byte header, then lengths in tokens (i32[N]), byte offsets (i64[N]) and
document indices (i64[M]), all little-endian. The 64-bit blocks start after 34 + 4 N bytes, so they are unaligned.

A document is one or more sequences: with document indices 0, 2, 4 document 0 is sequences 0 and 1, document 1 is
sequences 2 and 3. This package writes one sequence per document, with document indices 0, 1, ... N.

Shapes: B rows, N sequences, M documents + 1.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
import struct
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import ArrayLike, NDArray

from seqlen_curriculum.config.data import corpus_prefix
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["DTYPES", "HEADER", "MAGIC", "VERSION", "CorpusIndex", "IndexedCorpus"]

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, M: 9 + 8 + 1 + 8 + 8 = 34 bytes
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats, which aren't token ids

_FINGERPRINT_BLOCK = 1024  # tokens
_PROBE = 16  # rows that are probed to see whether a batch is on disk


class CorpusIndex:
    """An .idx file. Its three blocks are views of a memory map. Raises ``DataError`` for a damaged file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        if size < HEADER.size:
            raise DataError(
                f"{path}: {size} bytes is shorter than the {HEADER.size}-byte header; copy or prepare it again"
            )
        with open(path, "rb") as stream:
            magic, version, code, num_sequences, num_indices = HEADER.unpack(stream.read(HEADER.size))
        if magic != MAGIC:
            raise DataError(
                f"{path}: starts with {magic!r}, not {MAGIC!r}; it is not an MMIDIDX index: prepare the text again"
            )
        if version != VERSION:
            raise DataError(
                f"{path}: MMIDIDX version {version}, only version {VERSION} is read; prepare the text again"
            )
        if code not in DTYPES:
            raise DataError(f"{path}: dtype code {code}, integers are {', '.join(map(str, DTYPES))}; prepare it again")
        # 34 + 12 N + 8 M bytes. Multimodal corpora append one byte per sequence and are refused here.
        expected = HEADER.size + 12 * num_sequences + 8 * num_indices
        if size != expected:
            raise DataError(
                f"{path}: has {size} bytes where its header ({num_sequences} sequences, {num_indices} document indices) "
                f"needs {expected}; it is truncated, multimodal or damaged: copy or prepare it again"
            )
        if num_sequences == 0 or num_indices < 2:
            raise DataError(
                f"{path}: the corpus is empty ({num_sequences} sequences); prepare it from text with content"
            )
        self.dtype: np.dtype[Any] = np.dtype(DTYPES[code])
        buffer = np.memmap(path, mode="r")
        lengths_end = HEADER.size + 4 * num_sequences
        offsets_end = lengths_end + 8 * num_sequences
        self.lengths: NDArray[np.int32] = np.ndarray((num_sequences,), "<i4", buffer, HEADER.size)  # (N,) tokens
        self.offsets: IntArray = np.ndarray((num_sequences,), "<i8", buffer, lengths_end)  # (N,) bytes
        self.documents: IntArray = np.ndarray((num_indices,), "<i8", buffer, offsets_end)  # (M,) sequences

    def check_ends(self, bin_path: str) -> None:
        """Raise ``DataError`` if the ends of the blocks contradict each other or the size of the .bin.

        Detects truncated and mismatched files in constant time, without reading the blocks.
        """
        first, last, num_sequences = int(self.documents[0]), int(self.documents[-1]), len(self.lengths)
        if int(self.offsets[0]) != 0:
            raise DataError(f"{self.path}: the first byte offset is {int(self.offsets[0])}, not 0; prepare it again")
        if (first, last) != (0, num_sequences):
            raise DataError(
                f"{self.path}: document indices run from {first} to {last}, not from 0 to {num_sequences}; "
                "prepare it again"
            )
        expected = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        size = os.path.getsize(bin_path)
        if size != expected:
            raise DataError(
                f"{bin_path}: has {size} bytes where {self.path} says {expected}; it is truncated or belongs to another "
                ".idx: copy or prepare both files again"
            )
        if size == 0:
            raise DataError(f"{bin_path}: the corpus is empty (0 tokens); prepare it from text with content")


class IndexedCorpus:
    """A memory-mapped ``.bin/.idx`` pair as one stream of ``num_tokens`` tokens. Opening takes constant time.

    ``prefix`` is the path of the pair without its suffix (a final ``.bin`` or ``.idx`` is dropped). ``vocab_size`` is read
    from ``PREFIX.json``, ``None`` without that file. Raises ``DataError`` for a missing, damaged or mismatched pair.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = corpus_prefix(prefix)
        bin_path, idx_path = self.prefix + ".bin", self.prefix + ".idx"
        missing = [path for path in (bin_path, idx_path) if not os.path.isfile(path)]
        if len(missing) == 2:
            raise DataError(
                f"{self.prefix}: no corpus here, neither {bin_path} nor {idx_path} exists; "
                "give the prefix of a .bin/.idx pair, or make one with slw prepare"
            )
        if missing:
            raise DataError(
                f"{missing[0]}: missing, though the other file of the pair exists; copy or prepare both again"
            )
        self.index = CorpusIndex(Path(idx_path))
        self.index.check_ends(bin_path)
        self.dtype = self.index.dtype
        self.num_documents = len(self.index.documents) - 1
        with open(bin_path, "rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        # Rows are far apart. With read-ahead, each row of 2 KiB would read 128 KiB or more from the disk.
        self._map.madvise(mmap.MADV_RANDOM)
        self.tokens: NDArray[Any] = np.frombuffer(self._map, self.dtype)
        self.num_tokens = len(self.tokens)
        self.vocab_size = _recorded_vocab_size(Path(self.prefix + ".json"))

    def __repr__(self) -> str:
        return f"IndexedCorpus({self.prefix!r}, {self.num_documents} documents, {self.num_tokens} tokens)"

    def __reduce__(self) -> tuple[type[IndexedCorpus], tuple[str]]:
        # A pickled memory map would contain every token. The other process opens the files again instead.
        return IndexedCorpus, (self.prefix,)

    def document_start(self, document: int) -> int:
        """Return the token position where ``document`` starts, and ``num_tokens`` for ``num_documents``.

        Raises ``IndexError`` for a document outside 0..num_documents.
        """
        return int(self.document_starts(document, document)[0])

    def document_starts(self, first: int, last: int) -> IntArray:
        """Return ``document_start`` of documents ``first`` to ``last``, (last - first + 1,)."""
        for document in (first, last):
            if not 0 <= document <= self.num_documents:
                raise IndexError(f"{self.prefix}: no document {document}, it has {self.num_documents}")
        # Document -> its first sequence -> byte offset -> token. With offsets 0, 4, 6, 12 and uint16 tokens, document
        # indices 0, 2, 4 give tokens 0, 3 and num_tokens: index 4 is one past the last sequence.
        sequences, offsets = np.asarray(self.index.documents[first : last + 1]), self.index.offsets
        starts = np.where(sequences == len(offsets), self.num_tokens, -1)  # -1: not a start
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
        """Return the document that contains the token at ``position``, by bisection."""
        return bisect_right(range(self.num_documents + 1), position, key=self.document_start) - 1

    def fingerprint(self) -> str:
        """Return a digest of the corpus that doesn't depend on its path, in constant time.

        It covers the counts, the dtype and the tokens of 64 evenly spaced blocks, including both ends.
        """
        digest = hashlib.blake2b(f"{self.num_documents} {self.num_tokens} {self.dtype.str}".encode(), digest_size=16)
        for start in np.linspace(0, max(self.num_tokens - _FINGERPRINT_BLOCK, 0), 64, dtype=np.int64).tolist():
            digest.update(self.tokens[start : start + _FINGERPRINT_BLOCK].tobytes())
        return digest.hexdigest()

    def gather(self, starts: ArrayLike, length: int) -> NDArray[Any]:
        """Return tokens ``[start, start + length)`` of each of ``starts`` (B,), as (B, length) in the corpus's dtype.

        Raises ``IndexError`` if any of them is outside the corpus.
        """
        starts = np.asarray(starts, dtype=np.int64)
        num_windows = self.num_tokens - length + 1
        if length < 1 or (starts.size and not 0 <= starts.min() <= starts.max() < num_windows):
            raise IndexError(f"{self.prefix}: rows of {length} tokens outside its {self.num_tokens} tokens")
        if not starts.size:
            return np.empty((0, length), dtype=self.dtype)
        # Overlapping windows of the memory map, (num_windows, length): with length 3, tokens 5 6 7 8 give the windows
        # 5 6 7 and 6 7 8. One gather copies the rows and touches only their pages.
        step = self.dtype.itemsize
        windows = as_strided(self.tokens, (num_windows, length), (step, step), writeable=False)
        if len(starts) > _PROBE:
            faults = _faults_from_disk()
            windows[starts[:_PROBE]]
            if _faults_from_disk() > faults:
                self._read_ahead(starts, length)
        tokens: NDArray[Any] = windows[starts]
        return tokens

    def block(self, start: int, length: int) -> NDArray[Any]:
        """Return a view of tokens ``[start, start + length)``, read from disk in one piece instead of page by page."""
        self._read_ahead(np.array([start]), length)
        return self.tokens[start : start + length]

    def _read_ahead(self, starts: IntArray, length: int) -> None:
        """Request all rows from disk at once, without waiting for them."""
        # 512 cold rows take 92 ms by page faults, one after the other, 72 ms by pread, and 12 ms if requested together.
        # The request costs 1 ms, ten times as long as reading rows in memory, so a few rows are probed first.
        first = starts * self.dtype.itemsize
        page = first // mmap.PAGESIZE * mmap.PAGESIZE
        end = np.minimum(first + length * self.dtype.itemsize, len(self._map))
        for begin, count in zip(page.tolist(), (end - page).tolist(), strict=True):
            self._map.madvise(mmap.MADV_WILLNEED, begin, count)


def _faults_from_disk() -> int:
    """Return the number of major page faults of this thread: accesses that waited for the disk."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_majflt


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
