"""Bootstrap intervals: by hand for two items, against all resamples, with infinite and missing values."""

import itertools
import math

import numpy as np
import pytest

from seqlen_curriculum.analysis.bootstrap import bootstrap_interval


def test_the_mean_of_two_values():
    """Resamples are 1 1, 1 3, 3 1 and 3 3: the means 1 and 3 have a probability of a quarter each."""
    values = np.array([1.0, 3.0])
    assert bootstrap_interval(lambda chosen: values[chosen].mean(), 2) == (1.0, 3.0)
    assert bootstrap_interval(lambda chosen: values[chosen].mean(), 2, level=0.4) == (2.0, 2.0)


def test_the_interval_is_that_of_all_resamples():
    values = np.array([2.1, 2.9, 3.4, 2.5, 3.0])
    every = sorted(values[list(chosen)].mean() for chosen in itertools.product(range(5), repeat=5))
    low, high = bootstrap_interval(lambda chosen: values[chosen].mean(), 5, resamples=100_000)
    assert low == pytest.approx(np.quantile(every, 0.025), abs=0.02)
    assert high == pytest.approx(np.quantile(every, 0.975), abs=0.02)


def test_it_covers_the_mean_about_as_often_as_stated():
    draws, covered = np.random.default_rng(1), 0
    for _ in range(100):
        values = draws.normal(size=30)
        low, high = bootstrap_interval(lambda chosen, values=values: values[chosen].mean(), 30, resamples=200)
        covered += low <= 0 <= high
    assert covered > 85


def test_infinite_values_stay_infinite_and_nan_is_left_out():
    values = np.array([1.0, 2.0, math.inf])
    assert bootstrap_interval(lambda chosen: np.median(values[chosen]), 3) == (1.0, math.inf)
    only = bootstrap_interval(lambda chosen: math.nan if 0 in chosen else float(len(set(chosen))), 3)
    assert only == (1.0, 2.0)


def test_no_interval_without_resamples():
    assert bootstrap_interval(lambda _: 1.0, 1) is None
    assert bootstrap_interval(lambda _: math.nan, 3) is None
