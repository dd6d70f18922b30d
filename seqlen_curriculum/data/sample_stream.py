"""The endless order in which a run reads the samples of a split: fresh ones, their leftovers, then again in a new order.

A row is one sample in reading order. Shapes: n rows, of which the first ``tokens`` are trained on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.data.leftovers import Epochs, Leftovers, Runs
from seqlen_curriculum.data.permutation import permute
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.schedule.piecewise import IntArray, Piecewise

__all__ = ["SampleStream", "TokenSpans"]

_BLOCK = 2**13  # rows, located in a millisecond
_KEPT_BLOCKS = 4


class TokenSpans(NamedTuple):
    """Neighbouring tokens of a corpus that are neighbours in a row too, in no particular order; (spans,) each.

    Columns ``[column, column + length)`` of row ``row`` hold the inputs ``[start, start + length)`` of the corpus of range
    ``range_index``. The target of each input is the token after it.
    """

    row: IntArray
    column: IntArray
    length: IntArray
    range_index: IntArray
    start: IntArray

    @classmethod
    def of_runs(cls, runs: Runs, samples: Samples) -> TokenSpans:
        """Return where the tokens of ``runs`` lie in the corpora of ``samples``; a run of the rest may be several spans."""
        row, column, length, sample, start = (part[~runs.rest] for part in runs[:5])
        range_index, first = samples.locate(sample)
        spans = [cls(row, column, length, range_index, first + start)]
        row, column, length, _, position = (part[runs.rest] for part in runs[:5])
        # The rest is what each range has at its end, one after the other: a run that needs 5 tokens where its range has 2
        # left takes these, and 3 from the range after it in the next turn.
        while len(row):
            range_index, first, available = samples.locate_rest(position)
            taken = np.minimum(length, available)
            spans.append(cls(row, column, taken, range_index, first))
            more = length > taken
            row, column, position = row[more], (column + taken)[more], (position + taken)[more]
            length = (length - taken)[more]
        return cls(*(np.concatenate(parts) for parts in zip(*spans, strict=True)))

    def copy(self, samples: Samples, inputs: NDArray[Any], targets: NDArray[Any]) -> None:
        """Copy the tokens of all spans into their rows of ``inputs`` and ``targets``, both (n, tokens).

        Raises ``DataError`` for an id outside the vocabulary.
        """
        corpora = [corpus.tokens for corpus, _, _ in samples.ranges]
        for row, column, length, index, start in zip(*(part.tolist() for part in self), strict=True):
            tokens = corpora[index][start : start + length + 1]
            inputs[row, column : column + length] = tokens[:-1]
            targets[row, column : column + length] = tokens[1:]
        rows = np.unique(self.row)
        for copied in (inputs[rows], targets[rows]):
            if samples.find_invalid_ids(copied).size:
                # Which position of which corpus it has is known span by span: gathering them again raises at the first.
                for index, start, length in zip(self.range_index, self.start, self.length, strict=True):
                    samples.gather(index[None], start[None], int(length) + 1)


class SampleStream:
    """The rows that a run reads of ``samples``, numbered from 0.

    ``used`` are the target tokens that each row uses of its sample (the first row is 1): what they leave over is read before
    the next epoch. With None it is dropped.
    """

    def __init__(self, samples: Samples, used: Piecewise | None) -> None:
        self.samples = samples
        rest = samples.num_tokens - samples.num_samples * samples.seq_length
        self._epochs = Epochs(samples.num_samples, samples.num_tokens, samples.seq_length, used)
        self._leftovers = Leftovers(samples.num_samples, rest, samples.seq_length, used) if used is not None else None
        self._blocks: dict[tuple[int, int], tuple[IntArray, IntArray]] = {}  # of (epoch, block), the latest few

    def locate(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return the epoch of each of ``rows`` (n,), ascending, and its number in it: below ``num_samples`` it is fresh."""
        epoch, start = self._epochs.of(rows)
        return epoch, rows - start

    def sample(self, epoch: IntArray, number: IntArray) -> IntArray:
        """Return the samples read as fresh rows ``number`` of each ``epoch``, (n,) both."""
        return permute(number, self.samples.num_samples, self.samples.seed, epoch)

    def read(self, rows: IntArray, tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return inputs and targets, both (n, tokens) in the corpora's dtype, of ``rows`` (n,), ascending neighbours."""
        epoch, number = self.locate(rows)
        fresh = number < self.samples.num_samples
        if fresh[-1] and epoch[0] == epoch[-1]:  # all of them are fresh, as numbers ascend within an epoch
            located = self._locate_fresh(int(epoch[0]), int(number[0]), len(rows))
        else:
            located = self.samples.locate(self.sample(epoch[fresh], number[fresh]))
        block = self.samples.gather(*located, tokens + 1)  # (fresh rows, tokens + 1)
        if fresh.all():
            return block[:, :-1], block[:, 1:]
        inputs, targets = np.empty((2, len(rows), tokens), dtype=self.samples.dtype)
        inputs[fresh], targets[fresh] = block[:, :-1], block[:, 1:]
        self.token_spans(rows, tokens, ~fresh).copy(self.samples, inputs, targets)
        return inputs, targets

    def _locate_fresh(self, epoch: int, first: int, count: int) -> tuple[IntArray, IntArray]:
        """Return range index and start of the fresh rows ``first`` to ``first + count`` of ``epoch``, (count,) each."""
        # Whole blocks are located, and kept for the steps that follow: 8,192 rows are 16 steps of 512, and cost about a
        # fifth per row, as most of a small call is numpy's overhead.
        blocks = range(first // _BLOCK, (first + count - 1) // _BLOCK + 1)
        located = []
        for block in blocks:
            if (kept := self._blocks.get((epoch, block))) is None:
                rows = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.samples.num_samples))
                kept = self.samples.locate(self.sample(np.full_like(rows, epoch), rows))
                self._blocks[epoch, block] = kept
            located.append(kept)
        for key in list(self._blocks)[:-_KEPT_BLOCKS]:
            self._blocks.pop(key, None)
        range_index, start = located[0]
        if len(located) > 1:
            range_index, start = (np.concatenate(parts) for parts in zip(*located, strict=True))
        begin = first - blocks[0] * _BLOCK
        return range_index[begin : begin + count], start[begin : begin + count]

    def token_spans(self, rows: IntArray, tokens: int, some: NDArray[np.bool_] | None = None) -> TokenSpans:
        """Return where the first ``tokens`` of ``rows`` (n,), ascending, come from; ``some`` (n,) selects a part of them."""
        epoch, number = self.locate(rows)
        asked = np.arange(len(rows)) if some is None else np.flatnonzero(some)
        epoch, number, epoch_start = epoch[asked], number[asked], (rows - number)[asked]
        if self._leftovers is None:
            zero = np.zeros_like(asked)
            return TokenSpans(asked, zero, zero + tokens, *self.samples.locate(self.sample(epoch, number)))
        runs = self._leftovers.runs(
            number, epoch_start, tokens, lambda row, fresh_number: self.sample(epoch[row], fresh_number)
        )
        spans = TokenSpans.of_runs(runs, self.samples)
        return spans._replace(row=asked[spans.row])
