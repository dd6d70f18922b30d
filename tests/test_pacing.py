"""Pacing functions: DeepSpeed's formula, hand-worked values, and the invariants of every accepted schedule."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.custom_pacing import Custom
from seqlen_curriculum.schedule.pacing import Discrete, Mixed, Root


def deepspeed_formula(step, minimum, maximum, total, rung, degree):
    """The published formula of DeepSpeed's fixed_linear (degree 1) and fixed_root schedules."""
    difficulty = (float(step) / total) ** (1.0 / degree)
    difficulty = math.floor(difficulty * (maximum - minimum) + minimum)
    difficulty -= difficulty % rung
    return min(difficulty, maximum)


def test_equals_deepspeed_at_every_step_of_10000_random_valid_configs():
    rng = random.Random(2022)
    for _ in range(10_000):
        rung = rng.choice([1, 2, 8, 16, 64, 100])
        minimum = rung * rng.randint(1, 8)
        maximum = minimum + rung * rng.randint(0, 256)
        total = rng.choice([1, 2, 3, rng.randint(1, 60), rng.randint(1, 300)])
        degree = rng.choice([1, 2, 3, rng.randint(1, 9)])
        steps = np.arange(1, total + 3)
        expected = [deepspeed_formula(t, minimum, maximum, total, rung, degree) for t in steps.tolist()]
        assert Root(minimum, maximum, rung, total, degree)(steps).tolist() == expected


@pytest.mark.parametrize(
    ("total", "degree"), [(60_000, 1), (110_000, 1), (270_000, 1), (60_000, 2), (45_000, 3)], ids=str
)
def test_equals_deepspeed_at_every_step_of_the_papers_ramps(total, degree):
    steps = np.arange(1, total + 2)
    expected = [deepspeed_formula(t, 8, 1024, total, 8, degree) for t in steps.tolist()]
    assert Root(8, 1024, 8, total, degree)(steps).tolist() == expected


def test_linear_values_by_hand():
    # 8 + 1016 * t / 100, floored, down to a multiple of 8
    pacing = Root(8, 1024, 8, 100)
    assert [pacing(t) for t in (0, 1, 2, 50, 99, 100, 101, 10**9)] == [8, 16, 24, 512, 1008, 1024, 1024, 1024]


def test_root_grows_fast_at_first():
    # 8 + 1016 * (25 / 100) ** (1 / 2) = 516
    assert Root(8, 1024, 8, 100, 2)(25) == 512


@pytest.mark.parametrize(
    ("minimum", "maximum", "rung", "expected"),
    [
        (8, 1024, 16, [16, 512, 1024]),  # once length 0 in DeepSpeed
        (1, 1024, 16, [16, 512, 1024]),
        (8, 1000, 64, [64, 448, 1000]),  # stuck at 960 until step 1026 in DeepSpeed
        (5, 5, 1, [5, 5, 5]),
        (7, 9, 8, [8, 8, 9]),
    ],
)
def test_awkward_ranges(minimum, maximum, rung, expected):
    pacing = Root(minimum, maximum, rung, 1000)
    assert [pacing(t) for t in (1, 500, 1000)] == expected


def test_a_ramp_of_one_step_is_full_length_at_once():
    assert Root(8, 1024, 8, 1)(1) == 1024


def test_discrete_ends_are_inclusive_and_lengths_may_fall():
    pacing = Discrete((128, 1024, 256), (5, 10))
    assert pacing(np.array([1, 5, 6, 10, 11, 10**9])).tolist() == [128, 128, 1024, 1024, 256, 256]


def test_mixed_takes_turns_for_ever():
    # Figure 2 of the paper: 900 steps of 128, then 100 of 1024, in every 1,000
    pacing = Mixed((128, 1024), (900, 100))
    steps = [0, 1, 900, 901, 1000, 1001, 1900, 1901, 10**9 + 900, 10**9 + 901]
    assert pacing(np.array(steps)).tolist() == [128, 128, 128, 1024, 1024, 128, 128, 1024, 128, 1024]
    first_steps, lengths = pacing.changes(1001)
    assert (first_steps.tolist(), lengths.tolist()) == ([1, 901, 1001, 1901], [128, 1024, 128, 1024])
    assert pacing.settles_at is None


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4), st.integers(1, 60))
def test_mixed_equals_repeating_its_list(turns, last_step):
    pacing = Mixed(*zip(*turns, strict=True))
    cycle = [length for length, steps in turns for _ in range(steps)]
    expected = [cycle[(step - 1) % len(cycle)] for step in range(1, last_step + 1)]
    assert pacing(np.arange(1, last_step + 1)).tolist() == expected
    first_steps, lengths = pacing.changes(last_step)
    assert np.array_equal(pacing(first_steps), lengths)
    assert np.all(lengths[1:] != lengths[:-1])
    assert lengths[np.searchsorted(first_steps, np.arange(1, last_step + 1), side="right") - 1].tolist() == expected


def test_custom_is_clamped_and_rounded():
    pacing = Custom(8, 64, 8, function=lambda step: [-5, 0, 13.9, 63, 64, 1e300][step])
    assert pacing(np.arange(6)).tolist() == [8, 8, 8, 56, 64, 64]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "8", True])
def test_custom_must_give_a_number(value):
    with pytest.raises(ConfigError, match="at step 3"):
        Custom(8, 64, 8, function=lambda _step: value)(3)


def test_a_custom_function_that_raises_is_named_with_its_step():
    with pytest.raises(ConfigError, match="raised ZeroDivisionError at step 3"):
        Custom(8, 64, 8, function=lambda step: step / 0)(3)


def test_custom_values_may_be_any_size_of_whole_number():
    assert Custom(8, 64, 8, function=lambda step: 10**400 * (step - 1))(np.arange(3)).tolist() == [8, 8, 64]


@pytest.mark.parametrize("step", [1.9, True, "5", None])
def test_a_step_is_a_whole_number(step):
    with pytest.raises(ConfigError, match="is not a whole number"):
        Root(8, 64, 8, 10)(step)


def test_negative_step_is_an_error():
    with pytest.raises(ConfigError, match="-1 is negative"):
        Root(8, 64, 8, 10)(-1)


ramps = st.builds(
    lambda low, span, rung, total, degree: Root(low, low + span + rung, rung, total, degree),
    st.integers(1, 300),
    st.integers(0, 3000),
    st.integers(1, 200),
    st.integers(1, 10**7),
    st.floats(0.05, 20),
)


@given(ramps, st.lists(st.integers(0, 10**8), min_size=1, max_size=40))
def test_invariants_of_every_ramp(ramp, some_steps):
    steps = np.unique([*some_steps, 1, ramp.total_steps, ramp.total_steps - 1])
    lengths = ramp(steps)
    assert lengths.min() >= ramp.lowest >= ramp.min_difficulty
    assert np.all((lengths % ramp.difficulty_step == 0) | (lengths == ramp.max_difficulty))
    assert np.all(lengths[steps >= ramp.total_steps] == ramp.max_difficulty)
    assert np.all(np.diff(lengths) >= 0)
    assert [ramp(step) for step in steps.tolist()] == lengths.tolist()  # scalar and vector agree


@pytest.mark.parametrize("degree", [1.0, 2.0, 0.4, 3.3])
def test_lengths_of_ramps_over_trillions_of_steps(degree):
    # the inverse of the formula is off by many steps where the ramp is flat: 1,000 lengths around 2**23 in 10**15 steps
    ramp = Root(2**23, 2**23 + 1000, 1, 10**15, degree)
    first_steps, lengths = ramp.changes(10**15)
    assert lengths.tolist() == list(range(2**23, 2**23 + 1001))
    for steps, expected in ((first_steps, lengths), (first_steps[1:] - 1, lengths[:-1])):
        formula = [deepspeed_formula(step, 2**23, 2**23 + 1000, 10**15, 1, degree) for step in steps.tolist()]
        assert formula == ramp(steps).tolist() == expected.tolist()


@given(ramps)
def test_changes_of_a_ramp_are_exactly_where_its_length_changes(ramp):
    first_steps, lengths = ramp.changes(ramp.total_steps)
    assert first_steps[0] == 1
    assert lengths[-1] == ramp.max_difficulty
    assert np.all(np.diff(first_steps) > 0)
    assert np.all(np.diff(lengths) > 0)
    assert np.array_equal(ramp(first_steps), lengths)
    assert np.array_equal(ramp(first_steps[1:] - 1), lengths[:-1])


@given(ramps)
def test_every_ramp_is_what_a_custom_function_of_it_would_be(ramp):
    custom = Custom(ramp.min_difficulty, ramp.max_difficulty, ramp.difficulty_step, function=lambda step: ramp(step))
    steps = np.arange(0, 20)
    assert np.array_equal(custom(steps), ramp(steps))
