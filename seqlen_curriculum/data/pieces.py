"""The pieces of one split of a list of corpora: parts of single documents whose lengths are powers of two.

A piece of s tokens has s targets, neighbouring tokens of one document, and as inputs the tokens before them. The first token
of a document is predicted from the end token before it, which is the same for all documents, so a row holds tokens of one
document and every token is a target of exactly one piece. The first token of a corpus has no input, so it is not a target.

Shapes: K lengths, shortest first, R ranges of documents, n requested pieces.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.piece_index import PieceIndex
from seqlen_curriculum.data.samples import TokenRanges
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["Pieces", "check_document_ends"]

_CHECKED_ENDS = 2**10  # documents, evenly spaced


class Pieces(TokenRanges):
    """The pieces of ``lengths`` tokens (K,), ascending powers of two, in ranges ``(corpus, first document, end)``.

    ``counts`` (K,) are the pieces of each length, ``num_tokens`` their tokens, and ``dropped_tokens`` those in shorter
    pieces. Raises DataError for a corpus whose documents don't end with the same token, and without pieces.
    """

    def __init__(
        self,
        documents: Sequence[tuple[IndexedCorpus, int, int]],
        lengths: Sequence[int],
        seed: int,
        vocab_size: int | None = None,
    ) -> None:
        ranges = [
            (corpus, corpus.document_start(first), corpus.document_start(end)) for corpus, first, end in documents
        ]
        super().__init__(ranges, lengths[-1], seed, vocab_size)
        self.lengths = tuple(lengths)
        for corpus, _, _ in ranges:
            check_document_ends(corpus)
        self._first_power = lengths[0].bit_length() - 1
        self._indexes = [PieceIndex(corpus, lengths[-1]) for corpus, _, _ in documents]
        before = [index.before(first) for index, (_, first, _) in zip(self._indexes, documents, strict=True)]
        end = [index.before(end) for index, (_, _, end) in zip(self._indexes, documents, strict=True)]
        self._before = np.stack(before)  # (R, all powers) pieces in front of the range
        counts = np.stack(end) - self._before
        tokens = counts.sum(axis=0) << np.arange(counts.shape[1])
        self.dropped_tokens = int(tokens[: self._first_power].sum())
        self.num_tokens = int(tokens[self._first_power :].sum())
        self.counts = counts.sum(axis=0)[self._first_power :]
        self.num_samples = int(self.counts.sum())
        self._bounds = np.cumsum(np.vstack([np.zeros_like(counts[:1]), counts]), axis=0)  # (R + 1, all powers)
        if not self.num_samples:
            names = ", ".join(corpus.prefix for corpus, _, _ in ranges)
            raise DataError(
                f"data.min_piece_tokens: no document of {names} has a piece of {lengths[0]} or more tokens in this split "
                f"({self.dropped_tokens} tokens in shorter ones); lower it, or prepare longer documents"
            )

    def locate(self, bucket: int, ids: IntArray) -> tuple[IntArray, IntArray]:
        """Return the range and the position of the first input of the pieces ``ids`` (n,) of ``bucket``, (n,) both."""
        power = self._first_power + bucket
        bounds = self._bounds[:, power]
        if ids.size and not 0 <= ids.min() <= ids.max() < bounds[-1]:
            raise IndexError(f"pieces {ids.min()}..{ids.max()} are outside 0..{bounds[-1] - 1}")
        range_index = np.searchsorted(bounds, ids, side="right") - 1
        starts = np.empty_like(ids)
        for index in np.unique(range_index).tolist():
            chosen = range_index == index
            numbers = ids[chosen] - bounds[index] + self._before[index, power]
            starts[chosen] = self._indexes[index].locate(power, numbers) - 1
        return range_index, starts


def check_document_ends(
    corpus: IndexedCorpus, setting: str = 'data.order "decomposed"', off: str = 'data.order to "packed"'
) -> None:
    """Raise DataError unless documents of ``corpus`` end with the same token; checks up to 1,024 of them.

    ``setting`` needs it, for the message, and setting ``off`` turns it off.
    """
    count = corpus.num_documents
    documents = np.unique(np.linspace(1, count, _CHECKED_ENDS, dtype=np.int64))
    # Read as files: a page that is read through a memory map may map 2 MiB around it, which count as memory of the process.
    starts = [int(corpus.index.read_document_starts(document, document)[0]) for document in documents.tolist()]
    ends = np.unique(starts) - 1
    ends = ends[ends >= 0]  # empty documents at the start have no end token
    size = corpus.dtype.itemsize
    with open(f"{corpus.prefix}.bin", "rb") as stream:
        tokens = np.frombuffer(
            b"".join(os.pread(stream.fileno(), size, size * end) for end in ends.tolist()), corpus.dtype
        )
    fix = (
        f"{setting} needs documents that end with one token, the same for all; prepare the text with slw prepare and its "
        f"end token, or set {off}"
    )
    if len(ends) < 2:
        raise DataError(f"{corpus.prefix}: has one document, so where documents end isn't known; {fix}")
    other = np.flatnonzero(tokens != tokens[0])
    if other.size:
        at = int(other[0])
        raise DataError(
            f"{corpus.prefix}: a document ends with id {tokens[0]} at token {ends[0]}, and another one with id {tokens[at]} "
            f"at token {ends[at]}; {fix}"
        )
