"""The pacing of a custom schedule: a function of the user, which is called once for each step."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.pacing import Ladder
from seqlen_curriculum.schedule.piecewise import IntArray, lengths_by_run

__all__ = ["MOST_ASKED", "Custom", "shared"]

MOST_ASKED = 2**19
"""Steps for which the function is called to plan a run. They take 1.5 s, and 0.4 s when they are planned again."""


@dataclass(frozen=True)
class Custom(Ladder):
    """A user-defined ``function(step) -> length``, clamped to the range and rounded like a ramp.

    It is called once for each step up to ``MOST_ASKED``.
    """

    function: Callable[[int], float]

    def _lengths(self, steps: IntArray) -> IntArray:
        return np.asarray([self._length(step) for step in steps.tolist()], np.int64)

    def _length(self, step: int) -> int:
        if step > MOST_ASKED:
            return self._ask(step)
        if not self._known[step]:  # lengths are 1 or more
            self._known[step] = self._ask(step)
        return self._known[step]

    @cached_property
    def _known(self) -> array[int]:
        """The length of each step that was asked for, and 0 for the others: 2 MiB."""
        return array("i", bytes(4 * (MOST_ASKED + 1)))

    def _ask(self, step: int) -> int:
        try:
            value: Any = self.function(step)
        except Exception as error:
            raise ConfigError(f"custom schedule: raised {type(error).__name__} at step {step}: {error}") from error
        # True would count as length 1, and NaN passes every comparison of a clamp.
        number = type(value) in (int, float) or (isinstance(value, (int, float, np.number)) and value is not True)
        if not number or value is False or not -math.inf < value < math.inf:
            raise ConfigError(f"custom schedule: returned {value!r} at step {step}; return a finite number")
        if value >= self.max_difficulty:
            return self.max_difficulty
        whole = int(value)  # a negative one is raised to the lowest length
        return min(max(whole - whole % self.difficulty_step, self._lowest), self.max_difficulty)  # as in ``_rounded``

    @cached_property
    def _lowest(self) -> int:
        return self.lowest

    def changes(self, last_step: int) -> tuple[IntArray, IntArray]:
        steps = np.arange(1, last_step + 1, dtype=np.int64)
        return lengths_by_run(steps, self(steps))


_IN_USE: WeakValueDictionary[tuple[int, ...], Custom] = WeakValueDictionary()
"""Pacings of configurations, by their keys. An entry ends with the last of these, and until then keeps its function's id."""


def shared(custom: Custom) -> Custom:
    """Return the equal pacing of another configuration in use, with the lengths that it knows, or ``custom`` without one.

    A command that reads a file several times, or plans it for several numbers of ranks, so calls the function once per step.
    """
    key = (custom.min_difficulty, custom.max_difficulty, custom.difficulty_step, id(custom.function))
    return _IN_USE.setdefault(key, custom)
