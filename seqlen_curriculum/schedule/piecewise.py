"""Integer functions of the step that change rarely, and their running sums, stored as one entry per change.

For example, lengths 8, 8, 16, 16, 16, ... are ``first_steps = [1, 3]`` and ``values = [8, 16]`` for any number of steps.
Lengths that repeat are stored as one period, for any number of periods.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt

__all__ = ["IntArray", "Periodic", "Piecewise", "Product", "StepValues", "ceil_div", "lengths_by_run"]

IntArray = npt.NDArray[np.int64]
Steps = TypeVar("Steps", int, IntArray)
"""One step, or an array of steps."""


def ceil_div(numerator: int, denominator: int) -> int:
    """Return ``numerator / denominator`` rounded up, in exact integers."""
    return -(-numerator // denominator)


def lengths_by_run(steps: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
    """Return only the entries at which the length changes, one per run of equal lengths."""
    changed = np.append(True, lengths[1:] != lengths[:-1])
    return steps[changed], lengths[changed]


class Piecewise:
    """``values[i]`` from step ``first_steps[i]`` (increasing from 1) until the next piece; the last piece has no end."""

    def __init__(self, first_steps: IntArray, values: IntArray) -> None:
        self.first_steps, self.values = first_steps, values
        # The sum before each piece: in 8, 8, 16, ... the first piece has 2 steps and the sum 16, so _before is [0, 16].
        sums = (first_steps[1:] - first_steps[:-1]) * values[:-1]  # all pieces but the last, which has no end
        self._before = np.concatenate(([0], np.cumsum(sums, dtype=np.int64)))

    @classmethod
    def constant(cls, value: int) -> Piecewise:
        """Return ``value`` at every step."""
        return cls(np.ones(1, np.int64), np.array([value], np.int64))

    def map(self, function: Callable[[IntArray], IntArray]) -> Piecewise:
        """Return ``function`` of the value at every step."""
        return Piecewise(self.first_steps, function(self.values))

    @overload
    def times(self, other: Piecewise) -> Piecewise: ...
    @overload
    def times(self, other: Periodic) -> Periodic | Product: ...
    def times(self, other: Piecewise | Periodic) -> Piecewise | Periodic | Product:
        """Return the product with ``other`` at every step."""
        if isinstance(other, Periodic):
            return other.times(self)
        if len(other.values) == 1:
            return Piecewise(self.first_steps, self.values * other.values)
        if len(self.values) == 1:
            return Piecewise(other.first_steps, self.values * other.values)
        if self.first_steps is other.first_steps:  # both were made by ``map``
            return Piecewise(self.first_steps, self.values * other.values)
        # The product changes only where one of the factors changes.
        both = np.sort(np.concatenate((self.first_steps, other.first_steps)), kind="stable")  # merges two sorted lists
        first_steps = both[np.append(True, both[1:] != both[:-1])]
        return Piecewise(first_steps, self.at(first_steps) * other.at(first_steps))

    @cached_property
    def _lists(self) -> tuple[list[int], list[int], list[int]]:
        """First steps, values and sums before each piece. One step is found in lists ten times as fast as in arrays."""
        return self.first_steps.tolist(), self.values.tolist(), self._before.tolist()

    def _piece(self, steps: IntArray) -> IntArray:
        # Step 0, before training, is assigned to the first piece, so that total() returns 0 for it.
        return np.maximum(np.searchsorted(self.first_steps, steps, side="right") - 1, 0)

    def at(self, steps: Steps) -> Steps:
        """Return the value of each step."""
        if isinstance(steps, int):
            first_steps, values, _ = self._lists
            return values[max(bisect_right(first_steps, steps) - 1, 0)]
        if len(self.values) == 1:  # the rows of nearly every run
            return np.full_like(steps, self.values[0])
        found: IntArray = self.values[self._piece(steps)]
        return found

    def total(self, steps: Steps) -> Steps:
        """Return the sum from step 1 to the end of each step; 0 for step 0."""
        if isinstance(steps, int):
            first_steps, values, before = self._lists
            piece = max(bisect_right(first_steps, steps) - 1, 0)
            return before[piece] + (steps - first_steps[piece] + 1) * values[piece]
        if len(self.values) == 1:
            return steps * int(self.values[0])
        at = self._piece(steps)
        total: IntArray = self._before[at] + (steps - self.first_steps[at] + 1) * self.values[at]
        return total

    def steps_to(self, total: int) -> int:
        """Return the first step at whose end the sum is at least ``total``; 0 for a total of 0."""
        first_steps, values, before = self._lists
        # bisect_left: a total reached exactly at the end of a piece belongs to that piece, not to the next one.
        piece = max(bisect_left(before, total) - 1, 0)
        return first_steps[piece] - 1 + ceil_div(total - before[piece], values[piece])

    def first_step_of(self, value: int) -> int | None:
        """Return the first step with this value, or None if no step has it."""
        pieces = np.flatnonzero(self.values == value)
        return int(self.first_steps[pieces[0]]) if pieces.size else None

    def counts(self, last_steps: IntArray) -> IntArray:
        """Return the number of steps of each piece up to each of ``last_steps``, (last_steps, pieces)."""
        ends = np.append(self.first_steps[1:] - 1, np.iinfo(np.int64).max)
        counts: IntArray = np.clip(np.minimum(last_steps[:, None], ends) - self.first_steps + 1, 0, None)
        return counts


class Periodic:
    """The values of steps 1 to ``period`` of ``cycle``, repeated."""

    def __init__(self, cycle: Piecewise, period: int) -> None:
        self.cycle, self.period = cycle, period
        self._sum = cycle.total(period)

    @property
    def values(self) -> IntArray:
        """The value of each piece of a period."""
        return self.cycle.values

    def map(self, function: Callable[[IntArray], IntArray]) -> Periodic:
        """Return ``function`` of the value at every step."""
        return Periodic(self.cycle.map(function), self.period)

    def times(self, other: Piecewise | Periodic) -> Periodic | Product:
        """Return the product with ``other``, which has the same period if it has one, at every step."""
        if isinstance(other, Periodic):
            assert other.period == self.period
            return Periodic(self.cycle.times(other.cycle), self.period)
        if len(other.values) == 1:
            return Periodic(self.cycle.times(other), self.period)
        return Product(other, self)

    def at(self, steps: Steps) -> Steps:
        """Return the value of each step."""
        # Step 0, before training, has the value of step 1. With period 3 step 7 is 6 % 3 + 1 = 1.
        first = max(steps, 1) if isinstance(steps, int) else np.maximum(steps, 1)
        return self.cycle.at((first - 1) % self.period + 1)

    def total(self, steps: Steps) -> Steps:
        """Return the sum from step 1 to the end of each step; 0 for step 0."""
        return steps // self.period * self._sum + self.cycle.total(steps % self.period)

    def steps_to(self, total: int) -> int:
        """Return the first step at whose end the sum is at least ``total``; 0 for a total of 0."""
        # With values 5, 5, 2: a total of 12 is reached in the first period, 13 in the second.
        periods = max(total - 1, 0) // self._sum
        return periods * self.period + self.cycle.steps_to(total - periods * self._sum)

    def first_step_of(self, value: int) -> int | None:
        """Return the first step with this value, or None if no step has it."""
        return self.cycle.first_step_of(value)

    def listed(self, last_step: int) -> tuple[IntArray, IntArray]:
        """Return the first step and the value of each piece of steps 1 to ``last_step``, and of the rest of that period."""
        periods = np.arange(ceil_div(last_step, self.period), dtype=np.int64)
        first_steps = self.period * periods[:, None] + self.cycle.first_steps
        return first_steps.ravel(), np.tile(self.values, len(periods))

    def counts(self, last_steps: IntArray) -> IntArray:
        """Return the number of steps of each piece of the period up to each of ``last_steps``, (last_steps, pieces)."""
        of_period = self.cycle.counts(np.array([self.period]))
        counts: IntArray = last_steps[:, None] // self.period * of_period + self.cycle.counts(last_steps % self.period)
        return counts


class Product:
    """``rows`` times ``repeated`` at every step. It is not periodic, but sums of one period give its sums."""

    def __init__(self, rows: Piecewise, repeated: Periodic) -> None:
        self.rows, self.repeated = rows, repeated
        # Between two changes of rows the sum is that of the repeated values times the rows.
        totals = repeated.total(rows.first_steps - 1)
        self._repeated_before = totals
        self._before = np.concatenate(([0], np.cumsum(np.diff(totals) * rows.values[:-1], dtype=np.int64)))

    def at(self, steps: Steps) -> Steps:
        """Return the value of each step."""
        return self.rows.at(steps) * self.repeated.at(steps)

    def total(self, steps: Steps) -> Steps:
        """Return the sum from step 1 to the end of each step; 0 for step 0."""
        at = np.asarray(steps, np.int64)
        piece = np.maximum(np.searchsorted(self.rows.first_steps, at, side="right") - 1, 0)
        within = self.repeated.total(at) - self._repeated_before[piece]
        total: IntArray = self._before[piece] + within * self.rows.values[piece]
        return int(total) if isinstance(steps, int) else total

    def steps_to(self, total: int) -> int:
        """Return the first step at whose end the sum is at least ``total``; 0 for a total of 0."""
        piece = max(int(np.searchsorted(self._before, total, side="left")) - 1, 0)
        missing = ceil_div(total - int(self._before[piece]), int(self.rows.values[piece]))
        return self.repeated.steps_to(int(self._repeated_before[piece]) + missing)


StepValues: TypeAlias = Piecewise | Periodic | Product
"""A positive integer at every step from 1 on. Methods take one step or an array of steps. Sums must fit 64 bits."""
