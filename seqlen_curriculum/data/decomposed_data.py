"""The pieces of documents that each step of a run reads, as a function of the step, for any number of ranks.

Every source has the pieces of each length in an order of its own. A step at length s takes the next rows of the bucket of s.
When all pieces of a bucket have been read, its next epoch starts in a new order, also within a step. So every piece of a
bucket is read once before any is read again, under every schedule.

Shapes: K buckets, n requested rows of S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.data.permutation import permute
from seqlen_curriculum.data.pieces import Pieces
from seqlen_curriculum.data.sample_stream import TokenSpans
from seqlen_curriculum.data.samples import TokenRanges
from seqlen_curriculum.data.training_data import RowSource, RunData
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.schedule.buckets import Buckets, SourceBuckets
from seqlen_curriculum.schedule.piecewise import IntArray
from seqlen_curriculum.schedule.row_shares import RowShares
from seqlen_curriculum.schedule.timeline import Timeline

__all__ = ["DecomposedData", "buckets_of", "source_name"]


class _Bucket:
    """The rows that a run reads from one bucket of ``pieces``, numbered from 0."""

    def __init__(self, pieces: Pieces, bucket: int) -> None:
        self._pieces, self._bucket, self._count = pieces, bucket, int(pieces.counts[bucket])

    def locate(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return the epoch of each of ``rows`` (n,) and its index in the epoch, (n,) both."""
        return rows // self._count, rows % self._count

    def _locate(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        epoch, number = self.locate(rows)
        return self._pieces.locate(self._bucket, permute(number, self._count, self._pieces.seed, epoch))

    def read(self, rows: IntArray, tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return inputs and targets of ``rows`` (n,), both (n, tokens) in the corpora's dtype."""
        block = self._pieces.gather(*self._locate(rows), tokens + 1)
        return block[:, :-1], block[:, 1:]

    def token_spans(self, rows: IntArray, tokens: int) -> TokenSpans:
        """Return the origin of the tokens of ``rows`` (n,)."""
        zero = np.zeros_like(rows)
        return TokenSpans(np.arange(len(rows)), zero, zero + tokens, *self._locate(rows))


class DecomposedData(RunData):
    """The training data of a run whose rows are pieces of documents; ``buckets`` are those of ``buckets_of(sources)``.

    A source's share of the rows of a bucket is its weight times the part of its tokens that are in the bucket. Raises
    DataError for a length of the run without pieces.
    """

    sources: Sequence[Pieces]
    buckets: Buckets

    def __init__(self, sources: Sequence[Pieces], timeline: Timeline, buckets: Buckets) -> None:
        super().__init__(sources, timeline)
        self.buckets = buckets
        numbers = {length: number for number, length in enumerate(buckets.lengths)}
        used = timeline.lengths()
        for length in used:
            if not any(source.counts[numbers[length]] for source in sources):
                names = ", ".join(source.name for source in buckets.sources)
                raise DataError(
                    f"curriculum_learning: the run has steps of {length} tokens, and no document of {names} has a piece of "
                    "that length; leave the length out of the schedule, or prepare other documents"
                )
        self._rows = {length: RowShares(buckets.row_weights(numbers[length])) for length in used}
        self._of_length = {length: [_Bucket(pieces, numbers[length]) for pieces in sources] for length in used}

    def along(self, timeline: Timeline) -> DecomposedData:
        """Return the same data for another timeline. Both read the same pieces while the timelines are equal."""
        return DecomposedData(self.sources, timeline, self.buckets)

    def _row_sources(self, step: int) -> Sequence[RowSource]:
        return self._of_length[self.timeline.seqlen(step)]

    def _source_rows(self, step: int, first: int, count: int | None) -> tuple[IntArray, IntArray]:
        seqlen = self.timeline.seqlen(step)
        rows = self._samples_of(step, first, count, self.timeline.samples_at(seqlen, step - 1))
        return self._rows[seqlen].locate(rows)


def buckets_of(sources: Sequence[Pieces], weights: Sequence[float] | None) -> Buckets:
    """Return the numbers of pieces of ``sources`` that a run's plan needs."""
    return Buckets(
        sources[0].lengths,
        tuple(
            SourceBuckets(source_name(source), weight, tuple(source.counts.tolist()), source.dropped_tokens)
            for source, weight in zip(sources, weights or [1.0], strict=True)
        ),
    )


def source_name(source: TokenRanges) -> str:
    """Return the first corpus of a source, and how many others it has."""
    prefix, further = source.ranges[0][0].prefix, len(source.ranges) - 1
    return f"{prefix} and {further} more" if further else prefix
