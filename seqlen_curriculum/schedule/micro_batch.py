"""How many rows a micro-batch has: the same work for the device at every length. Needs no torch."""

from __future__ import annotations

__all__ = ["balanced_rows"]


def balanced_rows(rows: int, micro_batch: int, seq_length: int, seqlen: int, least_micro_batches: int = 1) -> int:
    """The largest divisor of ``rows`` whose micro-batch of ``seqlen`` tokens a row is no larger than one at full length.

    ``rows`` are a rank's rows of a step, ``micro_batch`` those of a micro-batch at ``seq_length`` (fewer where they don't
    divide ``rows``, as early in a batch size warmup). All micro-batches of a step have as many rows, so the mean of their
    losses is the loss of the step. They are never fewer than ``least_micro_batches`` where full length has that many: a
    pipeline needs them to keep its stages busy.
    """
    most = min(micro_batch * seq_length // seqlen, max(rows // least_micro_batches, micro_batch))
    # 512 rows need at most 512 tries, once for each length of a run.
    return next(count for count in range(most, 0, -1) if rows % count == 0)
