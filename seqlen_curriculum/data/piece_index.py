"""Find the pieces of a corpus whose documents are cut into lengths that are powers of two.

The targets of document d are the tokens ``[start, end)`` of the corpus, except for the first token of the corpus, which has
no input. Its n targets are cut by the binary form of n: with a longest length of 8, n = 21 = 8 + 8 + 4 + 1 gives pieces at
offsets 0, 8, 16 and 20. So a document has ``n // longest`` of the longest pieces, and one of each shorter length whose bit
is set in n. The index stores, for each length, the pieces before every 32nd document; the documents between are cut again
when they are read. 100 million documents take 8 bytes x 3.1 million per length.

Shapes: D documents, P powers of two from 1 to the longest piece, B blocks of 32 documents, n requested pieces.
"""

from __future__ import annotations

import hashlib
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.files import replace
from seqlen_curriculum.schedule.piecewise import IntArray, ceil_div

__all__ = ["PieceIndex"]

_VERSION = 1
_BLOCK = 32  # documents
_CHUNK = 2**14  # blocks that are counted at a time: a million documents
_SAMPLED = 64  # places of the index whose documents are part of the fingerprint
_SAMPLE = 256  # documents at each of them
_HEADER = 2  # int64 in front of the counts: the fingerprint


class PieceIndex:
    """The pieces of ``corpus`` of up to ``longest`` tokens, a power of two; the piece of a length by its number.

    The counts are read from a file beside the corpus, or in the folder for caches where that can't be written. A file that
    is missing, or of another corpus, is made first.
    """

    def __init__(self, corpus: IndexedCorpus, longest: int) -> None:
        self.corpus, self.longest = corpus, longest
        self.powers = longest.bit_length()
        self._before = _open(corpus, longest)  # (P, B + 1) pieces before each block

    def __reduce__(self) -> tuple[type[PieceIndex], tuple[IndexedCorpus, int]]:
        return PieceIndex, (self.corpus, self.longest)  # the map of the file is opened again

    def before(self, document: int) -> IntArray:
        """Return the pieces of each length in the documents before ``document``, (P,)."""
        block = document // _BLOCK
        lengths = np.diff(_target_bounds(self.corpus, np.arange(block * _BLOCK, document + 1)))
        partial = [int(_pieces(lengths, power, self.longest).sum()) for power in range(self.powers)]
        return np.asarray(self._before[:, block]) + np.array(partial, np.int64)

    def locate(self, power: int, numbers: IntArray) -> IntArray:
        """Return the position of the first target of the pieces ``numbers`` (n,) of ``2**power`` tokens, (n,).

        Raises DataError if the index doesn't match the documents.
        """
        blocks = np.searchsorted(self._before[power], numbers, side="right") - 1
        number = numbers - self._before[power, blocks]  # within the block
        documents = np.minimum(blocks[:, None] * _BLOCK + np.arange(_BLOCK + 1), self.corpus.num_documents)
        bounds = _target_bounds(self.corpus, documents)  # (n, 33)
        lengths = np.diff(bounds, axis=1)
        ends = np.cumsum(_pieces(lengths, power, self.longest), axis=1)  # (n, 32)
        if (ends[:, -1] != self._before[power, blocks + 1] - self._before[power, blocks]).any():
            raise DataError(
                f"{_paths(self.corpus, self.longest)[0]}: is not the index of {self.corpus.prefix}, or the corpus changed "
                "while it was read; delete this file, which is made again"
            )
        row = np.arange(len(numbers))
        found = (ends <= number[:, None]).sum(axis=1)  # the first document that ends after the piece
        length = lengths[row, found]
        # Pieces of the longest length follow one another from the start. A shorter one follows all longer ones: the bits of
        # n above its own.
        nth = number - np.where(found > 0, ends[row, found - 1], 0)
        offset = nth * self.longest if 1 << power == self.longest else length >> (power + 1) << (power + 1)
        position: IntArray = bounds[row, found] + offset
        return position


def _pieces(lengths: IntArray, power: int, longest: int) -> IntArray:
    """Return the pieces of ``2**power`` tokens in documents of ``lengths`` target tokens."""
    return lengths >> power if 1 << power == longest else lengths >> power & 1


def _target_bounds(corpus: IndexedCorpus, documents: IntArray) -> IntArray:
    """Return where the targets of ``documents`` start: where the documents start, but not at the first token."""
    return np.maximum(corpus.starts_of(documents), 1)


def _open(corpus: IndexedCorpus, longest: int) -> IntArray:
    """Return the counts of the index, (P, B + 1), from its file if possible."""
    fingerprint, powers = _fingerprint(corpus, longest), longest.bit_length()
    size = _HEADER + powers * (ceil_div(corpus.num_documents, _BLOCK) + 1)
    for path in _paths(corpus, longest):
        try:
            stored = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            stored = None
        is_index = stored is not None and stored.dtype == np.int64 and stored.shape == (size,)
        if stored is not None and is_index and np.array_equal(stored[:_HEADER], fingerprint):
            return np.asarray(stored[_HEADER:].reshape(powers, -1))
        if os.path.lexists(path):
            _say(f"{path}: is not the index of this corpus; it is made again")
    counts = _count(corpus, longest)
    for path in _paths(corpus, longest):
        if _write(path, np.concatenate([fingerprint, counts.ravel()])):
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            return np.asarray(mapped[_HEADER:].reshape(powers, -1))
    return counts


def _paths(corpus: IndexedCorpus, longest: int) -> list[Path]:
    """Return the places of the index, in order: beside the corpus, and in the folder for caches of this user."""
    name = f"pieces{longest}.npy"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqlen-curriculum"
    place = hashlib.blake2b(os.path.realpath(corpus.prefix).encode(), digest_size=8).hexdigest()
    return [Path(f"{corpus.prefix}.{name}"), cache / f"{Path(corpus.prefix).name}.{place}.{name}"]


def _write(path: Path, content: IntArray) -> bool:
    """Write the file ``path`` whole or not at all; return whether it could be written."""

    def write(unfinished: Path) -> None:
        with unfinished.open("wb") as stream:  # given a name, numpy would append .npy to it
            np.save(stream, content)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, write)
    except OSError:
        return False
    return True


def _count(corpus: IndexedCorpus, longest: int) -> IntArray:
    """Return the pieces of each length before each block of documents, (P, B + 1)."""
    powers, blocks = longest.bit_length(), ceil_div(corpus.num_documents, _BLOCK)
    before = np.zeros((powers, blocks + 1), np.int64)
    for first in range(0, blocks, _CHUNK):
        last = min(first + _CHUNK, blocks)
        starts = corpus.index.read_document_starts(first * _BLOCK, min(last * _BLOCK, corpus.num_documents))
        lengths = np.zeros((last - first) * _BLOCK, np.int64)
        lengths[: len(starts) - 1] = np.diff(np.maximum(starts, 1))
        for power in range(powers):
            of_blocks = _pieces(lengths, power, longest).reshape(-1, _BLOCK).sum(axis=1)
            before[power, first + 1 : last + 1] = before[power, first] + np.cumsum(of_blocks)
    return before


def _fingerprint(corpus: IndexedCorpus, longest: int) -> IntArray:
    """Return 16 bytes that identify the corpus, the longest piece and the format, as two integers, in constant time."""
    digest = hashlib.blake2b(f"{_VERSION} {_BLOCK} {longest} {corpus.fingerprint()}".encode(), digest_size=16)
    first = np.linspace(0, corpus.num_documents, _SAMPLED, dtype=np.int64)
    documents = np.minimum(first[:, None] + np.arange(_SAMPLE), corpus.num_documents)
    digest.update(corpus.starts_of(documents).tobytes())
    return np.frombuffer(digest.digest(), np.int64)


@lru_cache  # once per process
def _say(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
