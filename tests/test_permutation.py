import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlen_curriculum.data.permutation import permute


@pytest.mark.parametrize("size", [*range(1, 130), 255, 256, 257, 1000, 1023, 1024, 1025, 9973, 10_000, 100_003])
def test_every_size_is_a_bijection(size: int) -> None:
    placed = permute(np.arange(size), size, seed=1234, epoch=3)
    assert placed.dtype == np.int64
    assert np.array_equal(np.sort(placed), np.arange(size))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_every_key_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


@settings(deadline=None, max_examples=60)
@given(st.integers(10**12, 2**61), st.data())
def test_huge_sizes_stay_in_range_and_do_not_collide(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, size - 2000))
    placed = permute(np.arange(first, first + 2000), size, seed=1, epoch=0)
    assert placed.min() >= 0
    assert placed.max() < size
    assert len(np.unique(placed)) == 2000


def test_an_index_goes_to_the_same_place_alone_and_among_others() -> None:
    together = permute(np.arange(1000), 1000, seed=7, epoch=2)
    assert [int(permute(i, 1000, 7, 2)) for i in (0, 1, 499, 999)] == together[[0, 1, 499, 999]].tolist()
    assert np.array_equal(permute(np.arange(1000).reshape(20, 50), 1000, 7, 2), together.reshape(20, 50))


def test_one_epoch_for_each_index_equals_one_for_all() -> None:
    epochs = np.array([0, 0, 1, 5, 2**40])
    index = np.array([3, 4, 3, 3, 3])
    one_by_one = [int(permute(i, 50, 9, e)) for i, e in zip(index, epochs, strict=True)]
    assert permute(index, 50, 9, epochs).tolist() == one_by_one


def test_the_order_of_a_released_version_never_changes() -> None:
    # Resuming a run with a later version must read the same samples.
    assert permute(np.arange(10), 10, 1234, 0).tolist() == [0, 4, 7, 6, 8, 1, 5, 2, 9, 3]
    assert permute([0, 10**12], 10**12 + 39, 1234, 1).tolist() == [26885113383, 334837533538]


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    index = np.arange(10_000)
    base = permute(index, 10_000, seed=1, epoch=0)
    for other in (permute(index, 10_000, 1, 1), permute(index, 10_000, 2, 0), permute(index, 10_000, 2**63, 0)):
        # Two random orders agree in Poisson(1) places, so in more than 10 once in 10^8.
        assert np.count_nonzero(base == other) <= 10
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.05


def test_seed_and_epoch_are_not_interchangeable() -> None:
    index = np.arange(1000)
    assert not np.array_equal(permute(index, 1000, seed=3, epoch=4), permute(index, 1000, seed=4, epoch=3))


def test_mean_displacement_is_a_third_of_the_size() -> None:
    # |i - j| of two uniform points averages size / 3, with standard error 0.2357 / sqrt(size) of the size.
    size = 100_000
    moved = np.abs(permute(np.arange(size), size, 5, 0) - np.arange(size)).mean() / size
    assert moved == pytest.approx(1 / 3, abs=4 * 0.2357 / math.sqrt(size))


def _z(observed: np.ndarray, freedom: int) -> float:
    """Chi-square against equal frequencies, in standard deviations from its mean."""
    expected = observed.sum() / observed.size
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    return (chi_square - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [3, 10, 64])
def test_every_index_reaches_every_place_equally_often(size: int) -> None:
    epochs = np.arange(4000)
    counts = np.stack([np.bincount(permute(np.full(4000, i), size, 11, epochs), minlength=size) for i in range(size)])
    assert abs(_z(counts, (size - 1) ** 2)) < 4


@pytest.mark.parametrize("size", [10, 64])
def test_neighbours_do_not_stay_together(size: int) -> None:
    epochs = np.arange(20_000)
    near, next_to = (permute(np.full(20_000, i), size, 3, epochs) for i in (5, 6))
    gaps = np.bincount((next_to - near) % size, minlength=size)
    assert gaps[0] == 0
    assert abs(_z(gaps[1:], size - 2)) < 4


def test_all_24_orders_of_four_are_equally_frequent() -> None:
    epochs = np.arange(24_000)
    orders = np.stack([permute(np.full(24_000, i), 4, 7, epochs) for i in range(4)], axis=1)
    counts = np.array([np.all(orders == order, axis=1).sum() for order in permutations(range(4))])
    assert abs(_z(counts, 23)) < 4


@pytest.mark.parametrize(("index", "size"), [([-1], 10), ([10], 10), ([0, 11], 10), ([1], 1)])
def test_index_outside_raises(index: list[int], size: int) -> None:
    with pytest.raises(IndexError, match=f"outside 0..{size - 1}"):
        permute(index, size, 1, 0)


@pytest.mark.parametrize("size", [0, -5])
def test_size_below_one_raises(size: int) -> None:
    with pytest.raises(ValueError, match="size must be 1 or more"):
        permute([], size, 1, 0)


def test_negative_epoch_raises() -> None:
    with pytest.raises(IndexError, match="epoch must be 0 or more, not -1"):
        permute([0], 10, 1, -1)


def test_no_index_gives_no_place() -> None:
    assert permute([], 10, 1, 0).shape == (0,)
