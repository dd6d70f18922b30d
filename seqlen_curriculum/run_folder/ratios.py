"""How far a loss is above the best before it: the measures of stability of the paper's Tables 1 and 3.

The loss ratio of a training step is its loss over the least of all earlier steps. The perplexity ratio of an evaluation
is its perplexity over the least of all earlier evaluations.

Shapes: ``n`` steps or evaluations.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["loss_ratio", "perplexity_ratio", "perplexity_ratios", "ratios_to_best"]


def loss_ratio(loss: float, best: float) -> float | None:
    """Return ``loss`` over the ``best`` before it; None where that is not finite, as for a run's first step (best inf)."""
    ratio = loss / best if 0 < best < math.inf else math.nan
    return ratio if math.isfinite(ratio) else None


def ratios_to_best(values: ArrayLike) -> NDArray[np.float64]:
    """Return each of ``values`` (n,) over the least before it, (n,); NaN for the first, which has none before it."""
    return np.asarray(values, dtype=np.float64) / _best_before(values)


def perplexity_ratio(loss: float, best: float) -> float:
    """Return the ratio of the perplexities of two losses in nats per token."""
    # exp(loss) / exp(best) = exp(loss - best), where neither can overflow: a diverged loss of 800 nats has a ratio too.
    # exp(700) is 1e304; a float overflows above exp(709).
    return math.exp(min(loss - best, 700))


def perplexity_ratios(losses: ArrayLike) -> NDArray[np.float64]:
    """Return the perplexity ratio of each of the validation ``losses`` (n,), (n,); NaN for the first."""
    values = np.asarray(losses, dtype=np.float64)
    return np.array([perplexity_ratio(loss, best) for loss, best in zip(values, _best_before(values), strict=True)])


def _best_before(values: ArrayLike) -> NDArray[np.float64]:
    """The least of the values before each, (n,): [4, 5, 2, 3] has [NaN, 4, 4, 2]."""
    column = np.asarray(values, dtype=np.float64)
    return np.concatenate([[np.nan], np.minimum.accumulate(column)[:-1]]) if column.size else column
