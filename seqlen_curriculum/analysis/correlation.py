"""Pearson's correlation coefficient with its p-value, without SciPy, which would double the size of a core installation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["pearson"]


def pearson(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return Pearson's r and its two-sided p-value for three or more pairs, neither side of which is constant.

    The p-value is that of Student's t-test: the probability that n uncorrelated, normally distributed pairs have an |r| at
    least as large. With x = 1 - r^2 it is the regularized incomplete beta function I_x(n/2 - 1, 1/2).
    """
    columns = [np.asarray(side, dtype=np.float64) for side in (first, second)]
    # Divided by their maxima, because squares of the numbers themselves may overflow or vanish.
    r = float(np.clip(np.corrcoef([column / np.abs(column).max() for column in columns])[0, 1], -1, 1))
    return r, _incomplete_beta((1 - r) * (1 + r), len(first) / 2 - 1, 0.5)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):  # the fraction converges slowly here, and the complement is small
        return 1 - _incomplete_beta(1 - x, b, a)
    if x == 0:
        return 0.0
    fraction = 1.0
    for m in range(50 + 5 * math.isqrt(math.ceil(a + b)), -1, -1):  # it needs on the order of sqrt(max(a, b)) terms
        even = (m + 1) * (b - m - 1) * x / ((a + 2 * m + 1) * (a + 2 * m + 2))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1 + odd / (1 + even / fraction)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / (a * fraction)
