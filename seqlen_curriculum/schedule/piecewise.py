"""A whole number for each step of a run, and its running sum, in as many entries as the number has changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import numpy as np
import numpy.typing as npt

__all__ = ["IntArray", "Piecewise"]

IntArray = npt.NDArray[np.int64]


class Piecewise:
    """``values[i]`` from step ``first_steps[i]`` (the first is 1, increasing) up to the next; the last for ever.

    Questions may be asked for one step or an array of them, and are answered by bisection. Sums must fit 64 bits.
    """

    def __init__(self, first_steps: IntArray, values: IntArray) -> None:
        self.first_steps, self.values = first_steps, values
        spent = (first_steps[1:] - first_steps[:-1]) * values[:-1]
        self._before = np.concatenate(([0], np.cumsum(spent, dtype=np.int64)))  # the sum before each piece

    @classmethod
    def constant(cls, value: int) -> Piecewise:
        """``value`` at every step."""
        return cls(np.ones(1, np.int64), np.array([value], np.int64))

    def map(self, function: Callable[[IntArray], IntArray]) -> Piecewise:
        """``function`` of the value at every step."""
        return Piecewise(self.first_steps, function(self.values))

    def times(self, other: Piecewise) -> Piecewise:
        """The product of both at every step."""
        if len(other.values) == 1:
            return Piecewise(self.first_steps, self.values * other.values)
        first_steps = np.union1d(self.first_steps, other.first_steps)
        return Piecewise(first_steps, self.at(first_steps) * other.at(first_steps))

    def _piece(self, steps: int | IntArray) -> IntArray:
        return np.maximum(np.searchsorted(self.first_steps, steps, side="right") - 1, 0)

    @overload
    def at(self, steps: int) -> int: ...
    @overload
    def at(self, steps: IntArray) -> IntArray: ...
    def at(self, steps: int | IntArray) -> int | IntArray:
        """The value of each step."""
        if len(self.values) == 1:  # the rows of nearly every run
            return int(self.values[0]) if isinstance(steps, int) else np.full_like(steps, self.values[0])
        values = self.values[self._piece(steps)]
        return int(values) if isinstance(steps, int) else values

    @overload
    def total(self, steps: int) -> int: ...
    @overload
    def total(self, steps: IntArray) -> IntArray: ...
    def total(self, steps: int | IntArray) -> int | IntArray:
        """The sum from step 1 to the end of each step; 0 for step 0."""
        if len(self.values) == 1:
            return steps * int(self.values[0])
        piece = self._piece(steps)
        total = self._before[piece] + (steps - self.first_steps[piece] + 1) * self.values[piece]
        return int(total) if isinstance(steps, int) else total

    def steps_to(self, total: int) -> int:
        """The first step at whose end the sum is at least ``total``; 0 for 0."""
        piece = max(int(np.searchsorted(self._before, total, side="left")) - 1, 0)
        in_piece = -(-(total - int(self._before[piece])) // int(self.values[piece]))
        return int(self.first_steps[piece]) - 1 + in_piece

    def first_step_of(self, value: int) -> int | None:
        """The first step with this value; None if there is none."""
        found = np.flatnonzero(self.values == value)
        return int(self.first_steps[found[0]]) if found.size else None
