"""The number of samples in each step over all ranks: constant, warmed up, or increased at short lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from pydantic import model_validator

from seqlen_curriculum.fields import Count, Section
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp
from seqlen_curriculum.schedule.piecewise import IntArray, Periodic, Piecewise

__all__ = [
    "BatchGrowth",
    "BatchGrowthKeys",
    "GlobalBatch",
    "least_tokens",
    "most_tokens",
    "samples_by_step",
]

_MULTIPLES = np.unique(
    [count << power for power in range(60) for count in (1, 3)]
)  # 1, 2, 3, 4, 6, 8, 12, ..., to 2^60


@dataclass(frozen=True)
class BatchGrowth:
    """More samples at short lengths, so that every step has at least ``min_tokens`` target tokens. Not in the paper.

    A step has 1, 2, 3, 4, 6, 8, 12, 16, ... times ``final`` samples: the smallest of these multiples that is enough. A
    number of ranks that divides ``final`` therefore divides the samples of every step.
    """

    final: int
    """Samples of a step that needs no growth, as at full length: ``train_batch_size``."""
    min_tokens: int

    def samples(self, used: IntArray) -> IntArray:
        """Return the samples of steps that train on ``used`` tokens of each sample."""
        # 4 samples of 8 tokens are 32 tokens, so 100 tokens need 4 times as many samples, 128 tokens. A multiple of 5 is
        # raised to 6 and 9 to 12, at most half more than needed. Otherwise 1 sample per rank times a prime, 19, would be
        # 19 rows, which only divide into micro-batches of 1 row.
        needed = -(-self.min_tokens // (self.final * used))
        return self.final * _MULTIPLES[np.searchsorted(_MULTIPLES, needed)]


GlobalBatch: TypeAlias = int | BatchSizeRamp | BatchGrowth
"""The samples of each step over all ranks."""


class BatchGrowthKeys(Section):
    """The keys of ``curriculum_learning`` that give short steps more samples."""

    batch_growth: bool = False
    """Give a short step more samples, so that it has at least ``min_tokens_per_step``. Not in the paper."""
    min_tokens_per_step: Count | None = None
    """Only with ``batch_growth``: the fewest target tokens of a step over all ranks. At most ``train_batch_size`` times the
    longest length, so that the longest steps have ``train_batch_size`` samples."""

    @model_validator(mode="after")
    def _growth_has_its_floor(self) -> BatchGrowthKeys:
        if self.batch_growth and self.min_tokens_per_step is None:
            raise ValueError(
                "min_tokens_per_step: required by batch_growth true, but not given; give the fewest target tokens of a step "
                "over all ranks"
            )
        if self.min_tokens_per_step is not None and not self.batch_growth:
            raise ValueError(
                f"min_tokens_per_step: {self.min_tokens_per_step} needs batch_growth true; set it, or remove "
                "min_tokens_per_step"
            )
        return self

    def global_batch(self, train_batch_size: int) -> int | BatchGrowth:
        """Return the rule for the samples of a step: a constant ``train_batch_size``, or its growth at short lengths."""
        return BatchGrowth(train_batch_size, self.min_tokens_per_step) if self.min_tokens_per_step else train_batch_size


def samples_by_step(batch: GlobalBatch, used: Piecewise | Periodic, train_tokens: int) -> Piecewise | Periodic:
    """Return the samples of each step of a run that trains on ``used`` tokens of each sample, up to ``train_tokens``."""
    if isinstance(batch, BatchGrowth):
        return used.map(batch.samples)
    return Piecewise.constant(batch) if isinstance(batch, int) else batch.by_step(used, train_tokens)


def least_tokens(batch: GlobalBatch, used: int) -> int:
    """Return a lower bound for the tokens of a step in which every sample uses at least ``used`` tokens."""
    if isinstance(batch, BatchGrowth):
        return max(batch.final * used, batch.min_tokens)
    return used * (batch if isinstance(batch, int) else batch.start)


def most_tokens(batch: GlobalBatch, used: int) -> int:
    """Return an upper bound for the tokens of a step in which no sample uses more than ``used`` tokens."""
    if isinstance(batch, BatchGrowth):
        # Rounded up to whole batches, and then to a multiple that is at most 1.5 times as large.
        return 2 * (batch.final * used + batch.min_tokens)
    return used * (batch if isinstance(batch, int) else batch.final)
