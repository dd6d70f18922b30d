"""Pauses and buckets of a pacing: by hand, against counting step by step, and in the samples that a run reads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum import ConfigError, CurriculumScheduler
from seqlen_curriculum.schedule.adjusted_pacing import Paused, bucketed
from seqlen_curriculum.schedule.custom_pacing import Custom
from seqlen_curriculum.schedule.pacing import Discrete, Mixed, Root


def test_a_held_ramp_by_hand():
    # 8 + 40 t / 10 down to multiples of 4: 12, 16, 20, 24, 28, 32, 36, 40, 44, 48; held for 3 steps after steps 2 and 6
    ramp = Paused(Root(8, 48, 4, total_steps=10), held=(2, 6), interval=3)
    assert ramp(np.arange(1, 18)).tolist() == [12, 16, 16, 16, 16, 20, 20, 20, 20, 24, 28, 32, 36, 40, 44, 48, 48]
    assert ramp(1) == 12
    assert ramp.settles_at == 16
    first_steps, lengths = ramp.changes(99)
    assert first_steps.tolist() == [1, 2, 6, 10, 11, 12, 13, 14, 15, 16]
    assert lengths.tolist() == [12, 16, 20, 24, 28, 32, 36, 40, 44, 48]
    assert (ramp.lowest, ramp.highest) == (8, 48)


@given(
    total=st.integers(1, 60),
    step=st.integers(1, 9),
    interval=st.integers(1, 7),
    held=st.sets(st.integers(1, 12), max_size=6),
    bucket=st.none() | st.integers(1, 16),
)
def test_any_held_ramp_is_the_ramp_at_a_clock_counted_step_by_step(total, step, interval, held, bucket):
    inner = bucketed(Root(9, 64, step, total_steps=total), bucket)
    held = tuple(interval * number for number in sorted(held))
    paused, clock = Paused(inner, held, interval), 0
    lengths = []
    for at in range(1, 140):
        clock += not any(hold < at <= hold + interval for hold in held)
        lengths.append(inner(max(clock, 1)))
    assert paused(np.arange(1, 140)).tolist() == lengths
    first_steps, values = paused.changes(139)
    assert values[np.searchsorted(first_steps, np.arange(1, 140), side="right") - 1].tolist() == lengths


def test_schedules_that_never_settle_may_be_held_too():
    assert Paused(Discrete((8, 16), (5,)), (3,), 2).settles_at == 8


def adaptive(**schedule):
    return {
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 48,
        "schedule_type": "adaptive",
        "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 4, **schedule},
    }


def test_the_scheduler_is_linear_until_it_is_held():
    scheduler = CurriculumScheduler(adaptive())
    linear = CurriculumScheduler({**adaptive(), "schedule_type": "fixed_linear"})
    steps = range(1, 20)
    assert [scheduler.get_difficulty(step) for step in steps] == [linear.get_difficulty(step) for step in steps]
    scheduler.hold([2, 6], 3)
    assert [scheduler.get_difficulty(step) for step in (2, 5, 6, 9, 10)] == [16, 16, 20, 20, 24]
    scheduler.hold([2], 3)  # instead of those before
    assert [scheduler.get_difficulty(step) for step in (5, 6, 7)] == [16, 20, 24]
    scheduler.hold([], 3)
    assert scheduler.get_difficulty(3) == 20


def test_a_ratio_that_would_always_hold_is_refused():
    with pytest.raises(ConfigError, match=r"perplexity_ratio: 1\.0 is not valid: input should be greater than 1"):
        CurriculumScheduler(adaptive(perplexity_ratio=1.0))


@pytest.mark.parametrize(
    ("pacing", "bucket", "expected"),
    [
        (Discrete((8, 70, 100, 64, 99), (1, 2, 3, 4)), 64, [64, 64, 100, 64, 64]),  # 100 is the longest, 99 is not
        (Discrete((8, 70, 100, 64, 99), (1, 2, 3, 4)), 1, [8, 70, 100, 64, 99]),
        (Mixed((130, 1000), (2, 1)), 64, [192, 192, 1000, 192, 192]),  # never below 130: up to 192
        (Custom(8, 100, 1, function=lambda step: 20 * step), 32, [32, 32, 32, 64, 100]),
        (Root(8, 100, 8, 5), 48, [48, 48, 48, 48, 100]),  # 26.4, 44.8, 63.2, 81.6 of the ramp
        (Discrete((100,), ()), 64, [100] * 5),  # nothing to round: the longest stays
    ],
)
def test_bucketed_by_hand(pacing, bucket, expected):
    assert bucketed(pacing, bucket)(np.arange(1, 6)).tolist() == expected


def test_no_bucket_is_no_change():
    pacing = Root(8, 64, 8, 10)
    assert bucketed(pacing, None) is pacing


@pytest.mark.parametrize(
    ("pacing", "bucket", "message"),
    [
        (Root(8, 100, 8, 10), 101, "training.seqlen_bucket: 101 is above the longest length 100"),
        (Discrete((100,), ()), 101, "training.seqlen_bucket: 101 is above the longest length 100"),
        (
            Mixed((70, 100), (1, 1)),
            64,
            "training.seqlen_bucket: 64 .*70 to 128.* 100",
        ),
    ],
)
def test_a_bucket_that_leaves_no_length_is_an_error(pacing, bucket, message):
    with pytest.raises(ConfigError, match=message):
        bucketed(pacing, bucket)


ramps = st.builds(
    lambda low, span, rung, total, degree: Root(low, low + span + rung, rung, total, degree),
    st.integers(1, 300),
    st.integers(0, 3000),
    st.integers(1, 200),
    st.integers(1, 10**7),
    st.floats(0.05, 20),
)


@given(ramps, st.data())
def test_a_bucketed_ramp_keeps_its_promises(ramp, data):
    bucket = data.draw(
        st.integers(1, max(ramp.max_difficulty // 2, 1)).filter(
            lambda n: -(-ramp.lowest // n) * n <= ramp.max_difficulty
        )
    )
    pacing = bucketed(ramp, bucket)
    first_steps, _ = ramp.changes(ramp.total_steps)
    steps = np.unique([*first_steps, *(first_steps[1:] - 1), ramp.total_steps + 1])
    before, lengths = ramp(steps), pacing(steps)
    assert np.all((lengths % bucket == 0) | (lengths == ramp.max_difficulty))
    assert np.all((lengths <= before) | (lengths == pacing.lowest))
    assert np.all((before - lengths < bucket) & (np.diff(lengths, prepend=0) >= 0))
    assert np.all(lengths >= ramp.lowest)
    assert pacing(ramp.total_steps) == ramp.max_difficulty
    assert (pacing.settles_at, pacing.highest) == (ramp.total_steps, ramp.max_difficulty)
    changed_at, changed_to = pacing.changes(ramp.total_steps)
    assert np.array_equal(pacing(changed_at), changed_to)
    assert np.array_equal(pacing(changed_at[1:] - 1), changed_to[:-1])
