"""The order in which a run reads the samples of a split. Each epoch reads the fresh samples in a new order, then leftovers.

A row is one sample in reading order. Shapes: n rows, of which the first ``tokens`` tokens are trained on.
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

_BLOCK = 2**13  # rows, located in 1 ms
_KEPT_BLOCKS = 4


class TokenSpans(NamedTuple):
    """Runs of tokens that are contiguous both in a corpus and in a row, in no particular order; (spans,) each.

    Columns ``[column, column + length)`` of row ``row`` hold the inputs ``[start, start + length)`` from the corpus of range
    ``range_index``. The target of each input is the next token.
    """

    row: IntArray
    column: IntArray
    length: IntArray
    range_index: IntArray
    start: IntArray

    @classmethod
    def of_runs(cls, runs: Runs, samples: Samples) -> TokenSpans:
        """Return the positions of ``runs`` in the corpora of ``samples``; a run of the rest may give several spans."""
        row, column, length, sample, start = (part[~runs.rest] for part in runs[:5])
        range_index, first = samples.locate(sample)
        spans = [cls(row, column, length, range_index, first + start)]
        row, column, length, _, position = (part[runs.rest] for part in runs[:5])
        # The rest is the concatenation of the ends of all ranges: a run of 5 tokens that starts 2 tokens before the end of
        # a range takes these 2, and in the next iteration 3 from the next range.
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
        for corpus, _, _ in samples.ranges:
            corpus.check_size()
        corpora = [corpus.tokens for corpus, _, _ in samples.ranges]
        for row, column, length, index, start in zip(*(part.tolist() for part in self), strict=True):
            tokens = corpora[index][start : start + length + 1]
            inputs[row, column : column + length] = tokens[:-1]
            targets[row, column : column + length] = tokens[1:]
        rows = np.unique(self.row)
        for copied in (inputs[rows], targets[rows]):
            if samples.find_invalid_ids(copied).size:
                # The position of an invalid id is only known per span, so gather each span again: the first bad one raises.
                for index, start, length in zip(self.range_index, self.start, self.length, strict=True):
                    samples.gather(index[None], start[None], int(length) + 1)


class SampleStream:
    """The rows that a run reads from ``samples``, numbered from 0.

    ``used`` gives the target tokens that each row uses of its sample (the first row is 1). The unused tokens are read
    before the next epoch. With None they are dropped.
    """

    def __init__(self, samples: Samples, used: Piecewise | None) -> None:
        self.samples = samples
        rest = samples.num_tokens - samples.num_samples * samples.seq_length
        self._epochs = Epochs(samples.num_samples, samples.num_tokens, samples.seq_length, used)
        self._leftovers = Leftovers(samples.num_samples, rest, samples.seq_length, used) if used is not None else None
        self._blocks: dict[tuple[int, int], tuple[IntArray, IntArray]] = {}  # the latest few, by (epoch, block)

    def locate(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return the epoch of each of ``rows`` (n,), ascending, and its index in the epoch; fresh below ``num_samples``."""
        epoch, start = self._epochs.of(rows)
        return epoch, rows - start

    def sample(self, epoch: IntArray, number: IntArray) -> IntArray:
        """Return the sample of fresh row ``number`` in ``epoch``, (n,) both."""
        return permute(number, self.samples.num_samples, self.samples.seed, epoch)

    def read(self, rows: IntArray, tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return inputs and targets of the consecutive ``rows`` (n,), both (n, tokens) in the corpora's dtype."""
        epoch, number = self.locate(rows)
        fresh = number < self.samples.num_samples
        if fresh[-1] and epoch[0] == epoch[-1]:  # all are fresh, because indices ascend within an epoch
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
        # Whole blocks are located and cached for the next steps. A block of 8,192 rows, 16 steps of 512, costs a fifth per
        # row of a small call, which is mostly numpy's overhead.
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
        """Return the origin of the first ``tokens`` tokens of ``rows`` (n,), ascending; ``some`` (n,) selects rows."""
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
