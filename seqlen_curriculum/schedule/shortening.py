"""How a sample of ``seq_length`` tokens is shortened to the step's seqlen: first tokens, segments, or windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, TypeVar

import numpy as np
from pydantic import BeforeValidator

from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["TRUNCATE", "Method", "MethodKey", "Shortening"]

Method: TypeAlias = Literal["truncate", "segment", "window"]
Seqlens = TypeVar("Seqlens", int, IntArray)


def _no_documents(method: object) -> object:
    """Return the value of ``method``. Raises ValueError for ``documents``, which is a key of the data section."""
    if method == "documents":
        raise ValueError('"documents" combines with every method; set data.attention to "document", and remove method')
    return method


MethodKey: TypeAlias = Annotated[Method, BeforeValidator(_no_documents)]
"""The type of the key ``method``."""


def _same_for_each(seqlen: Seqlens, value: int) -> Seqlens:
    """Return ``value`` for an integer seqlen, or an array filled with it for an array."""
    return np.full_like(seqlen, value) if isinstance(seqlen, np.ndarray) else value


@dataclass(frozen=True)
class Shortening:
    """The method that shortens samples of ``seq_length`` tokens to ``seqlen``, an integer or array up to ``seq_length``.

    - ``truncate``: one row, the first ``seqlen`` tokens (the paper).
    - ``segment``: ``seq_length // seqlen`` rows of ``seqlen`` tokens (Composer's ``truncate=False``).
    - ``window``: one row of all tokens, which attend within aligned windows of ``seqlen`` (SkyLadder, 2025).
    """

    method: Method = "truncate"
    seq_length: int = 0

    def rows_per_sample(self, seqlen: Seqlens) -> Seqlens:
        """Return the number of rows made from one sample: more than one only under ``segment``."""
        if self.method == "segment":
            return self.seq_length // seqlen
        return _same_for_each(seqlen, 1)

    def tokens_per_row(self, seqlen: Seqlens) -> Seqlens:
        """Return the target tokens of a row: ``seqlen``, but always ``seq_length`` under ``window``."""
        if self.method == "window":
            return _same_for_each(seqlen, self.seq_length)
        return seqlen

    def used_tokens_per_sample(self, seqlen: Seqlens) -> Seqlens:
        """Return the number of leading target tokens of a sample that are trained on. The rest is the leftover.

        A sample of 10 tokens at seqlen 3: 3 under ``truncate``, 3 rows of 3 = 9 under ``segment``, 10 under ``window``.
        """
        return self.rows_per_sample(seqlen) * self.tokens_per_row(seqlen)

    def least_used_tokens(self, shortest: int) -> int:
        """Return a lower bound of ``used_tokens_per_sample`` over all lengths from ``shortest`` to ``seq_length``."""
        # Under "segment" the leftover is shorter than a row, so more than half of a sample is used. For 10 tokens the
        # worst length is 6, which uses 6 = 10 // 2 + 1.
        return self.seq_length // 2 + 1 if self.method == "segment" else self.tokens_per_row(shortest)

    def most_used_tokens(self, longest: int) -> int:
        """Return an upper bound of ``used_tokens_per_sample`` over all lengths up to ``longest``."""
        return self.seq_length if self.method == "segment" else self.tokens_per_row(longest)


TRUNCATE = Shortening()
"""The paper's method; its arithmetic doesn't use ``seq_length``."""
