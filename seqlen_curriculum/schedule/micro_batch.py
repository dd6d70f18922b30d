"""Rows of a micro-batch, chosen so that the device has the same work at every sequence length. Needs no torch."""

from __future__ import annotations

__all__ = ["balanced_rows"]


def balanced_rows(rows: int, micro_batch: int, seq_length: int, seqlen: int, least_micro_batches: int = 1) -> int:
    """Return the largest divisor of ``rows`` whose micro-batch has no more tokens at ``seqlen`` than at full length.

    ``rows`` are the rows of a step on one rank. ``micro_batch`` are the rows of a micro-batch at ``seq_length``; fewer are
    used where they don't divide ``rows``, as early in a batch size warmup. All micro-batches of a step have the same number
    of rows, so the mean of their losses is the loss of the step. A step has at least ``least_micro_batches`` of them if it
    has that many at full length: a pipeline needs them to keep its stages busy.
    """
    # 32 rows in micro-batches of 2 x 512 tokens: at seqlen 96 most is 2 * 512 // 96 = 10, and 8 divides 32, so 4 x 8 rows.
    # A pipeline that needs 8 micro-batches allows 32 // 8 = 4 rows, so 8 x 4.
    most = min(micro_batch * seq_length // seqlen, max(rows // least_micro_batches, micro_batch))
    # 512 rows need at most 512 tries, once for each length of a run. 1 divides everything, so there is always an answer.
    return next(count for count in range(most, 0, -1) if rows % count == 0)
