"""Pacing functions made of others: in coarser lengths, or by a clock that stands still at times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.pacing import Pacing, StepFunction, lengths_by_run
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["Bucketed", "Paused", "bucketed"]


@dataclass(frozen=True)
class Bucketed(StepFunction):
    """Every length of ``inner`` down to a multiple of ``bucket``, as ``difficulty_step`` rounds those of a ramp.

    Never below ``inner.lowest`` rounded up to a multiple; ``inner.highest`` stays as it is even where it is none.
    """

    inner: Pacing
    bucket: int

    @property
    def settles_at(self) -> int | None:
        return self.inner.settles_at

    @property
    def lowest(self) -> int:
        return min(-(-self.inner.lowest // self.bucket) * self.bucket, self.highest)

    @property
    def highest(self) -> int:
        return self.inner.highest

    def _lengths(self, steps: IntArray) -> IntArray:
        return self._rounded(self.inner(steps))

    def _rounded(self, lengths: IntArray) -> IntArray:
        down = np.maximum(lengths - lengths % self.bucket, self.lowest)
        return np.where(lengths == self.highest, self.highest, down)

    def changes(self, last_step: int) -> tuple[IntArray, IntArray]:
        first_steps, lengths = self.inner.changes(last_step)
        return lengths_by_run(first_steps, self._rounded(lengths))


@dataclass(frozen=True)
class Paused(StepFunction):
    """``inner`` by a clock that stands still for ``interval`` steps after each step of ``held``, which are as far apart."""

    inner: Pacing
    held: tuple[int, ...]
    interval: int

    @property
    def settles_at(self) -> int | None:
        settles = self.inner.settles_at
        return None if settles is None else int(self._at_clock(np.asarray([settles], np.int64))[0])

    @property
    def lowest(self) -> int:
        return self.inner.lowest

    @property
    def highest(self) -> int:
        return self.inner.highest

    def clock(self, steps: IntArray) -> IntArray:
        """Which of the steps of ``inner`` each step is."""
        waited = np.clip(steps[:, None] - np.asarray(self.held, np.int64), 0, self.interval).sum(axis=1)
        return np.asarray(steps - waited, np.int64)

    def _at_clock(self, times: IntArray) -> IntArray:
        """The first step at which the clock shows each of ``times``."""
        before = np.searchsorted(self.clock(np.asarray(self.held, np.int64)), times, side="left")
        return np.asarray(times + self.interval * before, np.int64)

    def _lengths(self, steps: IntArray) -> IntArray:
        return self.inner(self.clock(steps))

    def changes(self, last_step: int) -> tuple[IntArray, IntArray]:
        first_steps, lengths = self.inner.changes(last_step)
        return self._at_clock(first_steps), lengths


def bucketed(pacing: Pacing, bucket: int | None) -> Pacing:
    """``pacing`` in lengths that are multiples of ``bucket``; as it is for None. ConfigError if there are none."""
    if bucket is None:
        return pacing
    if bucket > pacing.highest:
        raise ConfigError(f"training.seqlen_bucket: {bucket} is above the longest length {pacing.highest}; lower it")
    lowest = -(-pacing.lowest // bucket) * bucket
    if lowest > pacing.highest > pacing.lowest:
        raise ConfigError(
            f"training.seqlen_bucket: {bucket} lifts the shortest length {pacing.lowest} to {lowest}, above the longest "
            f"{pacing.highest}; lower it"
        )
    return Bucketed(pacing, bucket)
