"""The one JSON file: strictness, overrides, conflicts between sections, and every file the project ships."""

import json
from pathlib import Path

import pytest
from helpers.wrong_files import GOOD, WARMUP, WRONG_RUNS, changed

from seqlen_curriculum import ConfigError, RunConfig
from seqlen_curriculum.config.deepspeed import batch_shape
from seqlen_curriculum.schedule.buckets import Buckets, SourceBuckets

CONFIGS = sorted(
    path
    for path in (Path(__file__).parent.parent / "configs").rglob("*.json")
    if path.name != "run.schema.json"
    and path.parent.name not in ("long_context", "studies")  # test_long_context.py, test_study_file.py
)


def written(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_reads_a_good_file(tmp_path):
    config = RunConfig.load(written(tmp_path, GOOD))
    assert set(config.deepspeed) == {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "optimizer",
        "zero_optimization",
    }
    assert config.training.train_tokens == 100_000
    assert config.timeline().seqlen(5) == 32  # 8 + 56 * 0.5 = 36, down to 32
    assert config.settings()["curriculum_learning.schedule_config.total_curriculum_step"] == 10


def test_a_disabled_or_absent_curriculum_trains_at_full_length():
    disabled = RunConfig.from_dict(changed(curriculum_learning={"enabled": False}))
    absent = RunConfig.from_dict(changed(curriculum_learning=None))
    assert disabled.timeline().seqlen(1) == absent.timeline().seqlen(1) == 64
    assert "curriculum_learning" not in disabled.deepspeed


def test_other_schedulers_are_left_to_deepspeed():
    config = RunConfig.from_dict(changed(scheduler={"type": "WarmupLR", "params": {}}))
    assert config.scheduler is None
    assert config.deepspeed["scheduler"] == {"type": "WarmupLR", "params": {}}


def test_null_is_absent():
    config = RunConfig.from_dict(changed(scheduler={"type": "WarmupLR"}) | {"scheduler": None, "fp16": None})
    assert config.scheduler is None
    assert not {"scheduler", "fp16"} & set(config.deepspeed)


def test_the_batch_may_be_given_by_its_parts():
    config = RunConfig.from_dict(changed(train_batch_size=None, gradient_accumulation_steps=3))
    assert config.for_ranks(2).global_batch == 12


def test_overrides(tmp_path):
    sets = ["training.train_tokens=2e9", "model.preset=tiny-1m", "fp16.enabled=true", 'data.split="9,1,0"']
    config = RunConfig.load(written(tmp_path, GOOD), sets)
    assert (config.training.train_tokens, config.model.preset) == (2_000_000_000, "tiny-1m")
    assert (config.deepspeed["fp16"], config.data.split) == ({"enabled": True}, "9,1,0")


@pytest.mark.parametrize("override", ["training.train_tokens", "=3", "training.=3", "train_batch_size.x=3"])
def test_bad_overrides(tmp_path, override):
    with pytest.raises(ConfigError, match="--set"):
        RunConfig.load(written(tmp_path, GOOD), [override])


def test_the_guard_is_no_part_of_the_run():
    settings = {"on_spike": "rollback", "keep_last": 1, "spike_ratio": 3, "spike_skip_steps": 5000}
    guarded = changed(training={**GOOD["training"], **settings})
    assert RunConfig.from_dict(guarded).settings() == RunConfig.from_dict(GOOD).settings()


@pytest.mark.parametrize(("bad", "message"), WRONG_RUNS.values(), ids=WRONG_RUNS)
def test_malformed_files_are_refused_by_name(bad, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(bad)
    assert message in str(caught.value)


def test_all_problems_of_a_file_are_reported_at_once(tmp_path):
    bad = changed(model__layers=3, training__sed=1, data__seq_length=0, curriculum_learning__min_difficulty=0)
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(written(tmp_path, bad), require=("model", "evaluation"))
    text = str(caught.value)
    assert "run.json: 5 problems" in text
    for name in ("evaluation", "model.layers", "training.sed", "data.seq_length", "min_difficulty"):
        assert name in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": 1, "model": 2}', "key 'model' is given twice"),
        ('{"model": {"preset": "a", "preset": "b"}}', "key 'preset' is given twice"),
        ('{"model": }', "line 1, column 11"),
        ("[]", "holds list, not an object"),
        ('{"model": 3}', "model: "),
        ('{"curriculum_learning": []}', "curriculum_learning: [] is not an object"),
    ],
)
def test_broken_json(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(written(tmp_path, text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ['{"lr": NaN}', '{"lr": -Infinity}', '{"lr": ' + "1" * 5000 + "}", "[" * 200_000],
    ids=["NaN", "Infinity", "digits", "brackets"],
)
def test_json_that_no_program_should_read(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=r"run\.json: "):
        RunConfig.load(path)
    with pytest.raises(ConfigError, match="--set"):
        RunConfig.load(written(tmp_path, GOOD), [f"training.seed={text}"])


def test_an_override_may_not_give_a_key_twice(tmp_path):
    with pytest.raises(ConfigError, match="key 'seed' is given twice"):
        RunConfig.load(written(tmp_path, GOOD), ['training={"seed": 1, "seed": 2}'])


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "run.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"run\.json: is not UTF-8 at byte 1; save it as UTF-8"):
        RunConfig.load(tmp_path / "run.json")


def test_commented_sections_and_whole_floats_are_fine():
    config = RunConfig.from_dict(changed(_data={"train": 3}, train_batch_size=8.0))
    assert config.deepspeed["train_batch_size"] == config.global_batch == 8
    assert isinstance(config.deepspeed["train_batch_size"], int)


def test_a_disabled_block_gives_the_full_length_of_a_file_without_data():
    config = RunConfig.from_dict(changed(data=None, curriculum_learning__enabled=False))
    assert config.timeline().seqlen(1) == 64


def test_what_makes_a_run_the_run_it_is():
    def settings(**changes):
        return RunConfig.from_dict(changed(**changes)).settings()

    reference = settings()
    for other in (
        {"optimizer__params__lr": 0.2},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}},
        {"scheduler__params__min_lr": 0},
        {"training__seed": 7},
        {"curriculum_learning__enabled": False},
        {"model__dropout": 0.5},
        {"data__split": "1,1,1"},
        {"training__seqlen_bucket": 16},
        {"batch_size_warmup": WARMUP},
    ):
        assert settings(**other) != reference, other
    for same in (
        {"training__eval_interval": 3},
        {"train_micro_batch_size_per_gpu": 1},
        {"model__activation_checkpointing": True},
        {"zero_optimization__stage": 2},
    ):
        assert settings(**same) == reference, same


def test_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere\.json: can't be read"):
        RunConfig.load("nowhere.json")


@pytest.mark.parametrize(
    ("ranks", "changes", "shape"),
    [
        (1, {}, (8, 2, 4)),
        (2, {}, (4, 2, 2)),
        (2, {"train_micro_batch_size_per_gpu": None}, (4, 4, 1)),
        (2, {"train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": 4}, (4, 1, 4)),
    ],
)
def test_batch_shape(ranks, changes, shape):
    assert batch_shape(RunConfig.from_dict(changed(**changes)).keys, ranks) == shape


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (3, {}, "8 rows don't divide over 3 ranks"),
        (1, {"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu: 3 doesn't divide the 8 rows"),
        (2, {"gradient_accumulation_steps": 4}, "4 x train_micro_batch_size_per_gpu 2 x 2 ranks is 16"),
        (1, {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: 0 is not valid"),
    ],
)
def test_batches_that_do_not_divide(ranks, changes, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(changed(**changes)).for_ranks(ranks)


def test_a_batch_size_warmup_is_part_of_the_run():
    config = RunConfig.from_dict(changed(batch_size_warmup=WARMUP))
    # three increments in 10,000 tokens; the first step's 2 rows are of 8 + 5.6 tokens, down to 8
    timeline = config.timeline()
    assert (timeline.rows(1), timeline.consumed_tokens(1)) == (2, 16)
    assert timeline.rows(timeline.steps_to(3334) + 1) == 4
    assert timeline.rows(timeline.steps_to(10_000) + 1) == 8 == config.global_batch
    assert "batch_size_warmup" not in config.deepspeed
    assert config.settings()["batch_size_warmup.tokens"] == 10_000
    assert RunConfig.from_dict(changed(batch_size_warmup={**WARMUP, "tokens": 5})).settings() != config.settings()


@pytest.mark.parametrize("duration", [{"total_curriculum_tokens": 20_000}, {"curriculum_fraction": 0.5}], ids=str)
def test_a_ramp_that_depends_on_the_run_depends_on_its_rows(duration):
    schedule = {**duration, "difficulty_step": 8}
    constant, rising = (
        RunConfig.from_dict(changed(curriculum_learning__schedule_config=schedule, **more)).timeline()
        for more in ({}, {"batch_size_warmup": WARMUP})
    )
    assert rising.first_step_at(64) > constant.first_step_at(64)
    ramp, tokens = rising.first_step_at(64), rising.consumed_tokens
    assert duration.get("total_curriculum_tokens", 0) <= tokens(ramp)
    assert ramp <= duration.get("curriculum_fraction", 1) * rising.steps


@pytest.mark.parametrize(
    ("ranks", "warmup", "message"),
    [
        (4, {}, "batch_size_warmup.start: 2 rows don't divide over 4 data-parallel ranks"),
        (2, {}, "batch_size_warmup.start: 2 rows are 1 .*micro-batch of 2 rows"),
        (2, {"start": 4, "increment": 4}, None),
        (1, {}, None),
    ],
)
def test_levels_of_a_batch_size_warmup_fit_ranks_and_fixed_micro_batches(ranks, warmup, message):
    config = RunConfig.from_dict(changed(batch_size_warmup={**WARMUP, **warmup}, training__micro_batch="fixed"))
    if message is None:
        assert config.for_ranks(ranks).batch_size_warmup == config.batch_size_warmup
    else:
        with pytest.raises(ConfigError, match=message):
            config.for_ranks(ranks)


def test_balanced_micro_batches_fit_any_level_and_a_batch_given_by_parts_is_checked_too():
    RunConfig.from_dict(changed(batch_size_warmup=WARMUP)).for_ranks(2)
    config = RunConfig.from_dict(
        changed(
            train_batch_size=None, gradient_accumulation_steps=1, batch_size_warmup=WARMUP, curriculum_learning=None
        )
    )
    with pytest.raises(ConfigError, match="start: 2 is not below train_batch_size 2"):
        config.for_ranks(1)


def test_a_batch_size_warmup_with_a_curriculum_is_warned_of():
    assert RunConfig.from_dict(GOOD).warnings() == []
    assert RunConfig.from_dict(changed(batch_size_warmup=WARMUP, curriculum_learning=None)).warnings() == []
    disabled = changed(batch_size_warmup=WARMUP, data=None, curriculum_learning__enabled=False)
    assert RunConfig.from_dict(disabled).warnings() == []
    (warning,) = RunConfig.from_dict(changed(batch_size_warmup=WARMUP)).warnings()
    assert "Section 5.1" in warning
    assert "multiple of the data-parallel size" in warning


JUMPING = {
    "fixed_mixed": {"difficulty": [64, 8], "steps": [3, 1]},
    "fixed_discrete": {"difficulty": [8, 64], "max_step": [5]},
    "custom": {"function": "math:sqrt", "difficulty_step": 8},
}


@pytest.mark.parametrize("schedule", JUMPING)
@pytest.mark.parametrize("on_spike", ["stop", "rollback"])
def test_a_guard_across_jumps_of_the_length_is_warned_of(schedule, on_spike):
    jumping = {
        "curriculum_learning__schedule_type": schedule,
        "curriculum_learning__schedule_config": JUMPING[schedule],
    }
    (warning,) = RunConfig.from_dict(changed(training__on_spike=on_spike, **jumping)).warnings()
    for part in (f'training.on_spike: "{on_spike}"', f'schedule_type "{schedule}"', "training.spike_ratio"):
        assert part in warning
    assert RunConfig.from_dict(changed(**jumping)).warnings() == []
    assert RunConfig.from_dict(changed(training__on_spike=on_spike)).warnings() == []
    assert RunConfig.from_dict(changed(training__on_spike=on_spike, curriculum_learning=None)).warnings() == []


def test_a_bucket_is_followed_by_the_plan_and_by_the_engine():
    config = RunConfig.from_dict(changed(training__seqlen_bucket=24))
    lengths = [24, 24, 24, 24, 24, 24, 24, 48, 48, 64]  # 8 + 5.6 t, in eights 8 to 56, and 64 from step 10 on
    assert [config.timeline().seqlen(step) for step in range(1, 11)] == lengths
    assert [config.curriculum_scheduler().update_difficulty(step) for step in range(1, 11)] == lengths
    assert RunConfig.from_dict(changed(training__seqlen_bucket=24, curriculum_learning=None)).timeline().seqlen(1) == 64


def test_max_grad_norm_of_old_files_becomes_gradient_clipping():
    config = RunConfig.from_dict(changed(optimizer__params__max_grad_norm=1.0))
    assert config.deepspeed["gradient_clipping"] == 1.0
    assert config.deepspeed["optimizer"]["params"] == {"lr": 1e-3}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_a_run_records_of_its_file_is_the_same_run(path):
    weights = json.dumps([[0.7, "/corpora/wiki"], [0.3, "/corpora/books"]])
    config = RunConfig.load(path, ["training.seed=7", f"data.train={weights}"])
    written = json.loads(json.dumps(config.as_file(), allow_nan=False))
    assert RunConfig.from_dict(written) == config
    assert (written["training"]["seed"], written["data"]["leftovers"]) == (7, config.data.leftovers)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_plans(path):
    config = RunConfig.load(path, require=("model", "data", "training"))
    if config.needs_buckets:  # a corpus with as many tokens of each length
        lengths = config.data.piece_lengths
        pieces = tuple(lengths[-1] // length for length in lengths)
        config = config.with_buckets(Buckets(lengths, (SourceBuckets("corpus", 1.0, pieces, 0),)))
    timeline = config.timeline()
    assert timeline.first_step_at(config.data.seq_length) is not None
    assert config.plan.learning_rate()(timeline.steps) == config.scheduler.params.min_lr
    assert path.parent.name == "configs" or "_source" in config.deepspeed  # where a study's numbers come from


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.parent.name == "paper"], ids=lambda path: path.stem)
def test_the_papers_files_overlap_the_reduction_of_gradients_with_the_backward_pass(path):
    config = RunConfig.load(path)
    zero = config.deepspeed["zero_optimization"]
    assert zero["overlap_comm"]
    # With a single bucket nothing is reduced before the last gradient is there.
    assert config.model.parameter_count() > 2 * zero["reduce_bucket_size"]
