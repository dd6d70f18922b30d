"""Ratios of a loss to the best before it: the stability measures in the paper's Tables 1 and 3.

The loss ratio of a training step is its loss over the lowest of all earlier steps. The perplexity ratio of an evaluation
is its perplexity over the lowest of all earlier evaluations.

Shapes: ``n`` steps or evaluations.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["loss_ratio", "perplexity_ratio", "perplexity_ratios", "ratios_to_best"]


def loss_ratio(loss: float, best: float) -> float | None:
    """Return ``loss`` over the ``best`` before it; None if that is not finite, as for the first step (best inf)."""
    ratio = loss / best if 0 < best < math.inf else math.nan
    return ratio if math.isfinite(ratio) else None


def ratios_to_best(values: ArrayLike) -> NDArray[np.float64]:
    """Return ``loss_ratio`` of each of ``values`` (n,) to the lowest before it, (n,), with NaN for None."""
    best = _best_before(values)
    with np.errstate(over="ignore"):
        ratios = np.asarray(values, dtype=np.float64) / np.where(best > 0, best, np.nan)
    return np.where(np.isfinite(ratios), ratios, np.nan)


def perplexity_ratio(loss: float, best: float) -> float:
    """Return the ratio of the perplexities of two losses in nats per token."""
    # exp(loss) / exp(best) = exp(loss - best), which avoids overflow of exp(loss) for a diverged loss of 800 nats. Floats
    # overflow above exp(709), so the exponent is limited to 700.
    return math.exp(min(loss - best, 700))


def perplexity_ratios(losses: ArrayLike) -> NDArray[np.float64]:
    """Return the perplexity ratio of each of the validation ``losses`` (n,), (n,); NaN for the first."""
    values = np.asarray(losses, dtype=np.float64)
    return np.array([perplexity_ratio(loss, best) for loss, best in zip(values, _best_before(values), strict=True)])


def _best_before(values: ArrayLike) -> NDArray[np.float64]:
    """Return the lowest of the values before each, (n,): [NaN, 4, 4, 2] for [4, 5, 2, 3]."""
    column = np.asarray(values, dtype=np.float64)
    return np.concatenate([[np.nan], np.minimum.accumulate(column)[:-1]]) if column.size else column
