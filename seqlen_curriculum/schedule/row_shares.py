"""The source of each row when several sources share the rows, in proportion to weights of any ratio.

``data.blend.Blend`` stores one period of the order, and rounds weights whose period is long. The weights here are numbers of
pieces in corpora, such as 3 in 10,000,000, so the source of a row is computed from its number instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["RowShares"]

_BITS = 31
"""Shares are rounded to 2**-31, which is less than a row in two billion."""


class RowShares:
    """The order of rows for ``weights`` of 0 or more, not all 0; rows are numbered from 0."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        # Weights 1, 0, 2, 3: source 0 takes 1/6 of the rows, source 2 takes 2/5 of what it leaves, source 3 the rest.
        self._parts = list[tuple[int, int]]()  # (source, share of the remaining rows in units of 2**-31)
        for source, weight in enumerate(weights):
            if weight:
                self._parts.append((source, max(round(2**_BITS * weight / sum(weights[source:])), 1)))

    def locate(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return the source of each row, and its index among the rows of that source, (n,) both."""
        source, index = np.empty((2, len(rows)), np.int64)
        pending, left = np.arange(len(rows)), rows
        for number, share in self._parts:
            before = _taken(left, share)
            takes = _taken(left + 1, share) > before
            source[pending[takes]], index[pending[takes]] = number, before[takes]
            pending, left = pending[~takes], (left - before)[~takes]
        return source, index

    def count(self, source: int, rows: int) -> int:
        """Return the rows of ``source`` among the first ``rows`` rows."""
        left = np.array([rows], np.int64)
        for number, share in self._parts:
            taken = _taken(left, share)
            if number == source:
                return int(taken[0])
            left = left - taken
        return 0


def _taken(rows: IntArray, share: int) -> IntArray:
    """Return ``rows * share / 2**31`` rounded up, in exact integers: a share of 1/2 takes rows 0, 2, 4, ..."""
    # The product would overflow from 2**32 rows on, so whole periods of 2**31 rows are counted separately.
    periods, rest = rows >> _BITS, rows & (2**_BITS - 1)
    taken: IntArray = periods * share + ((rest * share + 2**_BITS - 1) >> _BITS)
    return taken
