"""Which tokens the samples of an epoch are made of, once the tokens that short lengths left over are read as samples too.

A stream has P tokens to train on (pairs of an input and the token after it): N whole samples of L, and a rest. Its rows
are numbered from 0 over the whole run. Row m uses the first ``used(m)`` tokens of its sample and leaves the others. An
epoch reads the N fresh samples first; its row N + j is made of the leftovers ``[j * L, j * L + L)``, laid end to end as they
were left: the stream's rest before all, then those of each row, also of rows that were made of leftovers themselves. The
epoch ends when what is left doesn't fill a sample. As each token read was either used or left, that is exactly when

    tokens used in the epoch > P - L

so epochs follow from a running sum alone. A token's way back from row to row is a bisection in another running sum, of one
entry for each change of length: nothing is recorded, and any row of a run is resolved by itself.

Shapes: n rows asked for; R runs, token_spans of neighbouring tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.schedule.piecewise import IntArray, Piecewise

__all__ = ["Epochs", "Leftovers", "Runs"]

_NEVER = 2**62


class Epochs:
    """Where the epochs of a stream begin.

    With ``used`` (tokens that each row uses; its first row is 1) leftovers are recycled, else an epoch has ``fresh`` rows.
    While the length stays, all epochs have as many rows: two entries for each change of length hold them all.
    """

    def __init__(self, fresh: int, tokens: int, seq_length: int, used: Piecewise | None) -> None:
        self._used, self._all_but_a_sample = used, tokens - seq_length
        # From each row on, the number of the epoch that begins there, and the rows of it and those after it.
        self._starts, self._epochs, self._rows = [0], [0], [fresh]
        self._next = _NEVER, 0  # where the next entry begins, and its epoch
        if used is not None:
            self._starts, self._epochs, self._rows = [], [], []
            self._next = 0, 0

    def of(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """The epoch of each of ``rows`` (n,), ascending, and the row where that epoch began."""
        while self._next[0] <= rows[-1]:
            self._grow()
        entries = slice(bisect_right(self._starts, rows[0]) - 1, bisect_right(self._starts, rows[-1]))
        starts, epochs, length = (np.asarray(part[entries]) for part in (self._starts, self._epochs, self._rows))
        entry = np.searchsorted(starts, rows, side="right") - 1
        further = (rows - starts[entry]) // length[entry]
        return epochs[entry] + further, starts[entry] + further * length[entry]

    def _grow(self) -> None:
        """One more entry: the epochs within a piece of one length, or the one that reaches out of it."""
        assert self._used is not None
        start, epoch = self._next
        piece = int(np.searchsorted(self._used.first_steps, start + 1, side="right")) - 1
        rows = self._all_but_a_sample // int(self._used.values[piece]) + 1
        last = piece + 1 == len(self._used.values)
        count = _NEVER if last else (int(self._used.first_steps[piece + 1]) - 1 - start) // rows
        if not count:
            done = self._used.total(start)
            rows, count = self._used.steps_to(done + self._all_but_a_sample + 1) - start, 1
        self._starts.append(start)
        self._epochs.append(epoch)
        self._rows.append(rows)
        self._next = start + count * rows, epoch + count


class Runs(NamedTuple):
    """TokenSpans of neighbouring tokens: ``length`` pairs from column ``column`` of row ``row``, of what ``id`` names.

    ``id`` is a sample and ``start`` a column in it; or, where ``rest`` is true, the stream's rest and a position there.
    """

    row: IntArray  # (R,) index in the rows asked for
    column: IntArray
    length: IntArray
    id: IntArray
    start: IntArray
    rest: NDArray[np.bool_]


class Leftovers:
    """Where the tokens of rows that are made of leftovers come from."""

    def __init__(self, fresh: int, rest_tokens: int, seq_length: int, used: Piecewise) -> None:
        self._fresh, self._rest, self._seq_length = fresh, rest_tokens, seq_length
        left = used.map(lambda tokens: seq_length - tokens)
        self._left_before = left.total  # leftovers of the first m rows
        kept = left.values > 0  # a piece that leaves nothing has no place among the leftovers
        rows = np.diff(left.first_steps, append=left.first_steps[-1])  # the last piece is never counted
        # One entry a piece: its first row, what a row leaves, leftovers and leaving rows before it.
        self._first_row = left.first_steps[kept] - 1
        self._per_row = left.values[kept]
        self._before = left.total(self._first_row)
        self._rows_before = np.cumsum(np.where(kept, rows, 0))[kept] - rows[kept]

    def runs(
        self, number: IntArray, start: IntArray, tokens: int, sample: Callable[[IntArray, IntArray], IntArray]
    ) -> Runs:
        """The first ``tokens`` of each row: the ``number``-th (n,) of the epoch that began with row ``start`` (n,).

        ``sample(row, number)`` tells the sample that is the fresh row ``number`` for the row asked for.
        """
        zero = np.zeros_like(number)
        todo: tuple[IntArray, ...] = (np.arange(len(number)), zero, zero + tokens, number, zero)
        done: list[Runs] = []
        while len(todo[0]):
            row, column, length, number, at = todo
            fresh = number < self._fresh
            done.append(
                Runs(
                    row[fresh],
                    column[fresh],
                    length[fresh],
                    sample(row[fresh], number[fresh]),
                    at[fresh],
                    ~fresh[fresh],
                )
            )
            row, column, length = row[~fresh], column[~fresh], length[~fresh]
            place = (number[~fresh] - self._fresh) * self._seq_length + at[~fresh]  # among the leftovers of the epoch
            resting = np.clip(self._rest - place, 0, length)
            some = resting > 0
            done.append(Runs(row[some], column[some], resting[some], -np.ones_like(row[some]), place[some], some[some]))
            todo = self._left_by(row, column + resting, length - resting, place + resting - self._rest, start)
        return Runs(*(np.concatenate(parts) for parts in zip(*done, strict=True)))

    def _left_by(
        self, row: IntArray, column: IntArray, length: IntArray, place: IntArray, start: IntArray
    ) -> tuple[IntArray, ...]:
        """The rows that left the leftovers ``[place, place + length)`` behind, part by part: as ``todo`` of ``runs``."""
        some = length > 0
        row, column, length = row[some], column[some], length[some]
        begins = start[row]
        first = place[some] + self._left_before(begins)  # among the leftovers of the whole run
        left_by, last = self._leaver(first), self._leaver(first + length - 1)
        parts = last - left_by + 1
        owner = np.repeat(np.arange(len(row)), parts)
        leaver = left_by[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
        piece = np.searchsorted(self._rows_before, leaver, side="right") - 1
        within = leaver - self._rows_before[piece]
        its_first = self._before[piece] + within * self._per_row[piece]
        low = np.maximum(first[owner], its_first)
        high = np.minimum((first + length)[owner], its_first + self._per_row[piece])
        return (
            row[owner],
            column[owner] + low - first[owner],
            high - low,
            self._first_row[piece] + within - begins[owner],
            self._seq_length - self._per_row[piece] + low - its_first,
        )

    def _leaver(self, place: IntArray) -> IntArray:
        """How many rows left something before the one that left the token at ``place`` of the whole run's leftovers."""
        piece = np.searchsorted(self._before, place, side="right") - 1
        leaver: IntArray = self._rows_before[piece] + (place - self._before[piece]) // self._per_row[piece]
        return leaver
