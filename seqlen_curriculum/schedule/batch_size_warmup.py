"""Rows of a step that grow with consumed tokens: the batch size warmup of GPT-3, the paper's baseline.

Source: Megatron-LM's ``--rampup-batch-size START INCREMENT SAMPLES``, counted in target tokens instead of samples. The
paper compares with it in Section 5.1: the batch grows, but training gets no more stable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Count, Section
from seqlen_curriculum.schedule.piecewise import Piecewise

__all__ = ["BatchSizeRamp", "BatchSizeWarmup", "lowest_rows", "rows_by_step"]

BLOCK = "batch_size_warmup"


class BatchSizeWarmup(Section):
    """The ``batch_size_warmup`` section; ``train_batch_size`` is where it ends."""

    start: Count
    """Rows of the first step over all ranks (GPT-3 125M: 16 of 256)."""
    increment: Count
    """Rows that each level adds; a whole number of them lead from ``start`` to ``train_batch_size``."""
    tokens: Count
    """Consumed target tokens from which on a step has ``train_batch_size`` rows (GPT-3: 4e9)."""

    def rows(self, train_batch_size: int) -> BatchSizeRamp:
        """The warmup that ends at ``train_batch_size``. ConfigError if no whole number of increments leads there."""
        if self.start >= train_batch_size:
            raise ConfigError(
                f"{BLOCK}.start: {self.start} is not below train_batch_size {train_batch_size}, where the warmup ends; "
                "lower it, or leave the section out"
            )
        if (train_batch_size - self.start) % self.increment:
            raise ConfigError(
                f"{BLOCK}.increment: {self.increment} doesn't divide the {train_batch_size - self.start} rows from start "
                f"{self.start} to train_batch_size {train_batch_size}; give a divisor"
            )
        return BatchSizeRamp(self.start, self.increment, self.tokens, train_batch_size)

    def check_ranks(self, world_size: int, micro_batch: int = 1) -> None:
        """Every level must divide over the ranks, into whole micro-batches where their rows are fixed. ConfigError."""
        for name, rows in (("start", self.start), ("increment", self.increment)):
            if rows % world_size:
                raise ConfigError(
                    f"{BLOCK}.{name}: {rows} rows don't divide over {world_size} data-parallel ranks; make it a multiple"
                )
            if rows // world_size % micro_batch:
                raise ConfigError(
                    f"{BLOCK}.{name}: {rows} rows are {rows // world_size} a rank, no multiple of the micro-batch of "
                    f'{micro_batch} rows that training.micro_batch "fixed" asks for; make it a multiple of '
                    f'{world_size * micro_batch}, lower train_micro_batch_size_per_gpu, or use "balanced"'
                )


@dataclass(frozen=True)
class BatchSizeRamp:
    """``start`` rows, ``increment`` more for each equal share of ``tokens`` consumed, ``final`` once all are."""

    start: int
    increment: int
    tokens: int
    final: int

    def __call__(self, consumed_tokens: int) -> int:
        """Rows of the step before which ``consumed_tokens`` were consumed: exact integers."""
        increments = (self.final - self.start) // self.increment
        return self.start + self.increment * min(consumed_tokens * increments // self.tokens, increments)

    def _tokens_to_leave(self, rows: int) -> int:
        """Consumed tokens from which on a step has more than ``rows`` rows."""
        increments = (self.final - self.start) // self.increment
        level = (rows - self.start) // self.increment
        return -(-(level + 1) * self.tokens // increments)

    def by_step(self, lengths: Piecewise) -> Piecewise:
        """Rows of each step of a run with these ``lengths``: one bisection for each level, whatever the number of steps."""
        first_steps, rows, consumed = [1], [self.start], 0
        while rows[-1] < self.final:
            done = lengths.total(first_steps[-1] - 1)  # tokens of one row so far
            missing = self._tokens_to_leave(rows[-1]) - consumed
            last_step = lengths.steps_to(done - (-missing // rows[-1]))
            consumed += rows[-1] * (lengths.total(last_step) - done)
            first_steps.append(last_step + 1)
            rows.append(self(consumed))  # a long step may jump over levels
        return Piecewise(np.asarray(first_steps, np.int64), np.asarray(rows, np.int64))


def rows_by_step(rows: int | BatchSizeRamp, lengths: Piecewise) -> Piecewise:
    """Rows of each step of a run with these ``lengths``."""
    return Piecewise.constant(rows) if isinstance(rows, int) else rows.by_step(lengths)


def lowest_rows(rows: int | BatchSizeRamp) -> int:
    """Rows of the smallest step."""
    return rows if isinstance(rows, int) else rows.start
