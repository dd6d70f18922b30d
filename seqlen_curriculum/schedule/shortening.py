"""How a sample of ``seq_length`` tokens is shortened to the step's seqlen: first tokens, segments, or windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import numpy as np

from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["TRUNCATE", "Method", "Shortening"]

Method: TypeAlias = Literal["truncate", "segment", "window"]
Seqlens = TypeVar("Seqlens", int, IntArray)


def _same_for_each(seqlen: Seqlens, value: int) -> Seqlens:
    """Return ``value`` for one seqlen, or an array of it for an array of them."""
    return np.full_like(seqlen, value) if isinstance(seqlen, np.ndarray) else value


@dataclass(frozen=True)
class Shortening:
    """How samples of ``seq_length`` tokens are shortened to a ``seqlen``, one or an array of them, up to ``seq_length``.

    - ``truncate``: one row, the first ``seqlen`` tokens (the paper).
    - ``segment``: ``seq_length // seqlen`` rows of ``seqlen`` tokens (Composer's ``truncate=False``).
    - ``window``: one row of all tokens, which attend within aligned windows of ``seqlen`` (SkyLadder, 2025).
    """

    method: Method = "truncate"
    seq_length: int = 0

    def rows_per_sample(self, seqlen: Seqlens) -> Seqlens:
        """Return the rows that one sample gives: more than one only under ``segment``."""
        if self.method == "segment":
            return self.seq_length // seqlen
        return _same_for_each(seqlen, 1)

    def tokens_per_row(self, seqlen: Seqlens) -> Seqlens:
        """Return the target tokens of a row: ``seqlen``, but always ``seq_length`` under ``window``."""
        if self.method == "window":
            return _same_for_each(seqlen, self.seq_length)
        return seqlen

    def used_tokens_per_sample(self, seqlen: Seqlens) -> Seqlens:
        """Return how many target tokens of a sample are trained on: its first ones. The rest of it is the leftover.

        Of a sample of 10 tokens at seqlen 3: 3 under ``truncate``, 3 rows of 3 = 9 under ``segment``, 10 under ``window``.
        """
        return self.rows_per_sample(seqlen) * self.tokens_per_row(seqlen)

    def least_used_tokens(self, shortest: int) -> int:
        """Return a lower bound of ``used_tokens_per_sample`` over all lengths from ``shortest`` to ``seq_length``."""
        # Under "segment" the leftover is less than a row, and so less than the used tokens: more than half of a sample is
        # used. Of 10 tokens the worst length is 6, which uses 6 = 10 // 2 + 1.
        return self.seq_length // 2 + 1 if self.method == "segment" else self.tokens_per_row(shortest)


TRUNCATE = Shortening()
"""The paper's method; its arithmetic doesn't use ``seq_length``."""
