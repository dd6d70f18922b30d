"""The tokens of each sample of an epoch when leftovers are recycled: tokens that short lengths left unused become samples.

A stream has P target tokens (pairs of an input and the next token): N whole samples of L tokens, and a rest. Rows are
numbered from 0 over the whole run. Row m uses the first ``used(m)`` tokens of its sample and leaves the others. An epoch
reads the N fresh samples first. Its row N + j consists of leftovers ``[j * L, j * L + L)``, where the leftovers are
concatenated in this order: the rest of the stream, then those of each row, including rows made of leftovers. The epoch
ends when the remaining leftovers don't fill a sample. Every token is either used or left, so that is exactly when

    tokens used in the epoch > P - L

and epochs follow from a running sum. The origin of a leftover is found by bisection in a second running sum, with one entry
per change of length. Nothing is recorded, and any row of a run is resolved independently.

Shapes: n requested rows, R runs of neighbouring tokens.
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
    """The rows where the epochs of a stream start.

    ``used`` gives the tokens that each row uses of its sample (the first row is 1). With None leftovers are dropped, and an
    epoch has ``fresh`` rows. Epochs at a constant length have the same number of rows, so two entries per change of length
    describe all epochs.
    """

    def __init__(self, fresh: int, tokens: int, seq_length: int, used: Piecewise | None) -> None:
        self._used, self._all_but_a_sample = used, tokens - seq_length
        # Epochs from epochs[i] on, which starts at row starts[i], have rows[i] rows each.
        self._starts, self._epochs, self._rows = [0], [0], [fresh]
        self._next = _NEVER, 0  # the row where the next entry starts, and its epoch
        if used is not None:
            self._starts, self._epochs, self._rows = [], [], []
            self._next = 0, 0

    def of(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return the epoch of each of ``rows`` (n,), ascending, and the first row of that epoch."""
        while self._next[0] <= rows[-1]:
            self._add_entry()
        entries = slice(bisect_right(self._starts, rows[0]) - 1, bisect_right(self._starts, rows[-1]))
        starts, epochs, length = (np.asarray(part[entries]) for part in (self._starts, self._epochs, self._rows))
        entry = np.searchsorted(starts, rows, side="right") - 1
        further = (rows - starts[entry]) // length[entry]
        return epochs[entry] + further, starts[entry] + further * length[entry]

    def _add_entry(self) -> None:
        """Add the epochs within a piece of constant length, or the one epoch that extends beyond it."""
        assert self._used is not None
        start, epoch = self._next
        piece = int(np.searchsorted(self._used.first_steps, start + 1, side="right")) - 1
        # An epoch ends with the row that raises the used tokens above P - L. With P = 20 and L = 8, rows that use 3 tokens
        # give epochs of 12 // 3 + 1 = 5 rows (15 > 12). If rows 0 to 6 use 3 tokens and later ones 8, the second epoch has
        # two rows of 3 and one of 8 (14 > 12).
        rows = self._all_but_a_sample // int(self._used.values[piece]) + 1
        is_last_piece = piece + 1 == len(self._used.values)
        count = _NEVER if is_last_piece else (int(self._used.first_steps[piece + 1]) - 1 - start) // rows
        if not count:
            used_before = self._used.total(start)
            rows, count = self._used.steps_to(used_before + self._all_but_a_sample + 1) - start, 1
        self._starts.append(start)
        self._epochs.append(epoch)
        self._rows.append(rows)
        self._next = start + count * rows, epoch + count


class Runs(NamedTuple):
    """Runs of ``length`` neighbouring tokens at column ``column`` of row ``row``, and their origin.

    The origin is column ``start`` of sample ``id``. If ``rest`` is true it is position ``start`` in the rest of the stream,
    and ``id`` is -1.
    """

    row: IntArray  # (R,) index among the requested rows
    column: IntArray
    length: IntArray
    id: IntArray
    start: IntArray
    rest: NDArray[np.bool_]


class Leftovers:
    """The origin of the tokens in rows that are made of leftovers."""

    def __init__(self, fresh: int, rest_tokens: int, seq_length: int, used: Piecewise) -> None:
        self._fresh, self._rest, self._seq_length = fresh, rest_tokens, seq_length
        left = used.map(lambda tokens: seq_length - tokens)
        self._left_before = left.total  # leftovers of the first m rows
        leaves = left.values > 0  # pieces whose rows use whole samples have no leftovers and no entry
        num_rows = np.diff(left.first_steps, append=left.first_steps[-1])  # the last piece is never counted
        # One entry per piece: its first row, leftovers per row, and leftovers and rows with leftovers before it. Rows that
        # use 2, 4, 4, 2 of 4 tokens give first rows 0 and 3, 2 and 2 per row, 0 and 2 leftovers and 0 and 1 rows before.
        self._first_row = left.first_steps[leaves] - 1
        self._per_row = left.values[leaves]
        self._before = left.total(self._first_row)
        self._rows_before = np.cumsum(np.where(leaves, num_rows, 0))[leaves] - num_rows[leaves]

    def runs(
        self, number: IntArray, start: IntArray, tokens: int, sample: Callable[[IntArray, IntArray], IntArray]
    ) -> Runs:
        """Return the origin of the first ``tokens`` tokens of each row ``number`` of the epoch that starts at row ``start``.

        Both are (n,). ``sample(row, number)`` returns the sample of fresh row ``number`` in the epoch of requested row
        ``row``.
        """
        # Samples of 4 tokens, each row uses 1, two fresh rows a and b, a rest r of 2 tokens. The leftovers are
        # r0 r1 a1 a2 | a3 b1 b2 b3 | ..., and row 2 of the epoch is the first four: r0 and r1 from the rest, a1 and a2
        # from columns 1 and 2 of row 0. Row 0 is fresh, so its sample is known. Columns of a row made of leftovers are
        # looked up in the same way in the next iteration.
        zero = np.zeros_like(number)
        pending: tuple[IntArray, ...] = (np.arange(len(number)), zero, zero + tokens, number, zero)
        resolved: list[Runs] = []
        while len(pending[0]):
            row, column, length, number, at = pending
            fresh = number < self._fresh
            ids = sample(row[fresh], number[fresh])
            resolved.append(Runs(row[fresh], column[fresh], length[fresh], ids, at[fresh], np.zeros(len(ids), bool)))
            row, column, length = row[~fresh], column[~fresh], length[~fresh]
            place = (number[~fresh] - self._fresh) * self._seq_length + at[~fresh]  # among the leftovers of the epoch
            of_rest = np.clip(self._rest - place, 0, length)  # number of tokens in the rest, which is first
            some = of_rest > 0
            no_id = np.full(np.count_nonzero(some), -1)
            resolved.append(Runs(row[some], column[some], of_rest[some], no_id, place[some], np.ones(len(no_id), bool)))
            pending = self._left_by(row, column + of_rest, length - of_rest, place + of_rest - self._rest, start)
        return Runs(*(np.concatenate(parts) for parts in zip(*resolved, strict=True)))

    def _left_by(
        self, row: IntArray, column: IntArray, length: IntArray, place: IntArray, start: IntArray
    ) -> tuple[IntArray, ...]:
        """Return the rows that left the leftovers ``[place, place + length)``, one part per row, as ``pending``."""
        some = length > 0
        row, column, length = row[some], column[some], length[some]
        begins = start[row]
        first = place[some] + self._left_before(begins)  # among the leftovers of the whole run
        first_leaver, last_leaver = self._leaver(first), self._leaver(first + length - 1)
        # One part per leaving row that overlaps [first, first + length): if rows leave 3 tokens each, the 5 tokens from
        # place 2 (2, 3 4 5, 6) are parts of 1, 3 and 1 tokens of leavers 0, 1 and 2, all owned by the same row.
        num_parts = last_leaver - first_leaver + 1
        owner = np.repeat(np.arange(len(row)), num_parts)
        part = np.arange(len(owner)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)  # 0, 1, ... of each owner
        leaver = first_leaver[owner] + part
        piece = np.searchsorted(self._rows_before, leaver, side="right") - 1
        within = leaver - self._rows_before[piece]
        left_from = (
            self._before[piece] + within * self._per_row[piece]
        )  # the leaver left [left_from, left_from + per_row)
        low = np.maximum(first[owner], left_from)
        high = np.minimum((first + length)[owner], left_from + self._per_row[piece])
        return (
            row[owner],
            column[owner] + low - first[owner],
            high - low,
            self._first_row[piece] + within - begins[owner],
            self._seq_length - self._per_row[piece] + low - left_from,
        )

    def _leaver(self, place: IntArray) -> IntArray:
        """Return the index of the row that left the token at ``place``, counting only rows with leftovers."""
        piece = np.searchsorted(self._before, place, side="right") - 1
        leaver: IntArray = self._rows_before[piece] + (place - self._before[piece]) // self._per_row[piece]
        return leaver
