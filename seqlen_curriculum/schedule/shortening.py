"""How a sample of ``seq_length`` tokens is shortened to the step's seqlen: first tokens, segments, or windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["TRUNCATE", "Method", "Shortening"]

Method: TypeAlias = Literal["truncate", "segment", "window"]
Seqlens = TypeVar("Seqlens", int, IntArray)


@dataclass(frozen=True)
class Shortening:
    """How samples of ``seq_length`` tokens are cut; asked for one ``seqlen`` or an array of them, up to ``seq_length``.

    - ``truncate``: one row, the first ``seqlen`` tokens (the paper).
    - ``segment``: ``seq_length // seqlen`` rows of ``seqlen`` tokens (Composer's ``truncate=False``).
    - ``window``: one row of all tokens, which attend within aligned windows of ``seqlen`` (SkyLadder, 2025).
    """

    method: Method = "truncate"
    seq_length: int = 0

    def rows_per_sample(self, seqlen: Seqlens) -> Seqlens:
        """Rows that a sample gives."""
        one = seqlen // seqlen  # or an array of ones
        return self.seq_length // seqlen if self.method == "segment" else one

    def tokens_per_row(self, seqlen: Seqlens) -> Seqlens:
        """Target tokens of a row."""
        one = seqlen // seqlen
        return one * self.seq_length if self.method == "window" else seqlen

    def used_tokens_per_sample(self, seqlen: Seqlens) -> Seqlens:
        """Target tokens of a sample that are trained on, its first ones; what is over is its leftover."""
        return self.rows_per_sample(seqlen) * self.tokens_per_row(seqlen)

    def least_used_tokens(self, shortest: int) -> int:
        """A number of tokens that no length from ``shortest`` on uses less of."""
        return self.seq_length // 2 + 1 if self.method == "segment" else self.tokens_per_row(shortest)


TRUNCATE = Shortening()
"""The paper's method, whose arithmetic needs no ``seq_length``."""
