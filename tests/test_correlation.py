"""Pearson's r and its p-value are SciPy's, from three pairs to 200,000, from r near 0 to r near 1."""

import numpy as np
import pytest
from scipy.stats import pearsonr

from seqlen_curriculum.analysis.correlation import pearson


@pytest.mark.parametrize("pairs", [3, 4, 5, 10, 101, 5_000, 200_000])
@pytest.mark.parametrize("noise", [1e-3, 0.3, 1, 10, 1e3])
def test_both_are_scipys(pairs, noise):
    random = np.random.default_rng(pairs)
    first = random.normal(size=pairs)
    second = noise * random.normal(size=pairs) - first
    expected = pearsonr(first, second)
    r, p = pearson(first, second)
    assert r == pytest.approx(expected.statistic, rel=1e-9)
    assert p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-300)  # a small p multiplies the rounding of r by pairs


def test_a_perfect_correlation_by_hand():
    assert pearson([1, 2, 3, 4], [2, 4, 6, 8]) == (1.0, 0.0)


def test_three_pairs_by_hand():
    # Centered: -1, 0, 1 and -1/2, 1/2, 0, so r = 0.5 / sqrt(2 x 0.5). For three pairs p is 1 - (2 / pi) asin |r|.
    assert pearson([0, 1, 2], [0, 1, 0.5]) == (pytest.approx(0.5), pytest.approx(2 / 3))
