"""A run's plan: what each rank does of a step, by hand, and lengths that wait."""

import pytest

from seqlen_curriculum import ConfigError, RunConfig

RUN = {
    "train_batch_size": 24,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "curriculum_learning": {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 32,
        "schedule_type": "adaptive",
        "schedule_config": {"total_curriculum_step": 6, "difficulty_step": 4, "perplexity_ratio": 1.5},
    },
    "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 2}},
    "data": {"train": ["x"], "seq_length": 32},
    "training": {"train_tokens": 6_000, "eval_interval": 2},
}


def plan(ranks=3, **changes):
    return RunConfig.from_dict({**RUN, **changes}).for_ranks(ranks).plan


def test_ranks_share_the_samples_of_a_step():
    # 24 rows over 3 ranks are 8 a rank
    assert [plan().samples_of_rank(1, rank) for rank in range(3)] == [(0, 8), (8, 8), (16, 8)]
    segments = {**RUN["curriculum_learning"], "method": "segment"}
    assert plan(curriculum_learning=segments).samples_of_rank(1, 2) == (16, 8)  # samples, not their segments


def test_micro_batches_grow_as_lengths_shrink():
    # 2 rows at 32 are 64 tokens: 8 rows fit at 8, and of 8 rows 4 at 12 (5 do not divide 8)
    assert [plan().micro_batch_rows(8, seqlen) for seqlen in (8, 12, 16, 32)] == [8, 4, 4, 2]
    fixed = plan(training={**RUN["training"], "micro_batch": "fixed"})
    assert [fixed.micro_batch_rows(8, seqlen) for seqlen in (8, 32)] == [2, 2]
    staged = plan(ranks=6, pipeline={"stages": 2})
    assert staged.micro_batch_rows(8, 8) == 4  # two micro-batches keep two stages busy


def test_the_largest_micro_batch_may_be_that_of_an_evaluation():
    assert plan().largest_micro_batch() == (2, 32)
    short = {**RUN["curriculum_learning"], "max_difficulty": 16}
    assert plan(curriculum_learning=short).largest_micro_batch() == (2, 32)
    # of 4 x 16 and 8 x 8 tokens the longer rows
    never = {**RUN["training"], "eval_interval": 0}
    linear = {**short, "schedule_type": "fixed_linear"}
    linear["schedule_config"] = {"total_curriculum_step": 6, "difficulty_step": 4}
    assert plan(curriculum_learning=linear, training=never).largest_micro_batch() == (4, 16)


def test_lengths_wait_after_an_evaluation_that_fluctuates():
    # 8 + 24 t / 6 is 12, 16, 20, 24, 28, 32
    free = plan()
    held = free.holding(2)
    assert [free.timeline.seqlen(step) for step in range(1, 8)] == [12, 16, 20, 24, 28, 32, 32]
    assert [held.timeline.seqlen(step) for step in range(1, 9)] == [12, 16, 16, 16, 20, 24, 28, 32]
    assert [held.scheduler.get_difficulty(step) for step in (2, 3, 4, 5)] == [16, 16, 16, 20]
    assert [free.scheduler.get_difficulty(step) for step in (2, 3, 4, 5)] == [
        16,
        20,
        24,
        28,
    ]  # nothing is changed in place
    assert held.holding(6).held == (2, 6)
    assert held.learning_rate()(held.steps) == 0.0
    assert free.holding() is free


def test_only_an_adaptive_schedule_holds_and_not_at_full_length():
    assert not plan().holds_at(2, 1.5)
    assert plan().holds_at(2, 1.51)
    assert not plan().holds_at(6, 9.0)  # full length is reached
    schedule = {"total_curriculum_step": 6, "difficulty_step": 4}
    linear = {**RUN["curriculum_learning"], "schedule_type": "fixed_linear", "schedule_config": schedule}
    assert not plan(curriculum_learning=linear).holds_at(2, 9.0)


def test_the_rate_needs_a_peak():
    assert plan().learning_rate()(2) == 1e-3
    assert plan().learning_rate(2e-3)(2) == 2e-3
    without = {name: value for name, value in RUN.items() if name != "optimizer"}
    with pytest.raises(ConfigError, match=r"optimizer\.params\.lr: required"):
        RunConfig.from_dict(without).plan.learning_rate()
    assert plan(scheduler=None).learning_rate() is None


@pytest.mark.parametrize("accumulation", [1, 7, 24, 100])
def test_accumulation_is_judged_once_the_ranks_are_known(accumulation):
    run = {name: value for name, value in RUN.items() if name != "train_micro_batch_size_per_gpu"}
    config = RunConfig.from_dict({**run, "gradient_accumulation_steps": accumulation})
    assert config.plan.steps == RunConfig.from_dict(RUN).plan.steps
    if 24 % accumulation:
        with pytest.raises(
            ConfigError, match=rf"gradient_accumulation_steps: {accumulation} doesn't divide the 24 rows"
        ):
            config.for_ranks(1)
    else:
        assert config.for_ranks(1).plan.micro_batch == 24 // accumulation


def test_a_plan_is_derived_once():
    config = RunConfig.from_dict(RUN)
    assert config.plan is config.plan
    assert config.timeline() is config.plan.timeline
