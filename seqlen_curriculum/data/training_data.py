"""The samples that each step of a run reads, as a function of the step, for any number of ranks.

Shapes: n requested samples, n * K rows of S tokens (K segments per sample, 1 for other methods).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.data.blend import Blend
from seqlen_curriculum.data.documents import DocumentRows, document_rows
from seqlen_curriculum.data.sample_stream import SampleStream, TokenSpans
from seqlen_curriculum.data.samples import Samples, TokenRanges
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.buckets import Buckets
from seqlen_curriculum.schedule.piecewise import IntArray, Piecewise
from seqlen_curriculum.schedule.timeline import Timeline

__all__ = ["SampleIds", "TrainingData"]


class SampleIds(NamedTuple):
    """Samples of a run, (n,) each: the source, its epoch, and the index of the sample in that epoch, all from 0.

    Indices below ``sources[source].num_samples`` are fresh samples, the others are made of leftovers.
    """

    source: IntArray
    epoch: IntArray
    number: IntArray


class RowSource(Protocol):
    """One source of rows, numbered from 0 in reading order; ``rows`` (n,) ascend."""

    def locate(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return the epoch of each row, and its index in the epoch."""
        ...

    def read(self, rows: IntArray, tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return inputs and targets, both (n, tokens)."""
        ...

    def token_spans(self, rows: IntArray, tokens: int) -> TokenSpans:
        """Return the origin of the first ``tokens`` tokens of each row."""
        ...


class RunData(ABC):
    """The training data of a run from ``sources``, read step by step."""

    sources: Sequence[TokenRanges]
    buckets: Buckets | None = None
    """The pieces of the data by length, if its rows are pieces of documents."""

    def __init__(self, sources: Sequence[TokenRanges], timeline: Timeline) -> None:
        self.sources, self.timeline = list(sources), timeline

    @abstractmethod
    def along(self, timeline: Timeline) -> RunData:
        """Return the same data for another timeline. Both read the same samples while the timelines are equal."""

    @abstractmethod
    def _row_sources(self, step: int) -> Sequence[RowSource]:
        """Return the sources of the rows of ``step``, one per source."""

    @abstractmethod
    def _source_rows(self, step: int, first: int, count: int | None) -> tuple[IntArray, IntArray]:
        """Return the source of each sample, and its row: its index among all samples drawn from that source."""

    def sample_ids(self, step: int, first: int = 0, count: int | None = None) -> SampleIds:
        """Return the samples that ``step`` reads: ``count`` of them, starting with its ``first`` (all by default)."""
        source, rows = self._source_rows(step, first, count)
        epoch, number = np.empty((2, len(rows)), dtype=np.int64)
        for index in np.unique(source).tolist():
            of_source = source == index
            epoch[of_source], number[of_source] = self._row_sources(step)[index].locate(rows[of_source])
        return SampleIds(source, epoch, number)

    def read(self, step: int, first: int = 0, count: int | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return inputs and targets of ``count`` samples of ``step``, starting with its ``first`` (all by default).

        Both are (n * K, S) in the narrowest dtype that holds the tokens of all corpora. ``targets[:, i]`` follows
        ``inputs[:, i]`` in its corpus, even where leftovers are joined.
        """
        source, rows = self._source_rows(step, first, count)
        seqlen, shortening = self.timeline.seqlen(step), self.timeline.shortening
        tokens = shortening.used_tokens_per_sample(seqlen)
        row_sources = self._row_sources(step)
        if len(row_sources) == 1:
            inputs, targets = row_sources[0].read(rows, tokens)
        else:
            dtype = np.result_type(*(samples.dtype for samples in self.sources))
            inputs, targets = np.empty((2, len(rows), tokens), dtype)
            for index in np.unique(source).tolist():
                of_source = source == index
                inputs[of_source], targets[of_source] = row_sources[index].read(rows[of_source], tokens)
        row_tokens = shortening.tokens_per_row(seqlen)
        return inputs.reshape(-1, row_tokens), targets.reshape(-1, row_tokens)  # (n, K * S) -> (n * K, S)

    def token_spans(self, step: int, first: int = 0, count: int | None = None) -> list[tuple[int, TokenSpans]]:
        """Return the origin of the tokens that ``read`` returns: (source, spans) for each source of these samples."""
        source, rows = self._source_rows(step, first, count)
        tokens = self.timeline.shortening.used_tokens_per_sample(self.timeline.seqlen(step))
        by_source = []
        for index in np.unique(source).tolist():
            asked = np.flatnonzero(source == index)
            spans = self._row_sources(step)[index].token_spans(rows[asked], tokens)
            by_source.append((index, spans._replace(row=asked[spans.row])))
        return by_source

    def document_rows(self, step: int) -> DocumentRows:
        """Return the parts of documents in all rows of ``step``, in the order of ``read``."""
        seqlen, shortening = self.timeline.seqlen(step), self.timeline.shortening
        tokens, row_tokens = shortening.used_tokens_per_sample(seqlen), shortening.tokens_per_row(seqlen)
        spans = ((self.sources[source], of_source) for source, of_source in self.token_spans(step))
        return document_rows(spans, self.timeline.samples(step), tokens, row_tokens)

    def _samples_of(self, step: int, first: int, count: int | None, before: int) -> IntArray:
        """Return the numbers of the samples that ``step`` reads if ``before`` samples precede it."""
        step_samples = self.timeline.samples(step)
        count = step_samples - first if count is None else count
        if not 0 <= first <= first + count <= step_samples:
            raise IndexError(f"samples {first}..{first + count} are outside the {step_samples} samples of step {step}")
        return np.arange(before + first, before + first + count, dtype=np.int64)


class TrainingData(RunData):
    """Packed samples: ``sources`` drawn in proportion to ``weights`` (one each, None for a single source).

    With ``recycle`` the unused tokens of shortened samples are read before the next epoch of their source, else they are
    dropped. Can be pickled: a process that unpickles it opens the corpora again.
    """

    sources: Sequence[Samples]

    def __init__(
        self, sources: Sequence[Samples], timeline: Timeline, recycle: bool, weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(sources, timeline)
        self.recycle, self._weights = recycle, weights
        self.blend = Blend([1] if weights is None else weights)
        if len(self.blend.shares) != len(self.sources):
            raise ConfigError(
                f"data.train: {len(self.sources)} sources and {len(self.blend.shares)} weights; give one weight per source"
            )
        used = timeline.tokens_by_sample() if recycle else None
        self._streams = [
            SampleStream(source, None if used is None else self.tokens_by_sample_of(number, used))
            for number, source in enumerate(self.sources)
        ]

    def along(self, timeline: Timeline) -> TrainingData:
        return TrainingData(self.sources, timeline, self.recycle, self._weights)

    def tokens_by_sample_of(self, source: int, used: Piecewise) -> Piecewise:
        """Convert ``used``, tokens by sample of the run, to tokens by sample of ``source``."""
        # Two alternating sources, samples 1 to 5 of the run with 4 tokens and later ones with 8: the first source has three
        # of the five, so its pieces start at samples 1 and 4. A piece without a sample of this source is removed.
        first = self.blend.count(source, used.first_steps - 1) + 1
        drawn = np.append(first[1:] > first[:-1], True)
        return Piecewise(first[drawn], used.values[drawn])

    def _row_sources(self, step: int) -> Sequence[RowSource]:  # noqa: ARG002
        return self._streams

    def _source_rows(self, step: int, first: int, count: int | None) -> tuple[IntArray, IntArray]:
        samples = self._samples_of(step, first, count, self.timeline.consumed_samples(step - 1))
        return self.blend.locate(samples) if len(self._streams) > 1 else (np.zeros_like(samples), samples)
