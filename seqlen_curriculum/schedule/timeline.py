"""The length, rows and consumed tokens of any step of a run, computed without training.

Lengths and rows are piecewise constant, so a timeline stores one entry per change of either and finds a step by
bisection. Of lengths that repeat it stores one period. The cost depends on the number of changes, not of steps.
"""

from __future__ import annotations

import numpy as np

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp
from seqlen_curriculum.schedule.custom_pacing import MOST_ASKED
from seqlen_curriculum.schedule.global_batch import (
    BatchGrowth,
    GlobalBatch,
    least_tokens,
    most_tokens,
    samples_by_step,
)
from seqlen_curriculum.schedule.pacing import Pacing, lengths_by_run
from seqlen_curriculum.schedule.piecewise import IntArray, Periodic, Piecewise, Steps, StepValues, ceil_div
from seqlen_curriculum.schedule.shortening import TRUNCATE, Shortening

__all__ = ["Timeline"]

_MOST_KINDS = 2**20
_MOST_LISTED = 2**22


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
        self._lengths = self._length_of_each_step(rows)
        # Per step: tokens used of each sample, samples, rows made from them, and tokens in all rows.
        used = self._lengths.map(shortening.used_tokens_per_sample)
        self._samples = samples_by_step(rows, used, train_tokens)
        self._rows = self._samples.times(self._lengths.map(shortening.rows_per_sample))
        self._tokens = self._samples.times(used)
        self.steps = self.steps_to(train_tokens)
        self._samples_at = dict[int, StepValues]()

    def _length_of_each_step(self, rows: GlobalBatch) -> Piecewise | Periodic:
        """Return the length of each step of the run and of the step after it."""
        pacing, least_used = self.pacing, self.shortening.least_used_tokens(self.pacing.lowest)
        last_step = ceil_div(self.train_tokens, least_tokens(rows, least_used)) + 1
        if pacing.settles_at is None and pacing.period is None:
            first_steps, lengths = self._ask(rows)
        else:
            first_steps, lengths = pacing.changes(min(last_step, pacing.period or last_step))
        used = self.shortening.used_tokens_per_sample(lengths)
        last_step = self._bound_steps(int(used.min()), int(used.max()), rows) + 1
        if pacing.period is not None and pacing.period <= last_step:
            return Periodic(Piecewise(first_steps, lengths), pacing.period)
        kept = first_steps <= last_step  # the sums of later ones could overflow
        return Piecewise(first_steps[kept], lengths[kept])

    def _bound_steps(self, least_used: int, most_used: int, rows: GlobalBatch) -> int:
        """Return an upper bound of the run's steps. Raises ConfigError if sums could overflow.

        Steps use ``least_used`` to ``most_used`` tokens of each sample.
        """
        most_steps = ceil_div(self.train_tokens, least_tokens(rows, least_used))
        # One step more, because the last step may exceed the budget.
        if (most_steps + 1) * most_tokens(rows, most_used) >= 2**63:
            raise ConfigError(
                f"training.train_tokens: {self.train_tokens} in steps of {self.global_batch} samples of {least_used} to "
                f"{most_used} tokens can't be counted in 64 bits; lower it"
            )
        return most_steps

    def _ask(self, rows: GlobalBatch) -> tuple[IntArray, IntArray]:
        """Return the changes of a pacing without a formula, which is asked for the steps of the run only."""
        longest = most_tokens(rows, self.shortening.most_used_tokens(self.pacing.highest))
        most_steps = MOST_ASKED if ceil_div(self.train_tokens, longest) <= MOST_ASKED else 0
        consumed, lengths, least_used, most_used = 0, list[int](), 2**24, 1
        tokens = dict[int, int]()  # by length: of one sample in a batch size warmup, else of a step
        for step in range(1, most_steps + 1):
            length = self.pacing(step)
            lengths.append(length)
            if length not in tokens:
                used = self.shortening.used_tokens_per_sample(length)
                least_used, most_used = min(least_used, used), max(most_used, used)
                self._bound_steps(least_used, most_used, rows)
                samples = rows if isinstance(rows, int) else 1
                if isinstance(rows, BatchGrowth):
                    samples = int(rows.samples(np.asarray([used]))[0])
                tokens[length] = used * samples
            consumed += rows(consumed) * tokens[length] if isinstance(rows, BatchSizeRamp) else tokens[length]
            if consumed >= self.train_tokens:
                return lengths_by_run(np.arange(1, step + 1), np.asarray(lengths, np.int64))
        raise ConfigError(
            f"training.train_tokens: {self.train_tokens} take more than {MOST_ASKED:,} steps, and the function of a custom "
            "schedule is called for each of them; raise train_batch_size, or use another schedule_type"
        )

    def seqlen(self, steps: Steps) -> Steps:
        """Return the sequence length of each step, in tokens."""
        # The pieces cover the run and take 1 us for one step. A pacing function takes 50 times as long.
        first, last = (steps, steps) if isinstance(steps, int) else (steps.min(initial=1), steps.max(initial=1))
        return self._lengths.at(steps) if first > 0 and last <= self.steps else self.pacing(steps)

    def samples(self, steps: Steps) -> Steps:
        """Return the samples that each step reads, over all ranks."""
        return self._samples.at(steps)

    def rows(self, steps: Steps) -> Steps:
        """Return the rows that each step trains on, over all ranks: its samples or their segments."""
        return self._rows.at(steps)

    def consumed_samples(self, steps: Steps) -> Steps:
        """Return the samples read by the end of each step."""
        return self._samples.total(steps)

    def consumed_tokens(self, steps: Steps) -> Steps:
        """Return the target tokens trained on by the end of each step; 0 for step 0."""
        return self._tokens.total(steps)

    def samples_at(self, seqlen: int, steps: Steps) -> Steps:
        """Return the samples read at length ``seqlen`` by the end of each step; 0 for step 0."""
        if seqlen not in self._samples_at:
            at_seqlen = self._lengths.map(lambda lengths: (lengths == seqlen).astype(np.int64))
            self._samples_at[seqlen] = self._samples.times(at_seqlen)
        return self._samples_at[seqlen].total(steps)

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

    def kinds_of_steps(self) -> tuple[IntArray, IntArray, IntArray]:
        """Return the length, the samples and the number of all steps that share both, one entry per kind, shortest first.

        Raises ConfigError for a batch size warmup with a long list of repeated lengths.
        """
        if isinstance(self._lengths, Periodic):
            lengths, samples, counts = self._repeated_kinds(self._lengths)
        else:
            assert isinstance(self._tokens, Piecewise)
            first_steps = self._tokens.first_steps[self._tokens.first_steps <= self.steps]
            lengths, samples = self._lengths.at(first_steps), self._samples.at(first_steps)
            counts = np.diff(first_steps, append=self.steps + 1)
        lengths, samples, order, first = _sorted_pairs(lengths, samples)
        return lengths, samples, np.add.reduceat(counts[order], first)

    def _repeated_kinds(self, repeated: Periodic) -> tuple[IntArray, IntArray, IntArray]:
        """Return length, samples and number of steps of each piece of the period, within each piece of the samples."""
        lengths, first_steps = repeated.values, np.ones(1, np.int64)
        samples = self._samples.at(repeated.cycle.first_steps)[None]  # (1, P) pieces of a period
        if isinstance(self._samples, Piecewise):  # (R, 1): the samples are warmed up, or constant
            first_steps = self._samples.first_steps[self._samples.first_steps <= self.steps]
            samples = self._samples.at(first_steps)[:, None]
        if len(first_steps) * len(lengths) > _MOST_KINDS:
            raise ConfigError(
                f"batch_size_warmup.increment: {len(first_steps):,} levels with {len(lengths):,} lengths in each cycle of "
                f"fixed_mixed give more than {_MOST_KINDS:,} shapes; raise it, or list fewer lengths"
            )
        ends = np.append(first_steps[1:] - 1, self.steps)
        counts = repeated.counts(ends) - repeated.counts(first_steps - 1)  # (R, P)
        kept = counts > 0
        return np.broadcast_to(lengths, counts.shape)[kept], np.broadcast_to(samples, counts.shape)[kept], counts[kept]

    def tokens_by_length(self) -> tuple[IntArray, IntArray]:
        """Return the lengths of the run, shortest first, and the target tokens trained on at each."""
        lengths, samples, counts = self.kinds_of_steps()
        tokens = counts * samples * self.shortening.used_tokens_per_sample(lengths)
        unique, first = np.unique(lengths, return_index=True)
        return unique, np.add.reduceat(tokens, first)

    def lengths(self) -> list[int]:
        """Return every sequence length of the run, shortest first."""
        lengths, _, _ = self.kinds_of_steps()
        unique: list[int] = np.unique(lengths).tolist()
        return unique

    def shapes(self) -> list[tuple[int, int]]:
        """Return every (rows, tokens per row) in the run, shortest rows first."""
        lengths, samples, _ = self.kinds_of_steps()
        rows, row_tokens = samples * self.shortening.rows_per_sample(lengths), self.shortening.tokens_per_row(lengths)
        row_tokens, rows, _, _ = _sorted_pairs(row_tokens, rows)
        return list(zip(rows.tolist(), row_tokens.tolist(), strict=True))

    def tokens_by_sample(self) -> Piecewise:
        """Return the target tokens of each sample in reading order; samples are numbered from 1, as steps are.

        Raises ConfigError if repeated lengths change too often to be listed.
        """
        # Indexed by sample: 2 steps of 4 samples of 8 tokens, then samples of 16, are 8 from sample 1 and 16 from sample 9.
        lengths = self._listed()
        first_samples = self.consumed_samples(lengths.first_steps - 1) + 1
        return Piecewise(first_samples, self.shortening.used_tokens_per_sample(lengths.values))

    def _listed(self) -> Piecewise:
        """Return the length of each step with one entry per change."""
        if isinstance(self._lengths, Piecewise):
            return self._lengths
        changes = len(self._lengths.values) * ceil_div(self.steps, self._lengths.period)
        if changes > _MOST_LISTED:
            raise ConfigError(
                f"data.leftovers: recycle needs a list of the changes of the length, and this run has {changes:,}, more "
                f"than {_MOST_LISTED:,}; set it to drop, or give each length of fixed_mixed more steps"
            )
        return Piecewise(*self._lengths.listed(self.steps))


def _sorted_pairs(first: IntArray, second: IntArray) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return the different pairs in ascending order, the order that sorts all of them, and where each pair starts in it."""
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    starts = np.flatnonzero(np.append(True, (first[1:] != first[:-1]) | (second[1:] != second[:-1])))
    return first[starts], second[starts], order, starts
