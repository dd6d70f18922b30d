"""Pacing functions that wrap another one: lengths rounded to a bucket or to listed lengths, and a ramp with pauses."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.pacing import Pacing, StepFunction, lengths_by_run
from seqlen_curriculum.schedule.piecewise import IntArray, ceil_div

__all__ = ["Bucketed", "Paused", "RoundedDown", "Rounding", "bucketed"]

Rounding: TypeAlias = int | tuple[int, ...] | None
"""Lengths are rounded down to a multiple of a number, or to one of the listed lengths (ascending); None: not rounded."""


@dataclass(frozen=True)
class _Rounded(StepFunction):
    """``inner`` with every length rounded."""

    inner: Pacing

    @abstractmethod
    def _rounded(self, lengths: IntArray) -> IntArray:
        """Return the rounded ``lengths``, (n,) to (n,)."""

    @property
    def settles_at(self) -> int | None:
        return self.inner.settles_at

    @property
    def period(self) -> int | None:
        return self.inner.period

    def _lengths(self, steps: IntArray) -> IntArray:
        return self._rounded(self.inner(steps))

    def changes(self, last_step: int) -> tuple[IntArray, IntArray]:
        first_steps, lengths = self.inner.changes(last_step)
        return lengths_by_run(first_steps, self._rounded(lengths))


@dataclass(frozen=True)
class Bucketed(_Rounded):
    """``inner`` with every length rounded down to a multiple of ``bucket``, as ``difficulty_step`` does for a ramp.

    No length is below ``inner.lowest`` rounded up to a multiple. ``inner.highest`` stays even if it is not a multiple.
    """

    bucket: int

    @property
    def lowest(self) -> int:
        return min(ceil_div(self.inner.lowest, self.bucket) * self.bucket, self.highest)

    @property
    def highest(self) -> int:
        return self.inner.highest

    def _length(self, step: int) -> int:
        lowest, highest = self._bounds
        length = self.inner(step)
        return length if length == highest else max(length - length % self.bucket, lowest)

    @cached_property
    def _bounds(self) -> tuple[int, int]:
        return self.lowest, self.highest

    def _rounded(self, lengths: IntArray) -> IntArray:
        # Lengths 8 to 100 in buckets of 64: 8 -> 64 (lowest), 70 -> 64, 99 -> 64, and the longest, 100, stays 100.
        down = np.maximum(lengths - lengths % self.bucket, self.lowest)
        return np.where(lengths == self.highest, self.highest, down)


@dataclass(frozen=True)
class RoundedDown(_Rounded):
    """``inner`` with every length rounded down to one of ``allowed`` (ascending), and shorter lengths to the first."""

    allowed: tuple[int, ...]

    @property
    def lowest(self) -> int:
        return int(self._rounded(np.array([self.inner.lowest]))[0])

    @property
    def highest(self) -> int:
        return int(self._rounded(np.array([self.inner.highest]))[0])

    def _rounded(self, lengths: IntArray) -> IntArray:
        allowed = np.asarray(self.allowed, np.int64)
        rounded: IntArray = allowed[np.maximum(np.searchsorted(allowed, lengths, side="right") - 1, 0)]
        return rounded


@dataclass(frozen=True)
class Paused(StepFunction):
    """``inner`` paused for ``interval`` steps after each step in ``held``, which are at least ``interval`` apart.

    With ``held`` (2,) and ``interval`` 3, steps 1 to 7 have the lengths of steps 1, 2, 2, 2, 2, 3, 4 of ``inner``.
    """

    inner: Pacing
    held: tuple[int, ...]
    interval: int

    @property
    def settles_at(self) -> int | None:
        settles = self.inner.settles_at
        return None if settles is None else int(self._at_clock(np.asarray([settles], np.int64))[0])

    @property
    def period(self) -> None:
        return None

    @property
    def lowest(self) -> int:
        return self.inner.lowest

    @property
    def highest(self) -> int:
        return self.inner.highest

    def clock(self, steps: IntArray) -> IntArray:
        """Return the step of ``inner`` that gives the length of each step."""
        # (steps, held): the steps of each pause that are over, 0 before the pause and ``interval`` after it.
        paused = np.clip(steps[:, None] - np.asarray(self.held, np.int64), 0, self.interval)
        return np.asarray(steps - paused.sum(axis=1), np.int64)

    def _at_clock(self, times: IntArray) -> IntArray:
        """Return the first step at which ``clock`` returns each of ``times``."""
        # Only pauses at an earlier time delay that step: a pause after it has no effect.
        pauses_before = np.searchsorted(self.clock(np.asarray(self.held, np.int64)), times, side="left")
        return np.asarray(times + self.interval * pauses_before, np.int64)

    def _lengths(self, steps: IntArray) -> IntArray:
        return self.inner(self.clock(steps))

    def changes(self, last_step: int) -> tuple[IntArray, IntArray]:
        # Pauses only delay changes, so the changes of the inner pacing up to last_step are enough.
        first_steps, lengths = self.inner.changes(last_step)
        return self._at_clock(first_steps), lengths


def bucketed(pacing: Pacing, bucket: Rounding) -> Pacing:
    """Return ``pacing`` with lengths rounded as ``bucket`` says. ConfigError if no multiple fits."""
    if bucket is None:
        return pacing
    if isinstance(bucket, tuple):
        return RoundedDown(pacing, bucket)
    if bucket > pacing.highest:
        raise ConfigError(f"training.seqlen_bucket: {bucket} is above the longest length {pacing.highest}; lower it")
    # Lengths 70 to 100 in buckets of 64: 70 is rounded up to 128, above 100. A constant length is never rounded.
    lowest = ceil_div(pacing.lowest, bucket) * bucket
    if lowest > pacing.highest > pacing.lowest:
        raise ConfigError(
            f"training.seqlen_bucket: {bucket} raises the shortest length {pacing.lowest} to {lowest}, above the longest "
            f"{pacing.highest}; lower it"
        )
    return Bucketed(pacing, bucket)
