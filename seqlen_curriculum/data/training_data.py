"""What each step of a run reads: a function of the step, on any number of ranks.

Shapes: n samples asked for, n * K rows of S tokens (K segments of a sample, 1 for other methods).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.data.blend import Blend
from seqlen_curriculum.data.sample_stream import SampleStream, TokenSpans
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.piecewise import IntArray, Piecewise
from seqlen_curriculum.schedule.timeline import Timeline

__all__ = ["SampleIds", "TrainingData"]


class SampleIds(NamedTuple):
    """Which samples were asked for, (n,) each: of which source, in which of its epochs, its place there.

    IntArray below ``sources[source].num_samples`` are fresh samples, those above are made of leftovers.
    """

    source: IntArray
    epoch: IntArray
    number: IntArray


class TrainingData:
    """The training data of a run: ``sources``, drawn in proportion to ``weights`` (one each; None for a single source).

    ``recycle`` reads what cuts leave over before the next epoch of a source begins; else it is dropped.
    """

    def __init__(
        self, sources: Sequence[Samples], timeline: Timeline, recycle: bool, weights: Sequence[float] | None = None
    ) -> None:
        self.sources, self.timeline, self.recycle = list(sources), timeline, recycle
        self._weights = weights
        self.blend = Blend([1] if weights is None else weights)
        if len(self.blend.shares) != len(self.sources):
            raise ConfigError(
                f"data.train: {len(self.sources)} sources and {len(self.blend.shares)} weights; give each one"
            )
        used = timeline.tokens_by_sample()
        self._streams = [
            SampleStream(source, self.of_source(number, used) if recycle else None)
            for number, source in enumerate(self.sources)
        ]

    def along(self, timeline: Timeline) -> TrainingData:
        """The same data along another timeline: they read the same as long as these are equal."""
        return TrainingData(self.sources, timeline, self.recycle, self._weights)

    def of_source(self, number: int, used: Piecewise) -> Piecewise:
        """``used`` by the samples of one source."""
        first = self.blend.count(number, used.first_steps - 1) + 1
        some = np.append(first[1:] > first[:-1], True)  # pieces too short for a sample of this source fall away
        return Piecewise(first[some], used.values[some])

    def places(self, step: int, first: int = 0, count: int | None = None) -> SampleIds:
        """``count`` samples of ``step`` from its ``first`` on (all of them by default)."""
        source, rows = self._rows(step, first, count)
        epoch, number = np.empty((2, len(rows)), dtype=np.int64)
        for one in np.unique(source).tolist():
            of = source == one
            epoch[of], number[of] = self._streams[one].place(rows[of])
        return SampleIds(source, epoch, number)

    def read(self, step: int, first: int = 0, count: int | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """Inputs and targets, both (n * K, S) as stored, of ``count`` samples of ``step`` from its ``first`` on.

        ``targets[:, i]`` follows ``inputs[:, i]`` in its corpus, across the seams of leftovers too.
        """
        source, rows = self._rows(step, first, count)
        seqlen = self.timeline.seqlen(step)
        tokens, row_tokens = (
            self.timeline.shortening.used_tokens_per_sample(seqlen),
            self.timeline.shortening.tokens_per_row(seqlen),
        )
        if len(self._streams) == 1:
            inputs, targets = self._streams[0].read(rows, tokens)
        else:
            dtype = np.result_type(*(samples.dtype for samples in self.sources))
            inputs, targets = np.empty((2, len(rows), tokens), dtype)
            for one in np.unique(source).tolist():
                of = source == one
                inputs[of], targets[of] = self._streams[one].read(rows[of], tokens)
        return inputs.reshape(-1, row_tokens), targets.reshape(-1, row_tokens)

    def token_spans(self, step: int, first: int = 0, count: int | None = None) -> list[tuple[int, TokenSpans]]:
        """Where ``read`` finds the tokens of each sample: (source, token_spans of it) for each source of these samples."""
        source, rows = self._rows(step, first, count)
        tokens = self.timeline.shortening.used_tokens_per_sample(self.timeline.seqlen(step))
        found = []
        for one in np.unique(source).tolist():
            asked = np.flatnonzero(source == one)
            parts = self._streams[one].token_spans(rows[asked], tokens)
            found.append((one, parts._replace(row=asked[parts.row])))
        return found

    def _rows(self, step: int, first: int, count: int | None) -> tuple[IntArray, IntArray]:
        """The source of each sample, and its number among those of that source since the run began."""
        of_step = self.timeline.samples(step)
        count = of_step - first if count is None else count
        if not 0 <= first <= first + count <= of_step:
            raise IndexError(f"samples {first}..{first + count} are outside the {of_step} of step {step}")
        begin = self.timeline.consumed_samples(step - 1) + first
        samples = np.arange(begin, begin + count, dtype=np.int64)
        return self.blend.place(samples) if len(self._streams) > 1 else (np.zeros_like(samples), samples)
