"""The validation rows of each rank."""

from __future__ import annotations

from collections.abc import Iterator

from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["eval_chunks"]


def eval_chunks(ids: IntArray, rank: int, ranks: int, most_rows: int) -> Iterator[tuple[IntArray, int]]:
    """Yield a rank's chunks of (ids to read together, weight of their loss in rows).

    All ranks get the same number of chunks of equal size, as required by a collective forward. Each row counts once.
    """
    # 10 rows on 4 ranks: each rank reads 2 of rows 0-7, with weight 2 x 4. Ranks 0 and 1 read rows 8 and 9 with weight
    # 1 x 4. Ranks 2 and 3 read them too, with weight 0. The mean weight of all is (4 x 8 + 2 x 4) / 4 = 10.
    shared = len(ids) // ranks * ranks
    mine, rest = ids[:shared][rank::ranks], ids[shared:]
    for start in range(0, len(mine), most_rows):
        chunk = mine[start : start + most_rows]
        yield chunk, len(chunk) * ranks
    if len(rest):
        own = rank % len(rest)
        yield rest[own : own + 1], ranks if rank < len(rest) else 0
