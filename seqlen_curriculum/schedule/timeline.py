"""The length, rows and consumed tokens of any step of a run, computed without training.

Lengths and rows are piecewise constant, so a timeline stores one entry per change of either and finds a step by
bisection. The cost depends on the number of changes, not on the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import overload

import numpy as np

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.global_batch import GlobalBatch, least_tokens, most_tokens, samples_by_step
from seqlen_curriculum.schedule.pacing import Pacing
from seqlen_curriculum.schedule.piecewise import IntArray, Piecewise, ceil_div
from seqlen_curriculum.schedule.shortening import TRUNCATE, Shortening

__all__ = ["Timeline", "ramp_steps_for_fraction", "ramp_steps_for_tokens"]


class Timeline:
    """A run that reads ``rows`` samples per step and stops at ``train_tokens`` consumed target tokens.

    ``rows`` is the global batch, its warmup or its growth. ``shortening`` is the method that shortens a sample. The run has
    ``steps`` steps: the last is the first one with ``consumed_tokens >= train_tokens``. Methods take one step or an array of
    steps, from 1 to the end of the run. Raises ConfigError for a budget that doesn't fit 64 bits.
    """

    def __init__(self, pacing: Pacing, rows: GlobalBatch, train_tokens: int, shortening: Shortening = TRUNCATE) -> None:
        self.pacing, self.shortening = pacing, shortening
        self.global_batch = rows if isinstance(rows, int) else rows.final
        self.train_tokens = train_tokens
        # The changes to list depend on the number of steps, which depends on the lengths. A pacing that settles lists all
        # its changes at once. For others the number of steps is doubled until the run ends within them.
        last_step = 1 << 16
        while True:
            self._lengths = self._within_budget(*pacing.changes(last_step), rows)
            # Per step: tokens used of each sample, samples, rows made from them, and tokens in all rows.
            used = self._lengths.map(shortening.used_tokens_per_sample)
            self._samples = samples_by_step(rows, used)
            self._rows = self._samples.times(self._lengths.map(shortening.rows_per_sample))
            self._tokens = self._samples.times(used)
            self.steps = self.steps_to(train_tokens)
            if pacing.settles_at is not None or self.steps <= last_step:
                return
            last_step *= 2

    def _within_budget(self, first_steps: IntArray, lengths: IntArray, rows: GlobalBatch) -> Piecewise:
        """Return the lengths without those that start after the end of the run, whose sums could overflow.

        Raises ConfigError if the sums of the others could overflow.
        """
        used = self.shortening.used_tokens_per_sample(lengths)
        most_steps = ceil_div(self.train_tokens, least_tokens(rows, int(used.min())))
        # One step more, because the last step may exceed the budget.
        if (most_steps + 1) * most_tokens(rows, int(used.max())) >= 2**63:
            raise ConfigError(
                f"training.train_tokens: {self.train_tokens} in steps of {self.global_batch} samples of {used.min()} to "
                f"{used.max()} tokens can't be counted in 64 bits; lower it"
            )
        kept = first_steps <= most_steps + 1
        return Piecewise(first_steps[kept], lengths[kept])

    @overload
    def seqlen(self, steps: int) -> int: ...
    @overload
    def seqlen(self, steps: IntArray) -> IntArray: ...
    def seqlen(self, steps: int | IntArray) -> int | IntArray:
        """Return the sequence length of each step, in tokens."""
        # The pieces cover the run and take 5 us for one step. A pacing function takes ten times as long.
        return self._lengths.at(steps) if isinstance(steps, int) and 0 < steps <= self.steps else self.pacing(steps)

    @overload
    def samples(self, steps: int) -> int: ...
    @overload
    def samples(self, steps: IntArray) -> IntArray: ...
    def samples(self, steps: int | IntArray) -> int | IntArray:
        """Return the samples that each step reads, over all ranks."""
        return self._samples.at(steps)

    @overload
    def rows(self, steps: int) -> int: ...
    @overload
    def rows(self, steps: IntArray) -> IntArray: ...
    def rows(self, steps: int | IntArray) -> int | IntArray:
        """Return the rows that each step trains on, over all ranks: its samples or their segments."""
        return self._rows.at(steps)

    @overload
    def consumed_samples(self, steps: int) -> int: ...
    @overload
    def consumed_samples(self, steps: IntArray) -> IntArray: ...
    def consumed_samples(self, steps: int | IntArray) -> int | IntArray:
        """Return the samples read by the end of each step."""
        return self._samples.total(steps)

    @overload
    def consumed_tokens(self, steps: int) -> int: ...
    @overload
    def consumed_tokens(self, steps: IntArray) -> IntArray: ...
    def consumed_tokens(self, steps: int | IntArray) -> int | IntArray:
        """Return the target tokens trained on by the end of each step; 0 for step 0."""
        return self._tokens.total(steps)

    def steps_to(self, tokens: int) -> int:
        """Return the first step by whose end at least ``tokens`` tokens are consumed."""
        return self._tokens.steps_to(tokens)

    def steps_to_samples(self, samples: int) -> int:
        """Return the first step by whose end at least ``samples`` samples are read."""
        return self._samples.steps_to(samples)

    def first_step_at(self, seqlen: int) -> int | None:
        """Return the first step with length ``seqlen``, or None if the run has none."""
        return self._within_run(self._lengths.first_step_of(seqlen))

    def first_step_of_samples(self, samples: int) -> int | None:
        """Return the first step that reads ``samples`` samples over all ranks, or None if the run has none."""
        return self._within_run(self._samples.first_step_of(samples))

    # The pieces extend beyond the run, because the number of steps is known only after they are summed.
    def _within_run(self, step: int | None) -> int | None:
        return step if step is not None and step <= self.steps else None

    def tokens_by_length(self) -> tuple[IntArray, IntArray]:
        """Return the lengths in order of use, one entry per change, and the target tokens trained on at each."""
        reached = self._lengths.first_steps <= self.steps
        first_steps = self._lengths.first_steps[reached]
        last_steps = np.append(first_steps[1:] - 1, self.steps)
        return self._lengths.values[reached], np.diff(self.consumed_tokens(last_steps), prepend=0)

    def stretches(self) -> tuple[IntArray, IntArray]:
        """Return the first step and the number of steps of each stretch with constant length and rows."""
        first_steps = self._tokens.first_steps[self._tokens.first_steps <= self.steps]
        return first_steps, np.diff(first_steps, append=self.steps + 1)

    def lengths(self) -> list[int]:
        """Return every sequence length of the run, shortest first."""
        lengths, _ = self.tokens_by_length()
        return sorted(set(lengths.tolist()))

    def shapes(self) -> list[tuple[int, int]]:
        """Return every (rows, tokens per row) in the run, shortest rows first."""
        steps, _ = self.stretches()
        row_tokens = self.shortening.tokens_per_row(self._lengths.at(steps)).tolist()
        shapes = set(zip(self._rows.at(steps).tolist(), row_tokens, strict=True))
        return sorted(shapes, key=lambda shape: (shape[1], shape[0]))

    def tokens_by_sample(self) -> Piecewise:
        """Return the target tokens of each sample in reading order; samples are numbered from 1, as steps are."""
        # Indexed by sample: 2 steps of 4 samples of 8 tokens, then samples of 16, are 8 from sample 1 and 16 from sample 9.
        first_samples = self.consumed_samples(self._lengths.first_steps - 1) + 1
        return Piecewise(first_samples, self.shortening.used_tokens_per_sample(self._lengths.values))


def ramp_steps_for_tokens(
    pacing: Callable[[int], Pacing], rows: GlobalBatch, tokens: int, shortening: Shortening = TRUNCATE
) -> int:
    """Return the smallest T whose ramp ``pacing(T)`` consumes at least ``tokens`` target tokens by its last step, T.

    The result is exact, also under a batch size warmup: each length of the ramp of T + 1 steps is at least the length of
    the ramp of T steps one step earlier. By induction the same holds for consumed tokens, and for the rows derived from
    them. So the tokens of a ramp increase with T, and bisection finds the smallest T. Under ``segment`` and batch growth
    the tokens of a step are not monotone in the length. Then the result is a T that consumes enough while T - 1 does not.
    """

    def enough(total_steps: int) -> bool:
        return Timeline(pacing(total_steps), rows, tokens, shortening).consumed_tokens(total_steps) >= tokens

    return _smallest(enough, 1, _most_steps(pacing, rows, tokens, shortening))


def ramp_steps_for_fraction(
    pacing: Callable[[int], Pacing],
    rows: GlobalBatch,
    train_tokens: int,
    fraction: float,
    shortening: Shortening = TRUNCATE,
) -> int:
    """Return the largest T with ``T <= fraction * steps``, where ``steps`` is the number of steps of the run with this T.

    This is Composer's ``duration``. One more step of ramp lengthens the run by at most one step (by the induction of
    ``ramp_steps_for_tokens``), so for ``fraction <= 1`` bisection finds the largest T, at least 1. Under ``segment`` and
    batch growth the result is a T within the fraction while T + 1 is not.
    """

    share = Fraction(str(fraction))  # the decimal as written: 0.29 of 100 steps is 29, in floats 28.999...

    def too_long(total_steps: int) -> bool:
        return total_steps > share * Timeline(pacing(total_steps), rows, train_tokens, shortening).steps

    # A ramp longer than the longest run is too long at any fraction, so the bisection is bounded.
    longest_run = _most_steps(pacing, rows, train_tokens, shortening)
    return max(_smallest(too_long, 1, longest_run + 1) - 1, 1)


def _most_steps(pacing: Callable[[int], Pacing], rows: GlobalBatch, tokens: int, shortening: Shortening) -> int:
    """Return an upper bound for the steps that consume ``tokens``, with every step as small as the smallest."""
    smallest_step = least_tokens(rows, shortening.least_used_tokens(pacing(1).lowest))
    return max(ceil_div(tokens, smallest_step), 1)


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the smallest value in [low, high] for which the monotone ``holds`` is true; it must be true at ``high``."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
