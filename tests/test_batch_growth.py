"""More samples at short lengths: by hand, the floor of every step, what is refused, and which runs are the same."""

import numpy as np
import pytest
from helpers.settings import changed
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum import ConfigError, RunConfig
from seqlen_curriculum.config.equivalence import trains_identically
from seqlen_curriculum.planning.summary import describe, plan
from seqlen_curriculum.schedule.global_batch import BatchGrowth
from seqlen_curriculum.schedule.pacing import Discrete
from seqlen_curriculum.schedule.timeline import Timeline
from seqlen_curriculum.schedule.token_lr import TokenCosine, TokenCosineParams

RUN = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "curriculum_learning": {
        "enabled": True,
        "min_difficulty": 8,
        "max_difficulty": 64,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 14, "difficulty_step": 8},
        "batch_growth": True,
        "min_tokens_per_step": 200,
    },
    "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 2}},
    "data": {"train": ["x"], "seq_length": 64},
    "training": {"train_tokens": 5_000},
}


def config(**changes):
    return RunConfig.from_dict(changed(RUN, **changes))


def off(run):
    block = {name: value for name, value in run["curriculum_learning"].items() if "_growth" not in name}
    del block["min_tokens_per_step"]
    return {**run, "curriculum_learning": block}


def test_rows_by_hand():
    # 200 tokens in batches of 4: at 8 tokens 6.25 of them, rounded up to 8; at 16 3.1, so 4; at 24 2.1, so 3; from 32 on 2,
    # and from 50 on 1
    timeline = config().timeline()
    shapes = {seqlen: rows for rows, seqlen in timeline.shapes()}
    assert shapes == {8: 32, 16: 16, 24: 12, 32: 8, 40: 8, 48: 8, 56: 4, 64: 4}
    # 8 + 56 t / 14 = 12, 16, 20, 24, 28, 32, ... down to 8, 16, 16, 24, 24, 32
    assert timeline.seqlen(np.arange(1, 7)).tolist() == [8, 16, 16, 24, 24, 32]
    assert timeline.consumed_samples(np.arange(7)).tolist() == [0, 32, 48, 64, 76, 88, 96]
    assert timeline.consumed_tokens(np.arange(7)).tolist() == [0, 256, 512, 768, 1056, 1344, 1600]
    assert (timeline.global_batch, timeline.first_step_of_samples(4)) == (4, timeline.first_step_at(56))


def test_a_plan_shows_the_rows():
    summary = plan(config())
    assert (summary["milestones"][0]["rows"], summary["milestones"][-1]["rows"]) == (32, 4)
    assert f"rows of a step    32 to 4 (from step {summary['full_batch_step']}), 8 shapes" in describe(summary)


@given(st.integers(1, 600), st.integers(1, 10**6), st.integers(1, 2048))
def test_every_step_has_the_floor_in_whole_batches_and_at_most_half_as_much_again(batch, floor, used):
    samples = int(BatchGrowth(batch, floor).samples(np.array([used]))[0])
    batches, rest = divmod(samples, batch)
    assert rest == 0
    assert samples * used >= floor
    needed = -(-floor // (batch * used))
    assert needed <= batches <= 1.5 * needed
    assert batches // (batches & -batches) in (1, 3)  # a power of two, or three times one


def test_the_rate_counts_samples_and_tokens_that_were_trained_on():
    # 3 times 4 samples of 4 tokens make 40; then 2 times 4 of 8 do: 48, 96, 160, 224 tokens
    timeline = Timeline(Discrete((4, 8), (2,)), BatchGrowth(4, 40), train_tokens=224)
    assert timeline.consumed_tokens(np.arange(1, 5)).tolist() == [48, 96, 160, 224]
    rate = TokenCosine(timeline, TokenCosineParams(warmup_samples=28), 1.0)
    assert rate.warmup_tokens == 24 * 4 + 4 * 8  # 12 + 12 samples of 4 tokens and 4 of 8
    assert [rate(step) for step in (1, 2, 4)] == [12 / 28, 24 / 28, 0.0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["balanced", "fixed"])
def test_ranks_share_every_step_in_equal_micro_batches(ranks, kind):
    run = config(training__micro_batch=kind).for_ranks(ranks).plan
    assert run.timeline.consumed_samples(run.steps) == config().timeline().consumed_samples(run.steps)
    for step in range(1, run.steps + 1):
        shares = [run.samples_of_rank(step, rank) for rank in range(ranks)]
        rows, seqlen = run.timeline.samples(step) // ranks, run.timeline.seqlen(step)
        assert shares == [(rank * rows, rows) for rank in range(ranks)]
        assert rows * ranks == run.timeline.samples(step)
        micro = run.micro_batch_rows(rows, seqlen)
        assert rows % micro == 0
        if kind == "balanced":  # no prime number of rows is left to single rows
            assert micro == rows or micro * seqlen > 64 // 3
    assert run.micro_batch_rows(32 // ranks, 8) == (8 if kind == "balanced" else 1)


def test_a_run_without_growth_is_the_one_it_was_and_with_growth_another():
    ours, without = config().settings(), RunConfig.from_dict(off(RUN)).settings()
    assert "curriculum_learning.batch_growth" not in without
    assert ours["curriculum_learning.min_tokens_per_step"] == 200
    written_out = RunConfig.from_dict(changed(off(RUN), curriculum_learning__batch_growth=False))
    assert written_out.settings() == without
    assert not trains_identically(without, ours, 1)
    assert not trains_identically(ours, config(curriculum_learning__min_tokens_per_step=100).settings(), 1)
    # where no step was short of the floor, the steps so far are the same
    assert trains_identically(without, config(curriculum_learning__min_tokens_per_step=32).settings(), 10)


def test_a_file_written_back_gives_the_same_run():
    assert RunConfig.from_dict(config().as_file()).settings() == config().settings()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"curriculum_learning__min_tokens_per_step": 257},
            r"min_tokens_per_step: 257 is above the 256 tokens .*train_batch_size 4 x 64\); lower it",
        ),
        ({"curriculum_learning__min_tokens_per_step": None}, "min_tokens_per_step: required by batch_growth true"),
        ({"curriculum_learning__batch_growth": False}, "min_tokens_per_step: 200 needs batch_growth true; set it"),
        ({"curriculum_learning__min_tokens_per_step": 0}, "min_tokens_per_step: 0 is not valid"),
        (
            {"batch_size_warmup": {"start": 2, "increment": 2, "tokens": 100}},
            "batch_growth: true doesn't work together with batch_size_warmup",
        ),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_the_floor_is_judged_once_the_batch_is_known():
    run = {name: value for name, value in RUN.items() if name != "train_batch_size"}
    with pytest.raises(ConfigError, match=r"min_tokens_per_step: 200 is above the 64 tokens"):
        RunConfig.from_dict(run).for_ranks(1)
    assert RunConfig.from_dict(run).for_ranks(4).timeline().shapes() == config().timeline().shapes()


@pytest.mark.parametrize("method", ["segment", "window"])
def test_methods_that_use_nearly_whole_samples_need_no_growth(method):
    run = config(curriculum_learning__method=method, curriculum_learning__min_tokens_per_step=160)
    assert run.timeline().samples(np.arange(1, 15)).tolist() == [4] * 14
