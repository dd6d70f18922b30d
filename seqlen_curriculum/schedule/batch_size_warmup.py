"""Batch size warmup as in GPT-3, the paper's baseline: the rows of a step grow with consumed tokens.

Source: Megatron-LM's ``--rampup-batch-size START INCREMENT SAMPLES``, counted in target tokens instead of samples. In
Section 5.1 of the paper it does not improve stability.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Count, Section
from seqlen_curriculum.schedule.piecewise import Periodic, Piecewise, ceil_div

__all__ = ["BatchSizeRamp", "BatchSizeWarmup"]

BLOCK = "batch_size_warmup"
_MOST_INCREMENTS = 2**12


class BatchSizeWarmup(Section):
    """The ``batch_size_warmup`` section; the warmup ends at ``train_batch_size`` rows."""

    start: Count
    """Rows of the first step over all ranks (GPT-3 125M: 16 of 256)."""
    increment: Count
    """Rows added at each level; a divisor of ``train_batch_size - start``."""
    tokens: Count
    """Consumed target tokens after which every step has ``train_batch_size`` rows (GPT-3: 4e9)."""

    def rows(self, train_batch_size: int) -> BatchSizeRamp:
        """Return the warmup to ``train_batch_size``. Raises ConfigError unless it is a whole number of increments."""
        if self.start >= train_batch_size:
            raise ConfigError(
                f"{BLOCK}.start: {self.start} is not below train_batch_size {train_batch_size}, the end of the warmup; "
                "lower it, or remove the section"
            )
        if (train_batch_size - self.start) % self.increment:
            raise ConfigError(
                f"{BLOCK}.increment: {self.increment} doesn't divide the {train_batch_size - self.start} rows from start "
                f"{self.start} to train_batch_size {train_batch_size}; give a divisor"
            )
        ramp = BatchSizeRamp(self.start, self.increment, self.tokens, train_batch_size)
        if ramp.increments > _MOST_INCREMENTS:
            raise ConfigError(
                f"{BLOCK}.increment: {self.increment} gives {ramp.increments:,} levels from start {self.start} to "
                f"train_batch_size {train_batch_size}, at most {_MOST_INCREMENTS:,} are planned; raise it"
            )
        return ramp

    def check_ranks(self, world_size: int, micro_batch: int = 1) -> None:
        """Raise ConfigError unless every level divides over the ranks, into whole micro-batches of ``micro_batch`` rows."""
        # Every level is start plus a number of increments, so both must divide.
        for name, rows in (("start", self.start), ("increment", self.increment)):
            if rows % world_size:
                raise ConfigError(
                    f"{BLOCK}.{name}: {rows} rows don't divide over {world_size} data-parallel ranks; use a multiple of "
                    f"{world_size}"
                )
            if rows // world_size % micro_batch:
                raise ConfigError(
                    f"{BLOCK}.{name}: {rows} rows are {rows // world_size} per rank, not a multiple of the micro-batch of "
                    f'{micro_batch} rows that training.micro_batch "fixed" requires; use a multiple of '
                    f'{world_size * micro_batch}, lower train_micro_batch_size_per_gpu, or set micro_batch to "balanced"'
                )


@dataclass(frozen=True)
class BatchSizeRamp:
    """Rows that increase from ``start`` to ``final`` by ``increment``, evenly spaced over ``tokens`` consumed tokens.

    GPT-3 125M: 16 to 256 rows by 16 takes 15 increments, one after every 4e9 / 15 = 266,666,666.7 tokens.
    """

    start: int
    increment: int
    tokens: int
    final: int

    @property
    def increments(self) -> int:
        """The number of increments."""
        return (self.final - self.start) // self.increment

    def __call__(self, consumed_tokens: int) -> int:
        """Return the rows of the step that starts after ``consumed_tokens``, in exact integers."""
        return self.start + self.increment * min(consumed_tokens * self.increments // self.tokens, self.increments)

    def by_step(self, lengths: Piecewise | Periodic, train_tokens: int) -> Piecewise:
        """Return the rows of each step of a run of ``train_tokens`` with these ``lengths``, by one bisection per level.

        If samples are not truncated, ``lengths`` are the used tokens of a sample, and the result counts samples.
        """
        # Rows 2, 4, 6 with 20 tokens per level, lengths 4, 4, 4, 8: steps of 8 tokens reach 20 at step 3, with 24 consumed;
        # step 4 has 4 rows of 8 tokens and reaches 56, past 40; step 5 has 6 rows.
        first_steps, rows, consumed = [1], [self.start], 0
        increments, row_tokens = self.increments, 0  # row_tokens: of one row in all steps so far
        while rows[-1] < self.final and consumed < train_tokens:
            level = (rows[-1] - self.start) // self.increment
            # The level ends with the first step that reaches its share of the tokens. All its steps have the same rows,
            # so that is the step at which a single row has consumed 1 / rows of the missing tokens.
            level_ends_at = ceil_div((level + 1) * self.tokens, increments)  # consumed tokens
            last_step = lengths.steps_to(row_tokens + ceil_div(level_ends_at - consumed, rows[-1]))
            row_tokens, before = lengths.total(last_step), row_tokens
            consumed += rows[-1] * (row_tokens - before)
            first_steps.append(last_step + 1)
            rows.append(self(consumed))  # a long step may skip levels
        return Piecewise(np.asarray(first_steps, np.int64), np.asarray(rows, np.int64))
