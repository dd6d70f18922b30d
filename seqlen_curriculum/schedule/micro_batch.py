"""The rows of a micro-batch, chosen so that the device has similar work at every sequence length. Needs no torch."""

from __future__ import annotations

__all__ = ["balanced_rows"]


def balanced_rows(rows: int, micro_batch: int, seq_length: int, seqlen: int, least_micro_batches: int = 1) -> int:
    """Return the largest divisor of ``rows`` whose micro-batch has at most as many tokens at ``seqlen`` as at full length.

    ``rows`` is the number of rows of a step on one rank, ``micro_batch`` the rows of a micro-batch at ``seq_length``. A
    smaller divisor is used if ``micro_batch`` does not divide ``rows``, as early in a batch size warmup. All micro-batches
    of a step have the same number of rows, so the mean of their losses is the loss of the step. A step has at least
    ``least_micro_batches`` micro-batches if it has that many at full length, because a pipeline needs them to keep its
    stages busy.
    """
    # 32 rows, micro-batches of 2 x 512 tokens: at seqlen 96 most is 2 * 512 // 96 = 10. 8 is the largest divisor of 32 up
    # to 10: 4 micro-batches of 8 rows. A pipeline that needs 8 micro-batches limits them to 32 // 8 = 4 rows: 8 of 4.
    most = min(micro_batch * seq_length // seqlen, max(rows // least_micro_batches, micro_batch))
    # At most 512 tries for 512 rows, once per length of a run. 1 always divides.
    return next(count for count in range(most, 0, -1) if rows % count == 0)
