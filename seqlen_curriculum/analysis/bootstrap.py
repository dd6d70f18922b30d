"""Percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13) of statistics over runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["bootstrap_interval"]

Indices = NDArray[np.intp]


def bootstrap_interval(
    statistic: Callable[[Indices], float], count: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float] | None:
    """Return the percentile interval of ``statistic`` over resamples of ``count`` items with replacement.

    ``statistic`` gets the indices of a resample, (count,), and may return infinity. Resamples for which it returns NaN are
    left out. The result is None for fewer than two items, or if all resamples are left out. It is the same at each call.
    """
    if count < 2:
        return None
    drawn = np.random.default_rng(0).integers(count, size=(resamples, count))
    # There are few different resamples: 126 of 5 items, each drawn in any order.
    distinct, which = np.unique(np.sort(drawn, axis=1), axis=0, return_inverse=True)
    values = np.array([statistic(indices) for indices in distinct])[which.reshape(-1)]
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    # Quantiles that are values of resamples: an infinite value can't be interpolated.
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)
