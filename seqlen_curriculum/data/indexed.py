"""Megatron's indexed corpus, ``PREFIX.bin`` and ``PREFIX.idx`` (``corpus_index.py``), read as one stream of tokens.

Shapes: B rows.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import ArrayLike, NDArray

from seqlen_curriculum.config.data import corpus_prefix
from seqlen_curriculum.data.corpus_index import DTYPES, HEADER, MAGIC, VERSION, CorpusIndex
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["DTYPES", "HEADER", "MAGIC", "VERSION", "CorpusIndex", "IndexedCorpus"]

_FINGERPRINT_BLOCK = 1024  # tokens
_PROBE = 16  # rows that are probed to see whether a batch is on disk


class IndexedCorpus:
    """A memory-mapped ``.bin/.idx`` pair as one stream of ``num_tokens`` tokens. Opening reads the ``.idx`` once.

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
        try:
            self.index = CorpusIndex(Path(idx_path))
            self.index.check(bin_path)
            with open(bin_path, "rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            path = error.filename or self.prefix
            raise DataError(f"{path}: can't be read ({error.strerror}); check its owner and its mode") from error
        self.dtype = self.index.dtype
        self.num_documents = len(self.index.documents) - 1
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
        return self._starts(np.asarray(self.index.documents[first : last + 1]))

    def starts_of(self, documents: IntArray) -> IntArray:
        """Return ``document_start`` of each of ``documents``, in their shape."""
        return self._starts(np.asarray(self.index.documents[documents]))

    def _starts(self, sequences: IntArray) -> IntArray:
        """Return the token positions where ``sequences`` start; ``num_tokens`` for the one after the last."""
        # Document -> its first sequence -> byte offset -> token. With offsets 0, 4, 6, 12 and uint16 tokens, document
        # indices 0, 2, 4 give tokens 0, 3 and num_tokens: index 4 is one past the last sequence.
        offsets = self.index.offsets
        starts = np.full_like(sequences, self.num_tokens)
        inside = sequences < len(offsets)
        starts[inside] = offsets[sequences[inside]] // self.dtype.itemsize
        return starts

    def first_documents_from(self, positions: IntArray) -> IntArray:
        """Return the first document that starts at or after each of ``positions``, in their shape.

        It is ``num_documents`` after the start of the last document.
        """
        low, high = np.zeros_like(positions), np.full_like(positions, self.num_documents)
        for _ in range(self.num_documents.bit_length()):  # bisection; numpy's own would copy the index
            middle = (low + high) // 2
            starts_before = (low < high) & (self.starts_of(middle) < positions)
            low, high = np.where(starts_before, middle + 1, low), np.where(starts_before, high, middle)
        return low

    def document_at(self, position: int) -> int:
        """Return the document that contains the token at ``position``, by bisection."""
        return bisect_right(range(self.num_documents + 1), position, key=self.document_start) - 1

    def check_size(self) -> None:
        """Raise ``DataError`` if the .bin was truncated since it was opened: reading the lost pages kills the process."""
        size = self._map.size()  # of the file, in 0.5 us on a local disk
        if size < len(self._map):
            raise DataError(
                f"{self.prefix}.bin: has {size} bytes, and had {len(self._map)} when it was opened; it was truncated during "
                "the run: copy or prepare it again, and resume"
            )

    def fingerprint(self) -> str:
        """Return a digest of the corpus that doesn't depend on its path, in constant time.

        It covers the counts, the dtype and the tokens of 64 evenly spaced blocks, including both ends.
        """
        self.check_size()
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
        self.check_size()
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
        self.check_size()
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
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); prepare the corpus again, or remove this file") from None
    vocab_size = record.get("vocab_size") if isinstance(record, dict) else None
    if vocab_size is not None and (not isinstance(vocab_size, int) or vocab_size < 1):
        raise DataError(f"{path}: vocab_size is {vocab_size!r}, not a positive integer; prepare the corpus again")
    return vocab_size
