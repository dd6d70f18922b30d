"""Numbers by step and their sums: by hand, and against counting."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.schedule.piecewise import Periodic, Piecewise


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


def test_a_period_by_hand():
    numbers = Periodic(piecewise([1, 3], [5, 2]), period=3)  # 5, 5, 2, 5, 5, 2, ...
    assert numbers.at(np.arange(1, 8)).tolist() == [5, 5, 2, 5, 5, 2, 5]
    assert numbers.total(np.arange(8)).tolist() == [0, 5, 10, 12, 17, 22, 24, 29]
    assert [numbers.steps_to(total) for total in (0, 1, 12, 13, 24, 25)] == [0, 1, 3, 4, 6, 7]
    assert numbers.counts(np.array([0, 2, 3, 7])).tolist() == [[0, 0], [2, 0], [2, 1], [5, 2]]
    assert (numbers.total(3 * 10**14), numbers.steps_to(12 * 10**14)) == (12 * 10**14, 3 * 10**14)


def test_rows_times_a_period_by_hand():
    # 5, 5, 2, 5, 5, 2, ... times 1 in steps 1 to 4 and 10 from step 5 on: 5, 5, 2, 5, 50, 20, 50, ...
    product = piecewise([1, 5], [1, 10]).times(Periodic(piecewise([1, 3], [5, 2]), period=3))
    assert product.at(np.arange(1, 8)).tolist() == [5, 5, 2, 5, 50, 20, 50]
    assert product.total(np.arange(8)).tolist() == [0, 5, 10, 12, 17, 67, 87, 137]
    assert [product.steps_to(total) for total in (0, 17, 18, 67, 68, 137)] == [0, 4, 5, 5, 6, 7]


@given(pieces, pieces, st.integers(0, 5))
def test_a_period_equals_its_list(one, rows, more):
    period = int(one.first_steps[-1]) + more
    repeated, listed = Periodic(one, period), one.at((np.arange(60) % period) + 1)
    product = rows.times(repeated)
    for numbers, values in ((repeated, listed), (product, rows.at(np.arange(1, 61)) * listed)):
        totals = np.cumsum(values)
        assert numbers.at(np.arange(1, 61)).tolist() == [numbers.at(step) for step in range(1, 61)] == values.tolist()
        assert (
            numbers.total(np.arange(1, 61)).tolist()
            == [numbers.total(step) for step in range(1, 61)]
            == totals.tolist()
        )
        assert [numbers.steps_to(total) for total in totals.tolist()] == list(range(1, 61))
        assert [numbers.steps_to(total + 1) for total in totals[:-1].tolist()] == list(range(2, 61))
    counts = repeated.counts(np.arange(61)).sum(axis=1)
    assert counts.tolist() == list(range(61))
    assert repeated.counts(np.array([60]))[0] @ one.values == listed.sum()
