"""Pacing functions: the sequence length of a step, as pure functions of the step.

Steps are 1-based as in DeepSpeed: the first optimizer step is 1. Every function takes one step or an array of steps and
returns bit-identical values either way. Source: Section 4 of Li, Zhang and He, 2022 ("The Stability-Efficiency
Dilemma"), and DeepSpeed's ``curriculum_scheduler.py``. The lengths equal DeepSpeed's wherever DeepSpeed's are valid
(multiples of ``difficulty_step``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np
import numpy.typing as npt

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.piecewise import IntArray, ceil_div, lengths_by_run

__all__ = ["Discrete", "Ladder", "Mixed", "Pacing", "Root", "StepFunction", "elementwise", "lengths_by_run"]

_MOST_LENGTHS = 2**17
"""A timeline of this many lengths is made in 0.03 s, and a ramp as a fraction of the run needs 40 of them."""


def elementwise(function: Callable[[float], float], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Apply a ``function`` of the C library to each value.

    numpy's ``power`` and ``cos`` use SIMD code that may differ from the C library in the last bit. After a floor, that bit
    could change a length, and a plan must equal its run on every machine.
    """
    return np.fromiter(map(function, values.ravel().tolist()), np.float64, values.size).reshape(values.shape)


class Pacing(Protocol):
    """Protocol of a function from step to length that can also list its changes."""

    @overload
    def __call__(self, steps: int) -> int: ...
    @overload
    def __call__(self, steps: IntArray) -> IntArray: ...

    def changes(self, last_step: int) -> tuple[IntArray, IntArray]:
        """Return the first step and the length of each run of equal lengths, at least for steps 1 to ``last_step``."""
        ...

    @property
    def settles_at(self) -> int | None:
        """The step from which the length no longer changes; None if unknown or never."""
        ...

    @property
    def period(self) -> int | None:
        """The number of steps after which the lengths repeat; None if they don't."""
        ...

    @property
    def lowest(self) -> int:
        """A lower bound of all lengths."""
        ...

    @property
    def highest(self) -> int:
        """An upper bound of all lengths."""
        ...


class StepFunction(ABC):
    """Base class that implements calls with one step or an array of steps by a vectorised ``_lengths``."""

    @property
    def settles_at(self) -> int | None:
        return None

    @property
    def period(self) -> int | None:
        return None

    @abstractmethod
    def _lengths(self, steps: IntArray) -> IntArray:
        """Return the length of each step, (n,) to (n,)."""

    @overload
    def __call__(self, steps: int) -> int: ...
    @overload
    def __call__(self, steps: IntArray) -> IntArray: ...
    def __call__(self, steps: int | IntArray) -> int | IntArray:
        if type(steps) is int and 0 <= steps < 2**62:
            return self._length(steps)
        at = np.asarray(steps)
        if at.dtype.kind not in "iu":
            raise ConfigError(f"step: {steps!r} is not a whole number of at most 64 bits; give steps counted from 1")
        if at.size and int(at.min()) < 0:
            raise ConfigError(f"step: {int(at.min())} is negative; give steps counted from 1")
        if at.size and int(at.max()) >= 2**62:
            raise ConfigError(f"step: {int(at.max())} is above 2**62; give steps counted from 1")
        return self._length(int(at)) if at.ndim == 0 else self._lengths(at)

    def _length(self, step: int) -> int:
        """Return the length of one step, by the same vectorised path: a plan of all steps equals the run step by step."""
        return int(self._lengths(np.asarray([step], np.int64))[0])


@dataclass(frozen=True)
class Ladder(StepFunction):
    """Rounding to multiples of ``difficulty_step``, with the maximum kept even if it is not a multiple."""

    min_difficulty: int
    max_difficulty: int
    difficulty_step: int

    @property
    def lowest(self) -> int:
        """``min_difficulty`` rounded up to a multiple of ``difficulty_step``."""
        return ceil_div(self.min_difficulty, self.difficulty_step) * self.difficulty_step

    @property
    def highest(self) -> int:
        return self.max_difficulty

    def _rounded(self, raw: npt.NDArray[np.float64]) -> IntArray:
        """Floor and round down to a multiple, at least ``lowest``, and exactly the maximum where ``raw`` reaches it."""
        # min 10, max 100, step 16: 10.0 -> 16 (lowest), 47.9 -> 32, 99.9 -> 96, 100.0 -> 100 (the maximum, not a multiple).
        # With min 97 lowest would be 112, above the maximum. The last minimum limits it to 100.
        whole = np.floor(np.clip(raw, 0, self.max_difficulty)).astype(np.int64)
        rung = np.maximum(whole - whole % self.difficulty_step, self.lowest)
        return np.where(raw >= self.max_difficulty, self.max_difficulty, np.minimum(rung, self.max_difficulty))


@dataclass(frozen=True)
class Root(Ladder):
    """Linear (``root_degree`` 1) or root ramp from the minimum to the maximum over ``total_steps`` steps.

    ``raw = min + (max - min) * (t / T) ** (1 / root_degree)``, exactly the maximum from step T on. The paper writes
    the exponent as *r*; the configuration key ``root_degree`` keeps DeepSpeed's meaning, *1/r*.
    """

    total_steps: int
    root_degree: float = 1.0

    @property
    def settles_at(self) -> int:
        return self.total_steps

    def _lengths(self, steps: IntArray) -> IntArray:
        progress = np.minimum(steps / self.total_steps, 1.0)
        # T 100, 8 to 1024: step 50 gives 8 + 0.5 * 1016 = 516.0, which is rounded down to 512.
        raw = self._raw(progress if self.root_degree == 1 else np.power(progress, 1.0 / self.root_degree))
        if self.root_degree != 1:
            # numpy's last bits only matter next to a value where the length changes. There the C library decides.
            nearest = np.rint(raw / self.difficulty_step) * self.difficulty_step
            margin = self.max_difficulty * 2.0**-40
            near = (np.abs(raw - nearest) < margin) | (raw > self.max_difficulty - margin)
            raw[near] = self._raw(elementwise(lambda x: x ** (1.0 / self.root_degree), progress[near]))
        return np.where(steps >= self.total_steps, self.max_difficulty, self._rounded(raw))

    def _raw(self, progress: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return progress * (self.max_difficulty - self.min_difficulty) + self.min_difficulty

    def changes(self, last_step: int) -> tuple[IntArray, IntArray]:
        """Return the first step of every length up to that of ``last_step``. Raises ConfigError for too many lengths."""
        last_step = max(min(last_step, self.total_steps), 1)
        longest = self(last_step)
        rungs = ceil_div(longest - self.lowest, self.difficulty_step) + 1
        if min(rungs, last_step) > _MOST_LENGTHS:
            fewer = ceil_div(longest - self.lowest, _MOST_LENGTHS - 1)
            raise ConfigError(
                f"curriculum_learning.schedule_config.difficulty_step: {self.difficulty_step} gives a ramp of "
                f"{min(rungs, last_step):,} lengths, at most {_MOST_LENGTHS:,} are planned; raise it to {fewer} or more"
            )
        if last_step <= rungs:
            steps = np.arange(1, last_step + 1, dtype=np.int64)
            return lengths_by_run(steps, self(steps))
        lengths = np.append(np.arange(self.lowest, longest, self.difficulty_step, dtype=np.int64), longest)
        first_steps = self._first_steps(lengths, last_step)
        keep = np.append(first_steps[1:] != first_steps[:-1], True)  # a length that the ramp jumps over shares a step
        return first_steps[keep], lengths[keep]

    def _first_steps(self, lengths: IntArray, last_step: int) -> IntArray:
        """Return the first step at which each of ``lengths`` is reached, all of them by ``last_step``."""
        # (before, at] contains that step. Each probe narrows it, with step 0 counting as below every length.
        before, at = np.zeros_like(lengths), np.full_like(lengths, last_step)
        at[0] = 1

        def probe(some: IntArray, steps: IntArray) -> None:
            steps = np.clip(steps, before[some], at[some])
            reached = (self(steps) >= lengths[some]) & (steps > 0)
            before[some], at[some] = np.where(reached, before[some], steps), np.where(reached, steps, at[some])

        # The inverse of the formula gives it up to rounding: 8 to 1024 in T steps reaches 16 at T * (8 / 1016) ** degree.
        share = (lengths - self.min_difficulty) / max(self.max_difficulty - self.min_difficulty, 1)
        inverse = np.ceil(self.total_steps * share**self.root_degree).clip(1, last_step).astype(np.int64)
        for offset in (0, -1, 1, -2):
            some = np.flatnonzero(at - before > 1)
            probe(some, inverse[some] + offset)
        while (some := np.flatnonzero(at - before > 1)).size:
            probe(some, (before[some] + at[some]) // 2)
        return at


@dataclass(frozen=True)
class _Levels(StepFunction):
    """Lengths listed in ``difficulty``."""

    difficulty: tuple[int, ...]

    @property
    def lowest(self) -> int:
        return min(self.difficulty)

    @property
    def highest(self) -> int:
        return max(self.difficulty)


@dataclass(frozen=True)
class Discrete(_Levels):
    """``difficulty[i]`` up to and including step ``max_step[i]``, and the last length for all later steps.

    ``difficulty`` has one entry more than ``max_step``. Lengths may also decrease. Shortformer uses two levels.
    """

    max_step: tuple[int, ...]

    @property
    def settles_at(self) -> int:
        return self.max_step[-1] + 1 if self.max_step else 1

    def _lengths(self, steps: IntArray) -> IntArray:
        # side="left": step max_step[i] itself still has level i.
        level = np.searchsorted(np.asarray(self.max_step, np.int64), steps, side="left")
        return np.asarray(self.difficulty, np.int64)[level]

    def changes(self, last_step: int) -> tuple[IntArray, IntArray]:  # noqa: ARG002 - the lists cover the whole run
        first_steps = np.asarray([1, *(step + 1 for step in self.max_step)], np.int64)
        return lengths_by_run(first_steps, np.asarray(self.difficulty, np.int64))


@dataclass(frozen=True)
class Mixed(_Levels):
    """A repeated cycle of ``steps[i]`` steps of length ``difficulty[i]``.

    The paper's Figure 2: 900 steps of 128, then 100 steps of 1024, in every 1,000 steps.
    """

    steps: tuple[int, ...]

    @property
    def period(self) -> int:
        return sum(self.steps)

    def _lengths(self, steps: IntArray) -> IntArray:
        ends = np.cumsum(self.steps, dtype=np.int64)
        # Steps 900 and 901 are offsets 899 and 900 in the cycle: with ends [900, 1000] these are turns 0 and 1.
        step_in_cycle = np.maximum(steps - 1, 0) % ends[-1]  # step 0, before training, has the first length
        turn = np.searchsorted(ends, step_in_cycle, side="right")
        lengths: IntArray = np.asarray(self.difficulty, np.int64)[turn]
        return lengths

    def changes(self, last_step: int) -> tuple[IntArray, IntArray]:
        ends = np.cumsum(self.steps, dtype=np.int64)
        cycles = np.arange(ceil_div(last_step, int(ends[-1])), dtype=np.int64)
        first_steps = 1 + ends[-1] * cycles[:, None] + (ends - self.steps)  # (cycles, turns)
        return lengths_by_run(first_steps.ravel(), np.tile(np.asarray(self.difficulty, np.int64), len(cycles)))
