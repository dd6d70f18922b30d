"""The endless order in which a run reads the samples of a split: fresh ones, their leftovers, and again in another order.

Shapes: n rows; ``tokens`` of each are trained on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.data.leftovers import Epochs, Leftovers, Runs
from seqlen_curriculum.data.permutation import permute
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.schedule.piecewise import IntArray, Piecewise

__all__ = ["SampleStream", "TokenSpans"]

_BLOCK = 2**13  # rows, located in a millisecond


class TokenSpans(NamedTuple):
    """Neighbouring tokens of a corpus that lie side by side in a row, in no particular order.

    Columns ``[column, column + length)`` of row ``row`` have the inputs ``[start, start + length)`` of range ``of_range``;
    each one's target is the token after it.
    """

    row: IntArray
    column: IntArray
    length: IntArray
    of_range: IntArray
    start: IntArray


class SampleStream:
    """The rows of a run out of ``samples``, numbered from 0 on.

    ``used``: target tokens that each row uses of its sample (the first row is 1), to read what they leave over before the
    next epoch; None drops it.
    """

    def __init__(self, samples: Samples, used: Piecewise | None) -> None:
        self.samples = samples
        rest = samples.num_tokens - samples.num_samples * samples.seq_length
        self._epochs = Epochs(samples.num_samples, samples.num_tokens, samples.seq_length, used)
        self._leftovers = Leftovers(samples.num_samples, rest, samples.seq_length, used) if used is not None else None
        self._block = lru_cache(maxsize=4)(self._locate_block)

    def place(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """The epoch of each of ``rows`` (n,), ascending, and its number in it: below ``num_samples`` it is fresh."""
        epoch, start = self._epochs.of(rows)
        return epoch, rows - start

    def sample(self, epoch: IntArray, number: IntArray) -> IntArray:
        """The samples read as fresh rows ``number`` of each ``epoch``, (n,) both."""
        return permute(number, self.samples.num_samples, self.samples.seed, epoch)

    def read(self, rows: IntArray, tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Inputs and their targets, both (n, tokens) as stored, of ``rows`` (n,), neighbours."""
        epoch, number = self.place(rows)
        fresh = number < self.samples.num_samples
        if fresh[-1] and epoch[0] == epoch[-1]:
            located = self._fresh(int(epoch[0]), int(number[0]), len(rows))
        else:
            located = self.samples.locate(self.sample(epoch[fresh], number[fresh]))
        block = self.samples.gather(*located, tokens + 1)  # (fresh, tokens + 1)
        if fresh.all():
            return block[:, :-1], block[:, 1:]
        inputs, targets = np.empty((2, len(rows), tokens), dtype=self.samples.dtype)
        inputs[fresh], targets[fresh] = block[:, :-1], block[:, 1:]
        self._fill(inputs, targets, self.token_spans(rows, tokens, ~fresh))
        return inputs, targets

    def _fill(self, inputs: NDArray[Any], targets: NDArray[Any], token_spans: TokenSpans) -> None:
        corpora = [corpus.tokens for corpus, _, _ in self.samples.ranges]
        for row, column, length, of_range, start in zip(*(part.tolist() for part in token_spans), strict=True):
            found = corpora[of_range][start : start + length + 1]
            inputs[row, column : column + length], targets[row, column : column + length] = found[:-1], found[1:]
        rows = np.unique(token_spans.row)
        for tokens in (inputs[rows], targets[rows]):
            if self.samples.find_invalid_ids(tokens).size:  # gathering it again tells where it lies
                for of_range, start, length in zip(*token_spans[3:], token_spans.length, strict=True):
                    self.samples.gather(of_range[None], start[None], int(length) + 1)

    def _fresh(self, epoch: int, first: int, count: int) -> tuple[IntArray, IntArray]:
        """Range and start of the fresh rows from ``first`` on, (count,) each: out of blocks, which cost less a row."""
        blocks = range(first // _BLOCK, (first + count - 1) // _BLOCK + 1)
        of_range, start = (
            np.concatenate(parts) for parts in zip(*(self._block(epoch, one) for one in blocks), strict=True)
        )
        begin = first - blocks[0] * _BLOCK
        return of_range[begin : begin + count], start[begin : begin + count]

    def _locate_block(self, epoch: int, block: int) -> tuple[IntArray, IntArray]:
        rows = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.samples.num_samples))
        return self.samples.locate(self.sample(np.full_like(rows, epoch), rows))

    def token_spans(self, rows: IntArray, tokens: int, some: NDArray[np.bool_] | None = None) -> TokenSpans:
        """Where the first ``tokens`` of ``rows`` (n,), ascending, come from; only of ``some`` (n,) of them if given."""
        epoch, number = self.place(rows)
        asked = np.arange(len(rows)) if some is None else np.flatnonzero(some)
        if self._leftovers is None:
            zero = np.zeros_like(asked)
            corpus, start = self.samples.locate(self.sample(epoch[asked], number[asked]))
            return TokenSpans(asked, zero, zero + tokens, corpus, start)
        runs = self._leftovers.runs(
            number[asked], (rows - number)[asked], tokens, lambda row, number: self.sample(epoch[asked][row], number)
        )
        return self._located(runs._replace(row=asked[runs.row]))

    def _located(self, runs: Runs) -> TokenSpans:
        row, column, length, id_, start = (part[~runs.rest] for part in runs[:5])
        corpus, first = self.samples.locate(id_)
        found = [TokenSpans(row, column, length, corpus, first + start)]
        row, column, length, _, place = (part[runs.rest] for part in runs[:5])
        while len(row):  # the rest of one range is followed by that of the next
            corpus, first, available = self.samples.locate_rest(place)
            taken = np.minimum(length, available)
            found.append(TokenSpans(row, column, taken, corpus, first))
            more = length > taken
            row, column, length, place = (part[more] for part in (row, column + taken, length - taken, place + taken))
        return TokenSpans(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
