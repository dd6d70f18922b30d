"""What a day of length *s* makes of a full-length sample: its first tokens, segments, or windows of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from seqlen_curriculum.schedule.piecewise import Steps

__all__ = ["TRUNCATE", "Cut", "Method"]

Method: TypeAlias = Literal["truncate", "segment", "window"]
Seqlens = TypeVar("Seqlens", int, Steps)


@dataclass(frozen=True)
class Cut:
    """How samples of ``seq_length`` tokens are cut; asked for one ``seqlen`` or an array of them, up to ``seq_length``.

    - ``truncate``: one row, the first ``seqlen`` tokens (the paper).
    - ``segment``: ``seq_length // seqlen`` rows of ``seqlen`` tokens (Composer's ``truncate=False``).
    - ``window``: one row of all tokens, which attend within aligned windows of ``seqlen`` (SkyLadder, 2025).
    """

    method: Method = "truncate"
    seq_length: int = 0

    def rows(self, seqlen: Seqlens) -> Seqlens:
        """Rows that a sample gives."""
        one = seqlen // seqlen  # or an array of ones
        return self.seq_length // seqlen if self.method == "segment" else one

    def row_tokens(self, seqlen: Seqlens) -> Seqlens:
        """Target tokens of a row."""
        one = seqlen // seqlen
        return one * self.seq_length if self.method == "window" else seqlen

    def used(self, seqlen: Seqlens) -> Seqlens:
        """Target tokens of a sample that are trained on, its first ones; what is over is its leftover."""
        return self.rows(seqlen) * self.row_tokens(seqlen)

    def least_used(self, shortest: int) -> int:
        """A number of tokens that no length from ``shortest`` on uses less of."""
        return self.seq_length // 2 + 1 if self.method == "segment" else self.row_tokens(shortest)


TRUNCATE = Cut()
"""The paper's method, whose arithmetic needs no ``seq_length``."""
