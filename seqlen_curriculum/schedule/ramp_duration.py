"""The steps of a ramp whose duration is given in tokens or as a fraction of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from seqlen_curriculum.schedule.adjusted_pacing import Rounding, bucketed
from seqlen_curriculum.schedule.global_batch import GlobalBatch, least_tokens
from seqlen_curriculum.schedule.pacing import Pacing, Root
from seqlen_curriculum.schedule.piecewise import ceil_div
from seqlen_curriculum.schedule.schedule_config import LinearSchedule
from seqlen_curriculum.schedule.shortening import TRUNCATE, Shortening
from seqlen_curriculum.schedule.timeline import Timeline

__all__ = ["Ramp", "ramp_steps", "ramp_steps_for_fraction", "ramp_steps_for_tokens"]


@dataclass(frozen=True)
class Ramp:
    """A ramp before its duration is known; lengths are rounded to ``bucket``, if one is given."""

    min_difficulty: int
    max_difficulty: int
    difficulty_step: int
    root_degree: float
    bucket: Rounding

    def pacing(self, total_steps: int) -> Pacing:
        """Return the ramp of ``total_steps`` steps. Raises ConfigError if no multiple of ``bucket`` fits."""
        bounds = (self.min_difficulty, self.max_difficulty, self.difficulty_step)
        return bucketed(Root(*bounds, total_steps, self.root_degree), self.bucket)


@lru_cache(maxsize=64)  # asked again for every number of ranks, and a ramp of many lengths takes a second
def ramp_steps(
    ramp: Ramp, schedule: LinearSchedule, rows: GlobalBatch | None, train_tokens: int | None, shortening: Shortening
) -> int | None:
    """Return the steps of ``ramp`` by the duration in ``schedule``, None if that needs ``rows`` or ``train_tokens``."""
    if schedule.total_curriculum_step is not None:
        return schedule.total_curriculum_step
    # Solved with the bucketed ramp, which the run uses: a coarser ramp needs more steps for the same tokens.
    if rows is not None and schedule.total_curriculum_tokens is not None:
        return ramp_steps_for_tokens(ramp.pacing, rows, schedule.total_curriculum_tokens, shortening)
    if rows is not None and train_tokens is not None and schedule.curriculum_fraction is not None:
        return ramp_steps_for_fraction(ramp.pacing, rows, train_tokens, schedule.curriculum_fraction, shortening)
    return None


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
