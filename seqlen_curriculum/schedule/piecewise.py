"""A piecewise constant integer function of the step and its running sum, stored as one entry per change.

For example, lengths 8, 8, 16, 16, 16, ... are ``first_steps = [1, 3]`` and ``values = [8, 16]`` for any number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import numpy as np
import numpy.typing as npt

__all__ = ["IntArray", "Piecewise", "ceil_div"]

IntArray = npt.NDArray[np.int64]


def ceil_div(numerator: int, denominator: int) -> int:
    """Return ``numerator / denominator`` rounded up, in exact integers."""
    return -(-numerator // denominator)


class Piecewise:
    """``values[i]`` from step ``first_steps[i]`` (increasing from 1) until the next piece; the last piece has no end.

    Methods take one step or an array of steps and find the piece by bisection. Sums must fit 64 bits.
    """

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

    def times(self, other: Piecewise) -> Piecewise:
        """Return the product with ``other`` at every step."""
        if len(other.values) == 1:
            return Piecewise(self.first_steps, self.values * other.values)
        # The product changes only where one of the factors changes.
        first_steps = np.union1d(self.first_steps, other.first_steps)
        return Piecewise(first_steps, self.at(first_steps) * other.at(first_steps))

    def _piece(self, steps: int | IntArray) -> IntArray:
        # Step 0, before training, is assigned to the first piece, so that total() returns 0 for it.
        return np.maximum(np.searchsorted(self.first_steps, steps, side="right") - 1, 0)

    @overload
    def at(self, steps: int) -> int: ...
    @overload
    def at(self, steps: IntArray) -> IntArray: ...
    def at(self, steps: int | IntArray) -> int | IntArray:
        """Return the value of each step."""
        if len(self.values) == 1:  # the rows of nearly every run
            return int(self.values[0]) if isinstance(steps, int) else np.full_like(steps, self.values[0])
        values = self.values[self._piece(steps)]
        return int(values) if isinstance(steps, int) else values

    @overload
    def total(self, steps: int) -> int: ...
    @overload
    def total(self, steps: IntArray) -> IntArray: ...
    def total(self, steps: int | IntArray) -> int | IntArray:
        """Return the sum from step 1 to the end of each step; 0 for step 0."""
        if len(self.values) == 1:
            return steps * int(self.values[0])
        piece = self._piece(steps)
        total = self._before[piece] + (steps - self.first_steps[piece] + 1) * self.values[piece]
        return int(total) if isinstance(steps, int) else total

    def steps_to(self, total: int) -> int:
        """Return the first step at whose end the sum is at least ``total``; 0 for a total of 0."""
        # side="left": a total reached exactly at the end of a piece belongs to that piece, not to the next one.
        piece = max(int(np.searchsorted(self._before, total, side="left")) - 1, 0)
        steps_in_piece = ceil_div(total - int(self._before[piece]), int(self.values[piece]))
        return int(self.first_steps[piece]) - 1 + steps_in_piece

    def first_step_of(self, value: int) -> int | None:
        """Return the first step with this value, or None if no step has it."""
        pieces = np.flatnonzero(self.values == value)
        return int(self.first_steps[pieces[0]]) if pieces.size else None
