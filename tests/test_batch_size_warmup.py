"""Batch size warmup: Megatron's rule in exact integers, by hand, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum import ConfigError
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp, BatchSizeWarmup
from seqlen_curriculum.schedule.piecewise import Piecewise


def megatron_rows(start, increment, samples, final, consumed):
    """``RampupBatchsizeNumMicroBatchesCalculator.update`` of Megatron-core, whose float division may round."""
    if consumed > samples:
        return final
    return start + int(consumed / (samples / ((final - start) // increment))) * increment


def test_rows_by_hand():
    # GPT-3 125M: 16 to 256 rows in 4e9 tokens are 15 increments of 266,666,666.67 tokens
    rows = BatchSizeWarmup(start=16, increment=16, tokens=4_000_000_000).rows(256)
    consumed = [
        0,
        266_666_666,
        266_666_667,
        2_000_000_000,
        3_733_333_333,
        3_733_333_334,
        3_999_999_999,
        4 * 10**9,
        10**15,
    ]
    assert [rows(tokens) for tokens in consumed] == [16, 16, 32, 128, 224, 240, 240, 256, 256]


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 30), st.integers(1, 10**6), st.integers(0, 2 * 10**6))
def test_equals_megatron_wherever_no_level_begins_within_its_rounding(start, increment, increments, tokens, consumed):
    rows = BatchSizeRamp(start, increment, tokens, start + increments * increment)
    levels = consumed * increments / tokens
    if not math.isclose(levels, round(levels), rel_tol=1e-9):
        assert rows(consumed) == megatron_rows(start, increment, tokens, rows.final, consumed)


def test_steps_by_hand():
    # rows 2 until 20 tokens are consumed, 4 until 40, then 6; lengths 4, 4, 4, 8, ...: 8 + 8 + 8 = 24, 24 + 4 * 8 = 56
    rows = BatchSizeRamp(2, 2, 40, 6).by_step(Piecewise(np.array([1, 4]), np.array([4, 8])), 10**6)
    assert (rows.first_steps.tolist(), rows.values.tolist()) == ([1, 4, 5], [2, 4, 6])


def test_a_long_step_jumps_over_levels():
    rows = BatchSizeRamp(1, 1, 40, 5).by_step(
        Piecewise.constant(25), 10**6
    )  # 10 tokens a level: 25 is level 2, 25 + 75 the last
    assert (rows.first_steps.tolist(), rows.values.tolist()) == ([1, 2, 3], [1, 3, 5])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"start": 64}, "batch_size_warmup.start: 64 is not below train_batch_size 64"),
        ({"start": 100}, "batch_size_warmup.start: 100 is not below train_batch_size 64"),
        ({"increment": 5}, "batch_size_warmup.increment: 5 doesn't divide the 48 rows from start 16"),
        ({"increment": 96}, "batch_size_warmup.increment: 96 doesn't divide the 48 rows"),
    ],
)
def test_levels_must_lead_to_the_batch(section, message):
    with pytest.raises(ConfigError, match=message):
        BatchSizeWarmup(**{"start": 16, "increment": 16, "tokens": 1000, **section}).rows(64)


@pytest.mark.parametrize(
    ("start", "increment", "ranks", "micro_batch", "message"),
    [
        (16, 16, 16, 1, None),
        (16, 16, 4, 2, None),
        (16, 8, 16, 1, "increment: 8 rows don't divide over 16 data-parallel ranks"),
        (8, 16, 16, 1, "start: 8 rows don't divide over 16 data-parallel ranks"),
        (8, 16, 4, 4, "start: 8 rows are 2 .*micro-batch of 4 rows"),
        (16, 8, 4, 4, "increment: 8 rows are 2 .*multiple of 16"),
    ],
)
def test_every_level_divides_over_ranks_and_micro_batches(start, increment, ranks, micro_batch, message):
    warmup = BatchSizeWarmup(start=start, increment=increment, tokens=1)
    if message is None:
        warmup.check_ranks(ranks, micro_batch)
    else:
        with pytest.raises(ConfigError, match=message):
            warmup.check_ranks(ranks, micro_batch)
