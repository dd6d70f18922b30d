"""The index of a Megatron corpus, ``PREFIX.idx`` (MMIDIDX version 1), and its checks.

The .bin holds only tokens. The .idx holds a 34-byte header, then lengths in tokens (i32[N]), byte offsets (i64[N]) and
document indices (i64[M]), all little-endian. The 64-bit blocks start after 34 + 4 N bytes, so they are unaligned.

A document is one or more sequences: with document indices 0, 2, 4 document 0 is sequences 0 and 1, document 1 is
sequences 2 and 3. This package writes one sequence per document, with document indices 0, 1, ... N.

Shapes: N sequences, M documents + 1.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.errors import DataError
from seqlen_curriculum.run_folder.own_files import is_lfs_pointer
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["DTYPES", "HEADER", "MAGIC", "VERSION", "CorpusIndex"]

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, M: 9 + 8 + 1 + 8 + 8 = 34 bytes
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats, which aren't token ids

_BLOCK = 2**18  # entries that are checked at a time: 2 MiB of offsets stay in the cache
_FEWEST = 8  # sequences; in a smaller corpus a document of two sequences beside an empty one is no sign of damage
_CLOCK_SECONDS = 1.0  # a file that was changed so recently may be changed again under the same time stamp
_CHECKED = set[tuple[int, ...]]()
"""Device, inode, size and time of each checked .idx, and the size of its .bin."""


class CorpusIndex:
    """An .idx file. Its three blocks are views of a memory map. Raises ``DataError`` for a damaged header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        if size < HEADER.size:
            raise DataError(
                f"{path}: {size} bytes is shorter than the {HEADER.size}-byte header; copy or prepare it again"
            )
        with open(path, "rb") as stream:
            magic, version, code, num_sequences, num_indices = HEADER.unpack(stream.read(HEADER.size))
        if is_lfs_pointer(path):
            raise DataError(f"{path}: is a pointer of Git LFS, not the file itself; run git lfs pull there")
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

    def check(self, bin_path: str) -> None:
        """Raise ``DataError`` unless the sequences fill the .bin in the order of the index, without gaps.

        megatron-core follows any index. This package reads a .bin from its start to its end, which gives the same tokens
        only then. Takes 0.7 s of one core for 100 million documents, 2 GB, besides reading them from the disk. A file is
        checked once per process.
        """
        self._check_ends(bin_path)
        status = os.stat(self.path)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, os.path.getsize(bin_path))
        if key in _CHECKED:
            return
        with open(self.path, "rb") as stream:
            self._check_sequences(stream)
            self._check_documents(stream)
        if time.time() - status.st_mtime > _CLOCK_SECONDS:
            _CHECKED.add(key)

    def _check_ends(self, bin_path: str) -> None:
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

    def read_document_starts(self, first: int, last: int) -> IntArray:
        """Return the token positions where documents ``first`` to ``last`` start, and the last one's end: read as a file."""
        with open(self.path, "rb") as stream:
            documents = self._entries(stream, self.documents, first, last - first + 1)
            first_sequence, count = int(documents[0]), int(documents[-1] - documents[0])
            offsets = self._entries(stream, self.offsets, first_sequence, count + 1)
        if len(offsets) == count:  # the end of the last sequence isn't stored
            end = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
            offsets = np.append(offsets, end)
        return offsets[documents - first_sequence] // self.dtype.itemsize

    def _entries(self, stream: BinaryIO, block: NDArray[Any], first: int, count: int) -> IntArray:
        """Return up to ``count`` entries of a block, read as a file: mapped pages would count as memory of this process."""
        place = HEADER.size + 12 * len(self.lengths)  # of the document indices
        if block is not self.documents:
            place = HEADER.size + (0 if block is self.lengths else 4 * len(self.lengths))
        stream.seek(place + first * block.itemsize)
        return np.fromfile(stream, block.dtype, min(count, len(block) - first)).astype(np.int64, copy=False)

    def _check_sequences(self, stream: BinaryIO) -> None:
        """Raise ``DataError`` unless each sequence starts where the one before it ends."""
        # Lengths 4, 2, 5 as uint16: offsets 0, 8, 12. The end of the last one is checked against the .bin.
        for first in range(0, len(self.lengths), _BLOCK):
            lengths = self._entries(stream, self.lengths, first, _BLOCK)
            offsets = self._entries(stream, self.offsets, first, _BLOCK + 1)  # one more, where there is one
            if (shortest := int(lengths.min())) < 0:
                number = first + int(lengths.argmin())
                raise DataError(f"{self.path}: sequence {number} has {shortest} tokens; copy or prepare it again")
            ends = (offsets[: len(lengths)] + lengths * self.dtype.itemsize)[: len(offsets) - 1]
            wrong = np.flatnonzero(ends != offsets[1:])
            if wrong.size:
                number = int(wrong[0])
                raise DataError(
                    f"{self.path}: sequence {first + number + 1} starts at byte {offsets[number + 1]} of the .bin, and "
                    f"sequence {first + number} ends at byte {ends[number]}; it is damaged, or lists sequences in another "
                    "order than the .bin: prepare the text again"
                )

    def _check_documents(self, stream: BinaryIO) -> None:
        """Raise ``DataError`` unless the documents are in order."""
        one_each, shifted = len(self.documents) == len(self.lengths) + 1, list[tuple[int, int]]()
        for first in range(0, len(self.documents), _BLOCK):
            documents = self._entries(stream, self.documents, first, _BLOCK + 1)
            wrong = np.flatnonzero(documents[1:] < documents[:-1])
            if wrong.size:
                number = int(wrong[0])
                raise DataError(
                    f"{self.path}: document {first + number + 1} starts at sequence {documents[number + 1]}, before "
                    f"document {first + number} at {documents[number]}; copy or prepare it again"
                )
            if one_each and len(shifted) < 2:
                numbers = np.arange(first, first + min(len(documents), _BLOCK))
                wrong = np.flatnonzero(documents[:_BLOCK] != numbers)[:2]
                shifted += [(first + number, int(documents[number])) for number in wrong.tolist()]
        # Documents may have no sequence or several. One bit that flips in an index of one sequence per document makes
        # one of each, side by side: 0 1 2 3 becomes 0 1 3 3.
        if len(shifted) == 1 and len(self.lengths) >= _FEWEST:
            ((document, sequence),) = shifted
            raise DataError(
                f"{self.path}: document {document} starts at sequence {sequence}, and every other one at the sequence of "
                "its own number; it is damaged: copy or prepare it again"
            )
