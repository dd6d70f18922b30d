"""Shares of corpora: exact to one sample at every prefix, whatever the weights."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.data.blend import Blend
from seqlen_curriculum.errors import ConfigError


def test_by_hand():
    blend = Blend([0.7, 0.3])
    assert (blend.shares, blend.period) == ([7, 3], 10)
    # Deadlines of the 7: ceil(10 j / 7) = 2, 3, 5, 6, 8, 9, 10; of the 3: 4, 7, 10; none may be ahead of its share.
    corpus, before = blend.locate(np.arange(12))
    assert corpus.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert before.tolist() == [0, 1, 0, 2, 3, 1, 4, 5, 6, 2, 7, 8]
    assert blend.count(1, np.array([0, 2, 3, 10, 13])).tolist() == [0, 0, 1, 3, 4]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([1], [1]), ([2.0, 1.0], [2, 1]), ([0.1, 0.2], [1, 2]), ([50, 75, 25], [2, 3, 1]), ([1e-4, 0.9999], [1, 9999])],
)
def test_ratios_are_cancelled(weights, shares):
    assert Blend(weights).shares == shares


def test_ratios_of_many_digits_are_rounded_but_not_to_nothing():
    blend = Blend([0.123456789, 0.5])
    assert blend.shares[0] / blend.period == pytest.approx(0.123456789 / 0.623456789, abs=2**-16)
    with pytest.raises(ConfigError, match=r"data.train: weight 1e-09 is less than one of 65536 samples; raise it"):
        Blend([1.0, 1e-9])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(0, 10**12))
def test_every_prefix_has_its_shares_to_one_sample(weights, far):
    blend = Blend(weights)
    numbers = np.arange(2 * blend.period)
    corpus, before = blend.locate(numbers)
    for number, weight in enumerate(weights):
        drawn = corpus == number
        count = np.cumsum(drawn)
        assert np.abs(count - (numbers + 1) * weight / sum(weights)).max() < 1
        assert np.array_equal(blend.count(number, numbers + 1), count)
        assert np.array_equal(before[drawn], np.arange(drawn.sum()))
    later, _ = blend.locate(far + numbers[: blend.period])
    assert np.array_equal(np.sort(later), np.sort(corpus[: blend.period]))
