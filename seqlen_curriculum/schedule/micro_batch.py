"""The rows of a micro-batch, chosen so that the device has similar work at every sequence length. Needs no torch."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache

import numpy as np

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
    divisors = _divisors(rows)
    return divisors[bisect_right(divisors, most) - 1]


@lru_cache(maxsize=2**13)  # every length of a run asks for the divisors of the same few numbers of rows
def _divisors(rows: int) -> list[int]:
    """Return all divisors of ``rows``, ascending."""
    # 360 = 2**3 * 3**2 * 5: the divisors of 1, then 1 2 4 8, then these times 1 3 9, ...
    divisors, rest = [1], rows
    for prime in _prime_factors(rows):
        powers = [1]
        while rest % prime == 0:
            rest //= prime
            powers.append(powers[-1] * prime)
        divisors = [divisor * power for divisor in divisors for power in powers]
    return sorted(divisors)


def _prime_factors(rows: int) -> list[int]:
    """Return the prime factors of ``rows``, each once, by trial division in blocks of a million numbers."""
    # A batch of 10**15 rows needs 32 blocks, 0.3 s, if it is prime. 512 rows need the numbers up to 22.
    primes, first = list[int](), 2
    while first * first <= rows:
        numbers = np.arange(first, min(first + 2**20, int(rows**0.5) + 2))
        for factor in numbers[rows % numbers == 0].tolist():
            if rows % factor == 0:  # not if it is a multiple of a smaller one
                primes.append(factor)
            while rows % factor == 0:
                rows //= factor
        first += 2**20
    return [*primes, rows] if rows > 1 else primes
