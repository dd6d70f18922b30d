"""Numbers by step and their sums: by hand, and against counting."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.schedule.piecewise import Piecewise


def piecewise(firsts, values):
    return Piecewise(np.array(firsts), np.array(values))


def test_by_hand():
    numbers = piecewise([1, 3, 4], [5, 2, 7])  # 5, 5, 2, 7, 7, ...
    assert [numbers.at(step) for step in (1, 2, 3, 4, 100)] == [5, 5, 2, 7, 7]
    assert numbers.total(np.arange(6)).tolist() == [0, 5, 10, 12, 19, 26]
    assert [numbers.steps_to(total) for total in (0, 1, 5, 6, 10, 11, 12, 13, 26, 27)] == [0, 1, 1, 2, 2, 3, 3, 4, 5, 6]
    assert [numbers.first_step_of(value) for value in (5, 2, 7, 6)] == [1, 3, 4, None]


pieces = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=5).map(
    lambda runs: piecewise(np.cumsum([1, *(steps for steps, _ in runs)])[:-1], [value for _, value in runs])
)


@given(pieces, pieces)
def test_sums_and_products_equal_counting(one, other):
    product, total = one.times(other), 0
    for step in range(1, 50):
        assert product.at(step) == one.at(step) * other.at(step)
        total += one.at(step)
        assert one.total(step) == total
        assert one.steps_to(total) == step
        assert one.steps_to(total + 1) == step + 1
    steps = np.arange(1, 50)
    for answer in (product.at, product.total):
        assert answer(steps).tolist() == [answer(step) for step in steps.tolist()]
