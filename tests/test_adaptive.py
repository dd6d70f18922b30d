"""What evaluations decide, and runs that share a beginning, in one launch of the real engine on two ranks."""

import json

import pytest
from helpers.runs import Runs, assert_same_run, planned_samples, records, samples_by_step
from helpers.runs import run as run_of
from helpers.settings import changed

import seqlen_curriculum
from seqlen_curriculum import ConfigError, RunConfig
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.run_folder.checkpoint_manifest import read_checkpoint
from seqlen_curriculum.run_folder.evaluations import Evaluations

RATIO = 1.002


@pytest.fixture(scope="session")
def tiny_run(tiny_run):
    """The tiny run in micro-batches of all rows, which are faster."""
    return {**tiny_run, "train_micro_batch_size_per_gpu": 4}


@pytest.fixture(scope="module")
def adaptive_run(tiny_run):
    """Lengths 8 to 32 in 30 steps unless held, evaluated every 3 steps, at a rate at which it fluctuates."""
    run = json.loads(json.dumps(tiny_run))
    schedule = {"total_curriculum_step": 30, "difficulty_step": 2, "perplexity_ratio": RATIO}
    run["curriculum_learning"] |= {"schedule_type": "adaptive", "schedule_config": schedule}
    run["optimizer"]["params"]["lr"] = 4e-2
    run["zero_optimization"] = {"stage": 1}
    run["data"]["leftovers"] = "recycle"
    run["training"] |= {"eval_interval": 3, "save_interval": 0, "save_steps": [7, 20], "keep_last": 1}
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, adaptive_run, tiny_run):
    folder = tmp_path_factory.mktemp("adaptive")
    (folder / "adaptive.json").write_text(json.dumps(adaptive_run))
    (folder / "linear.json").write_text(json.dumps(tiny_run))

    def run(config, name, *sets, **more):
        return run_of(folder / f"{config}.json", folder / name, sets, **more)

    twice, steep = "curriculum_learning.schedule_config.total_curriculum_step=40", "training.save_interval=0"
    grown = ("curriculum_learning.batch_growth=true", "curriculum_learning.min_tokens_per_step=200")
    all_runs = [
        run("adaptive", "grown", *grown),
        run("adaptive", "grown-begun", *grown, until_step=5),
        run("adaptive", "grown-parts", *grown, begins_as_copy_of=f"{folder}/grown-begun", after="grown-begun"),
        run("adaptive", "whole"),
        run("adaptive", "begun", until_step=16),
        run("adaptive", "parts", begins_as_copy_of=f"{folder}/begun", after="begun"),
        run("adaptive", "elsewhere", resume=f"{folder}/whole/global_step20", after="whole"),
        # 8 + 24 t / 20 reaches 12 at step 4 of T = 20 and at step 7 of T = 40
        run("linear", "steep", steep, until_step=3),
        run("linear", "steep-later", steep, until_step=4),
        run("linear", "flat", steep, twice, until_step=12),
        run(
            "linear", "flat-from-steep", steep, twice, until_step=12, begins_as_copy_of=f"{folder}/steep", after="steep"
        ),
        run(
            "linear",
            "too-late",
            steep,
            twice,
            begins_as_copy_of=f"{folder}/steep-later",
            after="steep-later",
            fails=True,
        ),
        run("adaptive", "stopped", f"training.stop_perplexity_ratio={RATIO}", fails=True),
    ]
    done = Runs(folder)
    done.launch("all", all_runs, ranks=2)
    return done


def held_of(save):
    (last,) = [path for path in save.glob("global_step*") if path.name not in ("global_step7", "global_step20")]
    return read_checkpoint(last).evaluations.held


def test_lengths_wait_exactly_where_the_perplexity_fluctuated(runs, adaptive_run):
    steps, evaluations = records(runs["whole"])
    held = held_of(runs["whole"])
    plan = RunConfig.from_dict(adaptive_run).plan.holding(*held)
    timeline, rate = plan.timeline, plan.learning_rate()
    settles_at = timeline.pacing.settles_at
    assert [(one["step"], one["seqlen"], one["consumed_tokens"], one["lr"]) for one in steps] == [
        (step, timeline.seqlen(step), timeline.consumed_tokens(step), rate(step))
        for step in range(1, timeline.steps + 1)
    ]
    so_far, fluctuated = Evaluations(), []
    for one in evaluations:
        if so_far.ratio(one["valid_loss"]) > RATIO and one["step"] < settles_at:
            fluctuated.append(one["step"])
        so_far = so_far.then(one["valid_loss"])
    assert held == fluctuated
    assert len(held) > 1  # or this shows nothing
    assert timeline.steps > RunConfig.from_dict(adaptive_run).timeline().steps


def test_every_token_it_reads_is_the_one_that_the_lengths_held_name(runs, adaptive_run):
    config = RunConfig.from_dict(adaptive_run)
    plan = config.plan.holding(*held_of(runs["whole"]))
    data, _ = open_run_data(config)
    assert samples_by_step(runs["whole"]) == planned_samples(data.along(plan.timeline))


def test_stopped_and_continued_it_decides_the_same(runs):
    assert records(runs["parts"]) == records(runs["whole"])
    assert samples_by_step(runs["parts"]) == samples_by_step(runs["whole"])
    assert held_of(runs["parts"]) == held_of(runs["whole"])


def test_a_batch_growth_reads_and_trains_what_is_planned_and_resumes_exactly(runs, adaptive_run):
    grown = changed(adaptive_run, curriculum_learning__batch_growth=True, curriculum_learning__min_tokens_per_step=200)
    config = RunConfig.from_dict(grown)
    plan = config.plan.holding(*held_of(runs["grown"]))
    timeline, rate = plan.timeline, plan.learning_rate()
    steps, _ = records(runs["grown"])
    assert [(one["step"], one["rows"], one["consumed_tokens"], one["lr"]) for one in steps] == [
        (step, timeline.rows(step), timeline.consumed_tokens(step), rate(step)) for step in range(1, timeline.steps + 1)
    ]
    assert {one["rows"] for one in steps} >= {32, 24, 16}  # batches of 8 rows: 200 tokens take 4 of length 8, 3 of 10
    assert len({one["rows"] for one in steps if one["step"] > 5}) > 1  # resumed while it still shrinks
    data, _ = open_run_data(config)
    assert samples_by_step(runs["grown"]) == planned_samples(data.along(timeline))
    assert_same_run(runs["grown-parts"], runs["grown"])


def test_a_checkpoint_brings_its_decisions_along(runs):
    ours, theirs = records(runs["elsewhere"]), records(runs["whole"])
    assert ours[0] == [one for one in theirs[0] if one["step"] > 20]
    assert ours[1] == [one for one in theirs[1] if one["step"] > 20]
    assert held_of(runs["elsewhere"]) == held_of(runs["whole"])


def test_checkpoints_that_were_asked_for_stay(runs):
    assert (runs["whole"] / "global_step7").is_dir()
    assert (runs["whole"] / "global_step20").is_dir()


def test_a_run_ends_after_the_step_it_was_asked_to(runs):
    assert records(runs["flat"])[0][-1]["step"] == 12
    assert [path.name for path in (runs["flat"]).glob("global_step*")] == ["global_step12"]


def test_runs_that_begin_alike_share_their_checkpoint(runs):
    assert records(runs["flat-from-steep"]) == records(runs["flat"])
    assert samples_by_step(runs["flat-from-steep"]) == samples_by_step(runs["flat"])


def test_a_checkpoint_from_after_their_parting_is_refused(runs):
    error = (runs["too-late"] / "error").read_text()
    assert "made by another run" in error
    assert "total_curriculum_step: 20 in the checkpoint, 40 now" in error


def test_a_run_may_end_at_its_first_fluctuation(runs):
    error = (runs["stopped"] / "error").read_text()
    evaluations = records(runs["stopped"])[1]
    first = held_of(runs["whole"])[0]
    assert evaluations == [one for one in records(runs["whole"])[1] if one["step"] <= first]
    assert f"step {first}: the validation perplexity is " in error
    assert f"(training.stop_perplexity_ratio {RATIO})" in error


def test_without_evaluations_or_in_another_loop_it_is_refused(adaptive_run):
    never = {**adaptive_run, "training": {**adaptive_run["training"], "eval_interval": 0}}
    with pytest.raises(ConfigError, match=r"training\.eval_interval: 0 disables evaluation, .* adaptive"):
        RunConfig.from_dict(never)
    with pytest.raises(ConfigError, match="adaptive"):
        seqlen_curriculum.initialize(config=adaptive_run)
    with pytest.raises(ConfigError, match="adaptive"):
        seqlen_curriculum.initialize(config=RunConfig.from_dict(adaptive_run))
    pieces = {
        **adaptive_run,
        "curriculum_learning": None,
        "data": {"train": ["c"], "seq_length": 32, "order": "decomposed"},
    }
    with pytest.raises(ConfigError, match=r"data\.order: \"decomposed\" sets the rows of each step"):
        seqlen_curriculum.initialize(config=pieces)


def test_a_plan_says_what_it_is_of(adaptive_run):
    config = RunConfig.from_dict(adaptive_run)
    assert any("never fluctuates" in line for line in config.warnings())
    assert config.settings()["training.eval_interval"] == 3
    linear = json.loads(json.dumps(adaptive_run))
    linear["curriculum_learning"]["schedule_type"] = "fixed_linear"
    del linear["curriculum_learning"]["schedule_config"]["perplexity_ratio"]
    assert "training.eval_interval" not in RunConfig.from_dict(linear).settings()
    assert config.timeline().steps == RunConfig.from_dict(linear).timeline().steps
