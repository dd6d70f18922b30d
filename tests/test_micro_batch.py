"""Token-balanced micro-batches: by hand, and the invariants for any rank."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.schedule.micro_batch import balanced_rows


@pytest.mark.parametrize(
    ("seqlen", "rows"),
    [(8, 32), (16, 32), (32, 32), (33, 16), (64, 16), (100, 8), (128, 8), (256, 4), (511, 2), (512, 2)],
)
def test_rows_by_hand(seqlen, rows):
    # 32 rows a step, 2 at 512: at most 1024 tokens a micro-batch
    assert balanced_rows(32, 2, 512, seqlen) == rows


def test_a_rank_of_few_divisors():
    assert balanced_rows(7, 1, 64, 16) == 1  # 4 rows would fit, but 7 is prime
    assert balanced_rows(7, 1, 64, 9) == 7


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 512), st.data())
def test_invariants(accumulation, micro_batch, seq_length, data):
    rows = micro_batch * accumulation
    seqlen = data.draw(st.integers(1, seq_length))
    balanced = balanced_rows(rows, micro_batch, seq_length, seqlen)
    assert rows % balanced == 0
    assert micro_batch <= balanced
    assert balanced * seqlen <= micro_batch * seq_length
    larger = [count for count in range(balanced + 1, rows + 1) if rows % count == 0]
    assert all(count * seqlen > micro_batch * seq_length for count in larger)
    assert balanced_rows(rows, micro_batch, seq_length, seq_length) == micro_batch


@given(st.integers(1, 5000), st.integers(1, 400), st.integers(1, 64))
def test_equals_trying_every_number_of_rows(rows, micro_batch, seqlen):
    most = max(count for count in range(1, rows + 1) if rows % count == 0 and count * seqlen <= micro_batch * 64)
    assert balanced_rows(rows, micro_batch, 64, seqlen) == most


@pytest.mark.parametrize(
    ("rows", "balanced"),
    [
        (10**15, 10**15 // 16),  # at most 10**14 * 64 // 96 = 6.7e13
        (999_999_999_999_989, 1),  # the largest prime below 10**15
        (31_622_743**2, 31_622_743),  # the square of a prime
        (2 * 499_999_999_999_993, 2),  # twice a prime
    ],
)
def test_huge_batches_are_not_searched_row_by_row(rows, balanced):
    assert balanced_rows(rows, 10**14, 64, 96) == balanced


@pytest.mark.parametrize(("seqlen", "rows"), [(8, 4), (128, 4), (256, 4), (511, 2), (512, 2)])
def test_a_pipeline_keeps_its_stages_busy(seqlen, rows):
    # 32 rows a step over 2 stages: at least 8 micro-batches
    assert balanced_rows(32, 2, 512, seqlen, least_micro_batches=8) == rows


def test_full_length_has_no_more_micro_batches_than_the_file_says():
    assert balanced_rows(32, 16, 512, 512, least_micro_batches=8) == 16
    assert balanced_rows(32, 16, 512, 8, least_micro_batches=8) == 16
