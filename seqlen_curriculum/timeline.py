"""The whole run by arithmetic: length, rows, tokens and epochs of any step, without training any.

A schedule of lengths is piecewise constant, so the timeline stores one entry per change of length and answers for any
step by bisection: a 400,000-step run costs as much as its number of different lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import overload

import numpy as np

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.pacing import Pacing, Root, Steps

__all__ = ["Timeline", "ramp_steps_for_fraction", "ramp_steps_for_tokens"]


class Timeline:
    """Every step of a run of ``rows`` rows a step that stops at ``train_tokens`` consumed target tokens.

    ``steps`` is the first step at whose end ``consumed_tokens >= train_tokens``. Questions may be asked for one step or an
    array of them, from 1 to the end of the run. ``rows`` is the global batch. Raises ConfigError for a budget too large
    to count in 64 bits.
    """

    def __init__(self, pacing: Pacing, rows: int, train_tokens: int) -> None:
        self.pacing = pacing
        self.global_batch = rows
        self.train_tokens = train_tokens
        last_step = 1 << 16
        while True:
            self._first_steps, self._lengths = self._within_budget(*pacing.changes(last_step))
            # Tokens consumed before each run of equal lengths: rows * length * (steps of the run), summed.
            spent = np.diff(self._first_steps) * self._lengths[:-1] * rows
            self._tokens_before = np.concatenate(([0], np.cumsum(spent, dtype=np.int64)))
            self.steps = self.steps_to(train_tokens)
            if pacing.settles_at is not None or self.steps <= last_step:
                return
            last_step *= 2

    def _within_budget(self, first_steps: Steps, lengths: Steps) -> tuple[Steps, Steps]:
        """Leave out what begins after any run of this budget has ended, where sums could overflow."""
        most_steps = -(-self.train_tokens // (self.global_batch * int(lengths.min())))
        if (most_steps + 1) * self.global_batch * int(lengths.max()) >= 2**63:
            raise ConfigError(
                f"training.train_tokens: {self.train_tokens} in steps of {self.global_batch} rows of {lengths.min()} to "
                f"{lengths.max()} tokens can't be counted in 64 bits; lower it"
            )
        kept = first_steps <= most_steps + 1
        return first_steps[kept], lengths[kept]

    @overload
    def seqlen(self, steps: int) -> int: ...
    @overload
    def seqlen(self, steps: Steps) -> Steps: ...
    def seqlen(self, steps: int | Steps) -> int | Steps:
        """Tokens a row that each step trains on."""
        return self.pacing(steps)

    @overload
    def rows(self, steps: int) -> int: ...
    @overload
    def rows(self, steps: Steps) -> Steps: ...
    def rows(self, steps: int | Steps) -> int | Steps:
        """Rows of each step over all ranks."""
        return self.global_batch if isinstance(steps, int) else np.full_like(steps, self.global_batch)

    @overload
    def consumed_rows(self, steps: int) -> int: ...
    @overload
    def consumed_rows(self, steps: Steps) -> Steps: ...
    def consumed_rows(self, steps: int | Steps) -> int | Steps:
        """Rows read by the end of each step."""
        return steps * self.global_batch

    @overload
    def consumed_tokens(self, steps: int) -> int: ...
    @overload
    def consumed_tokens(self, steps: Steps) -> Steps: ...
    def consumed_tokens(self, steps: int | Steps) -> int | Steps:
        """Target tokens trained on by the end of each step; step 0 has consumed none."""
        at = np.asarray(steps, np.int64)
        run = np.maximum(np.searchsorted(self._first_steps, at, side="right") - 1, 0)
        in_run = at - self._first_steps[run] + 1
        total = self._tokens_before[run] + in_run * self._lengths[run] * self.global_batch
        return int(total) if isinstance(steps, int) else total

    def steps_to(self, tokens: int) -> int:
        """The first step at whose end at least ``tokens`` tokens are consumed."""
        run = max(int(np.searchsorted(self._tokens_before, tokens, side="left")) - 1, 0)
        a_step = int(self._lengths[run]) * self.global_batch
        in_run = -(-(tokens - int(self._tokens_before[run])) // a_step)
        return int(self._first_steps[run]) - 1 + in_run

    def first_step_at(self, seqlen: int) -> int | None:
        """The first step of this length; None if the run has none."""
        found = np.flatnonzero(self._lengths == seqlen)
        first = int(self._first_steps[found[0]]) if found.size else self.steps + 1
        return first if first <= self.steps else None

    def tokens_by_length(self) -> tuple[Steps, Steps]:
        """Lengths in the order of use, one entry a change, and the target tokens trained on at each."""
        used = self._first_steps <= self.steps
        ends = np.append(self._first_steps[used][1:] - 1, self.steps)
        return self._lengths[used], np.diff(self.consumed_tokens(ends), prepend=0)

    def shapes(self) -> list[tuple[int, int]]:
        """Every (rows, seqlen) the run will use, shortest first."""
        used = self._lengths[self._first_steps <= self.steps]
        return [(self.global_batch, int(length)) for length in np.unique(used)]


def ramp_steps_for_tokens(pacing: Callable[[int], Root], rows: int, tokens: int) -> int:
    """The smallest T whose ramp consumes at least ``tokens`` target tokens by its own end, step T.

    ``pacing(T)`` builds the ramp. Exact: the tokens of a ramp grow with T (each length of the longer ramp is at least
    that of the shorter one a step earlier), so bisection finds the one answer.
    """

    def enough(total_steps: int) -> bool:
        return Timeline(pacing(total_steps), rows, tokens).consumed_tokens(total_steps) >= tokens

    shortest = rows * pacing(1).lowest
    return _smallest(enough, 1, max(-(-tokens // shortest), 1))


def ramp_steps_for_fraction(pacing: Callable[[int], Root], rows: int, train_tokens: int, fraction: float) -> int:
    """The largest T with ``T <= fraction * steps``, where ``steps`` is the length of the run that this very T gives.

    Composer's ``duration``. A longer ramp makes the run at most one step longer for each step of ramp, so for
    ``fraction <= 1`` bisection finds the one answer. At least 1.
    """

    share = Fraction(str(fraction))  # the decimal as written: 0.29 of 100 steps is 29, in floats 28.999...

    def too_long(total_steps: int) -> bool:
        return total_steps > share * Timeline(pacing(total_steps), rows, train_tokens).steps

    longest_run = -(-train_tokens // (rows * pacing(1).lowest))
    return max(_smallest(too_long, 1, longest_run + 1) - 1, 1)


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest value in [low, high] for which ``holds``; it must hold at ``high`` and stay true once true."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
