"""The methods of DeepSpeed's scheduler class, and the lengths of every schedule type that a block may name."""

import numpy as np
import pytest
from helpers.settings import LINEAR, block
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlen_curriculum import ConfigError, CurriculumScheduler, Timeline
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp


def rows_of_figure_2(step):
    """900 steps of 128, then 100 of 1024, and so on: the mixed schedule of the paper's Figure 2."""
    return 128 if (step - 1) % 1000 < 900 else 1024


def test_the_methods_of_deepspeeds_class():
    scheduler = CurriculumScheduler(LINEAR)
    assert scheduler.update_difficulty(50) == scheduler.get_current_difficulty() == 512
    scheduler.set_current_difficulty(24)
    assert scheduler.get_current_difficulty() == 24
    assert scheduler.update_difficulty(1) == 16
    state = scheduler.get_state()
    assert {
        name: state[name] for name in ("current_difficulty", "min_difficulty", "max_difficulty", "schedule_type")
    } == {
        "current_difficulty": 16,
        "min_difficulty": 8,
        "max_difficulty": 1024,
        "schedule_type": "fixed_linear",
    }
    assert state["schedule_config"] == LINEAR["schedule_config"]


def test_a_length_depends_on_the_step_alone():
    scheduler = CurriculumScheduler(LINEAR)
    assert scheduler.update_difficulty(100) == 1024  # where DeepSpeed's stays for good
    assert scheduler.update_difficulty(50) == 512


def test_state_goes_round():
    for save, load in (("get_state", "set_state"), ("state_dict", "load_state_dict")):
        saved = CurriculumScheduler(LINEAR)
        saved.update_difficulty(50)
        fresh = CurriculumScheduler(LINEAR)
        getattr(fresh, load)(getattr(saved, save)())
        assert fresh.get_current_difficulty() == 512


@pytest.mark.parametrize("state", [{}, {"current_difficulty": None}, None, [], 3, "state"])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ConfigError, match="is not a state of this scheduler"):
        CurriculumScheduler(LINEAR).set_state(state)


@pytest.mark.parametrize("value", [0, -1, 2**64, True, "8", 8.0])
def test_what_is_no_length_or_count_is_refused(value):
    scheduler = CurriculumScheduler(LINEAR)
    before = scheduler.get_state()
    refused = rf": {value!r} is not valid; give a whole number from 1 to"
    for name in ("bucket", "seq_length", "train_tokens", "rows"):
        with pytest.raises(ConfigError, match=f"^{name}{refused} 10{{15}}"):
            CurriculumScheduler(LINEAR, **{name: value})
    with pytest.raises(ConfigError, match=f"^difficulty{refused} 16777216"):
        scheduler.set_current_difficulty(value)
    if isinstance(value, int):
        with pytest.raises(ConfigError, match=f"^current_difficulty{refused} 16777216"):
            scheduler.set_state({**scheduler.get_state(), "current_difficulty": value})
    assert scheduler.get_state() == before


@pytest.mark.parametrize("step", [-1, 2**62, 2**63, 2**64, "8", 8.0, None, True])
def test_what_is_no_step_is_refused(step):
    with pytest.raises(ConfigError, match=rf"step: {step!r} is .*; give steps counted from 1"):
        CurriculumScheduler(LINEAR).get_difficulty(step)


def test_what_is_no_block_or_no_function_is_refused():
    with pytest.raises(ConfigError, match="None is not an object"):
        CurriculumScheduler(None)
    with pytest.raises(ConfigError, match="3 is not a function"):
        CurriculumScheduler(block({}, schedule_type="custom")).set_custom_get_difficulty(3)


def test_a_state_of_another_schedule_is_refused():
    other = CurriculumScheduler(block(max_difficulty=512))
    with pytest.raises(ConfigError, match="max_difficulty is 512 in the state, 1024 here"):
        CurriculumScheduler(LINEAR).set_state(other.get_state())


def test_linear_is_a_root_of_degree_1_and_two_stages_are_discrete():
    root = CurriculumScheduler(block({**LINEAR["schedule_config"], "root_degree": 1}, schedule_type="fixed_root"))
    linear = CurriculumScheduler(LINEAR)
    assert [root.get_difficulty(t) for t in range(120)] == [linear.get_difficulty(t) for t in range(120)]
    stages = {"difficulty": [128, 1024], "max_step": [20_000]}
    shortformer = CurriculumScheduler(block(stages, schedule_type="fixed_discrete"))
    assert [shortformer.get_difficulty(t) for t in (1, 20_000, 20_001)] == [128, 128, 1024]


def test_mixed_is_what_a_custom_function_of_it_would_be():
    turns = {"difficulty": [128, 1024], "steps": [900, 100]}
    scheduler = CurriculumScheduler(block(turns, schedule_type="fixed_mixed", min_difficulty=128))
    steps = [1, 900, 901, 1000, 1001, 123_456_789]
    assert [scheduler.get_difficulty(step) for step in steps] == [rows_of_figure_2(step) for step in steps]
    assert scheduler.get_state()["schedule_config"] == turns


def test_a_bucket_rounds_every_schedule_also_one_whose_function_comes_later():
    assert CurriculumScheduler(LINEAR, bucket=64).get_difficulty(50) == 512  # 8 + 1016 / 2 = 516
    scheduler = CurriculumScheduler(block({}, schedule_type="custom"), bucket=100)
    scheduler.set_custom_get_difficulty(lambda step: 10 * step)
    assert [scheduler.get_difficulty(t) for t in (1, 19, 20, 103)] == [100, 100, 200, 1024]


def test_a_ramp_in_tokens_is_solved_with_the_lengths_and_rows_of_the_run():
    # in 127 steps 16, 24, ... 1024, in buckets of 128 (never below 128; 1024 as it is): T must be larger for as many tokens
    tokens = block({"total_curriculum_tokens": 66_040, "difficulty_step": 8})
    pacing = CurriculumScheduler(tokens, rows=1, bucket=128).pacing
    total = pacing.settles_at
    assert Timeline(pacing, 1, 10**6).consumed_tokens(total) >= 66_040
    assert total > 127
    rows = BatchSizeRamp(1, 1, 30_000, 2)
    pacing = CurriculumScheduler(tokens, rows=rows).pacing
    assert Timeline(pacing, rows, 10**6).consumed_tokens(pacing.settles_at) >= 66_040
    assert pacing.settles_at < 127


def test_custom_by_import_path_goes_back_and_forth():
    schedule = {"function": f"{__name__}:rows_of_figure_2", "difficulty_step": 8}
    scheduler = CurriculumScheduler(block(schedule, schedule_type="custom"))
    assert [scheduler.update_difficulty(t) for t in (900, 901, 1000, 1001)] == [128, 1024, 1024, 128]


def test_custom_set_on_the_scheduler():
    scheduler = CurriculumScheduler(block({}, schedule_type="custom"))
    with pytest.raises(ConfigError, match="set_custom_get_difficulty"):
        scheduler.get_difficulty(1)
    scheduler.set_custom_get_difficulty(lambda step: 10 * step)
    assert [scheduler.get_difficulty(t) for t in (0, 1, 500)] == [8, 10, 1024]
    with pytest.raises(ConfigError, match="schedule_type: 'fixed_linear'"):
        CurriculumScheduler(LINEAR).set_custom_get_difficulty(lambda _step: 8)


def test_a_ramp_in_tokens_or_as_a_fraction_needs_the_run():
    # in 127 steps each length is 8 more than the last: 16 + 24 + ... + 1024 = 8 * (128 * 129 / 2 - 1) = 66,040
    tokens = block({"total_curriculum_tokens": 66_040, "difficulty_step": 8})
    fraction = block({"curriculum_fraction": 0.3, "difficulty_step": 8})
    for incomplete in (tokens, fraction):
        with pytest.raises(ConfigError, match="train_batch_size"):
            CurriculumScheduler(incomplete)
    assert CurriculumScheduler(tokens, rows=1).pacing.settles_at == 127
    scheduler = CurriculumScheduler(fraction, rows=1, train_tokens=10_000_000)
    assert scheduler.pacing.settles_at == int(0.3 * Timeline(scheduler.pacing, 1, 10_000_000).steps)


numbers = st.integers(-2, 40) | st.floats(-2, 40) | st.sampled_from([10**6, True, "8", None])
blocks = st.one_of(
    st.fixed_dictionaries(
        {
            "min_difficulty": numbers,
            "max_difficulty": numbers,
            "schedule_type": st.sampled_from(["fixed_linear", "fixed_root"]),
            "schedule_config": st.fixed_dictionaries(
                {"total_curriculum_step": numbers, "difficulty_step": numbers}, optional={"root_degree": numbers}
            ),
        }
    ),
    st.fixed_dictionaries(
        {
            "min_difficulty": numbers,
            "max_difficulty": numbers,
            "schedule_type": st.just("fixed_discrete"),
            "schedule_config": st.fixed_dictionaries(
                {"difficulty": st.lists(numbers, max_size=4), "max_step": st.lists(numbers, max_size=3)}
            ),
        }
    ),
)


@settings(max_examples=1000)
@given(blocks)
def test_whatever_is_accepted_keeps_its_promises(block):
    try:
        scheduler = CurriculumScheduler(block)
    except ConfigError:  # any other exception fails the test
        return
    config, pacing = scheduler.config, scheduler.pacing
    steps = np.arange(1, 60)
    lengths = pacing(steps)
    assert np.all((lengths >= config.min_difficulty) & (lengths <= config.max_difficulty))
    assert [scheduler.get_difficulty(step) for step in steps.tolist()] == lengths.tolist()
    settled = pacing(max(pacing.settles_at, 1))
    assert pacing(pacing.settles_at + 10**6) == settled
    if block["schedule_type"] != "fixed_discrete":
        step = config.schedule_config.difficulty_step
        assert np.all((lengths % step == 0) | (lengths == config.max_difficulty))
        assert np.all(np.diff(lengths) >= 0)
        assert settled == config.max_difficulty
