"""The length of each step of a run whose rows are pieces of documents, drawn from buckets of equal lengths.

Source: Pouransari et al., "Dataset Decomposition: Faster LLM Training with Variable Sequence Length Curriculum", NeurIPS
2024. The paper draws the bucket of a step at random. Here the draws are spread evenly, so that the buckets' shares are right
in every part of a run, and the length of a step follows from its number.

Shapes: K buckets, shortest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.pacing import StepFunction
from seqlen_curriculum.schedule.piecewise import IntArray, lengths_by_run

__all__ = ["Buckets", "Listed", "SourceBuckets", "draw_lengths"]

_MOST_STEPS = 2**22
"""Steps whose lengths are listed, which takes a second."""


@dataclass(frozen=True)
class SourceBuckets:
    """The pieces of one source of training data."""

    name: str
    weight: float
    """The weight of the source in the blend; 1 for a single source."""
    pieces: tuple[int, ...]
    """The number of pieces of each length, (K,)."""
    dropped_tokens: int
    """Tokens in pieces shorter than the shortest length, which are never trained on."""


@dataclass(frozen=True)
class Buckets:
    """The pieces of the training data by length, counted in target tokens."""

    lengths: tuple[int, ...]
    """Tokens of a piece of each bucket: ascending powers of two, (K,)."""
    sources: tuple[SourceBuckets, ...]

    def tokens(self, source: SourceBuckets) -> int:
        """Return the tokens that an epoch of ``source`` trains on."""
        return sum(length * pieces for length, pieces in zip(self.lengths, source.pieces, strict=True))

    def row_weights(self, bucket: int) -> list[Fraction]:
        """Return the weight of each source among the rows of ``bucket``; 0 for a source without such pieces."""
        # Source a has 100 tokens, 4 pieces of 8; source b 50 tokens, 1 piece of 8; equal weights. Equal shares of the
        # run's tokens are 4/100 and 1/50 pieces of 8 per token: 2 rows of a for each row of b.
        return [
            Fraction(str(source.weight)) * Fraction(source.pieces[bucket], self.tokens(source))
            for source in self.sources
        ]

    def shares(self) -> list[float]:
        """Return the share of each bucket in the tokens of a run that draws pieces in proportion to tokens, (K,)."""
        tokens = [length * sum(self.row_weights(bucket)) for bucket, length in enumerate(self.lengths)]
        return [float(part / sum(tokens)) for part in tokens]


@dataclass(frozen=True, eq=False)
class Listed(StepFunction):
    """``lengths[i]`` from step ``first_steps[i]`` (increasing from 1) until the next one; the last length has no end."""

    first_steps: IntArray
    lengths: IntArray

    @property
    def settles_at(self) -> int:
        return int(self.first_steps[-1])

    @property
    def lowest(self) -> int:
        return int(self.lengths.min())

    @property
    def highest(self) -> int:
        return int(self.lengths.max())

    def _lengths(self, steps: IntArray) -> IntArray:
        found: IntArray = self.lengths[np.maximum(np.searchsorted(self.first_steps, steps, side="right") - 1, 0)]
        return found

    def changes(self, last_step: int) -> tuple[IntArray, IntArray]:
        kept = max(int(np.searchsorted(self.first_steps, last_step, side="right")), 1)
        return self.first_steps[:kept], self.lengths[:kept]


def draw_lengths(buckets: Buckets, steps: int, cycles: int = 1, odds: Sequence[float] | None = None) -> Listed:
    """Return the lengths of a run of ``steps`` steps with the same number of tokens each.

    Without ``odds`` each bucket has its share of the tokens in every part of the run. With ``odds`` (K,) the steps of each
    of ``cycles`` equal parts of the run are reordered: while a bucket has steps left in its part, it is drawn in proportion
    to its odds. Raises ConfigError for too many steps.
    """
    if steps > _MOST_STEPS:
        raise ConfigError(
            f'training.train_tokens: takes {steps:,} steps, and data.order "decomposed" lists the length of each, at most '
            f"{_MOST_STEPS:,}; raise train_batch_size"
        )
    shares = np.array(buckets.shares())
    # A few draws too many of each bucket: the first ``steps`` draws are then those of an endless run.
    counts = np.where(shares > 0, np.ceil(shares * (steps + len(shares))) + 1, 0).astype(np.int64)
    drawn = _spread(counts, shares)[:steps]
    if odds is not None:
        bounds = np.arange(min(cycles, steps) + 1) * steps // min(cycles, steps)
        parts = [drawn[begin:end] for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
        of_part = (np.bincount(part, minlength=len(shares)).astype(np.int64) for part in parts)
        drawn = np.concatenate([_spread(counts, np.array(odds)) for counts in of_part])
    lengths = np.asarray(buckets.lengths, np.int64)[drawn]
    return Listed(*lengths_by_run(np.arange(1, steps + 1), lengths))


def _spread(counts: IntArray, rates: NDArray[np.float64]) -> IntArray:
    """Return bucket k ``counts[k]`` times, in an order in which buckets that have some left appear at their ``rates``."""
    # Draw j of a bucket with rate r is at time (j + 1/2) / r. Three draws at rate 2 and two at rate 1 are at 1/4, 3/4, 5/4
    # and 1/2, 3/2: 0 1 0 0 1. Quotients of floats are the same on every machine, and so is the order.
    bucket = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(bucket)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.lexsort((bucket, (number + 0.5) / rates[bucket]))
    spread: IntArray = bucket[order]
    return spread
