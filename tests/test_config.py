"""The one JSON file: strictness, overrides, conflicts between sections, and every file the project ships."""

import copy
import json
from pathlib import Path

import pytest

from seqlen_curriculum import ConfigError, RunConfig
from seqlen_curriculum.config.deepspeed import batch_shape

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.json"))
GOOD = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 1},
    "curriculum_learning": {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 64,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8},
    },
    "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 3, "min_lr": 1e-5}},
    "model": {"preset": "tiny-200k"},
    "data": {"train": ["corpus/x"], "seq_length": 64},
    "training": {"train_tokens": 1e5},
}


WARMUP = {"start": 2, "increment": 2, "tokens": 1e4}


def changed(**values):
    """GOOD with ``section__key=value`` changes; a value of None removes the key."""
    config = copy.deepcopy(GOOD)
    for path, value in values.items():
        *parents, key = path.split("__")
        target = config
        for parent in parents:
            target = target[parent]
        if value is None:
            del target[key]
        else:
            target[key] = value
    return config


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


BAD = {
    "seq_length typo": (changed(data__seq_lenght=64), "data.seq_lenght: unknown key; did you mean 'seq_length'?"),
    "section typo": (changed(curriculum_learing={}), "unknown section; did you mean 'curriculum_learning'?"),
    "scheduler typo": (changed(scheduler__type="TokenCosineLr"), "scheduler.type: 'TokenCosineLr' is not valid"),
    "curriculum above data": (changed(data__seq_length=32), "max_difficulty: 64 is above data.seq_length 32"),
    "data above model": (changed(data__seq_length=4096), "data.seq_length: 4096 is above the model's 1024 positions"),
    "curriculum above model": (
        changed(data=None, curriculum_learning__max_difficulty=4096),
        "max_difficulty: 4096 is above the model's 1024 positions",
    ),
    "enabled missing": (changed(curriculum_learning__enabled=None), "curriculum_learning.enabled: required"),
    "lr missing": (changed(optimizer={"type": "Adam"}), "optimizer.params.lr: required"),
    "lr zero": (changed(optimizer__params__lr=0), "optimizer.params.lr: 0 is not valid"),
    "warmup over budget": (changed(scheduler__params__warmup_steps=10_000), "scheduler.params.decay_tokens"),
    "two warmups": (changed(scheduler__params__warmup_tokens=5), "warmup_steps and warmup_tokens are given"),
    "budget below a step": (changed(training__train_tokens=7), "less than one token for each of the 8 rows"),
    "unknown preset": (changed(model__preset="gpt2-117"), "did you mean 'gpt2-117m'?"),
    "no batch size": (changed(train_batch_size="auto"), "train_batch_size: 'auto' is not valid"),
    "keep none": (changed(training__keep_last=0), "training.keep_last: 0 is not valid"),
    "spike ratio of one": (changed(training__spike_ratio=1), "training.spike_ratio: 1 is not valid"),
    "on spike": (changed(training__on_spike="roll"), "training.on_spike: 'roll' is not valid"),
    "unknown leftovers": (changed(data__leftovers="keep"), "data.leftovers: 'keep' is not valid"),
    "no corpus": (changed(data__train=[]), "data.train: [] is not valid: give a list of corpus prefixes"),
    "no list of corpora": (changed(data__train="a"), "data.train: 'a' is not valid"),
    "no prefix": (changed(data__train=["a", 3]), "data.train: ['a', 3] is not valid"),
    "some weights": (changed(data__train=[[1, "a"], "b"]), "data.train: 'b' is not a [weight, prefix]"),
    "weight of 0": (changed(data__train=[[0, "a"], [1, "b"]]), "data.train: [0, 'a'] is not a [weight, prefix]"),
    "weight as text": (changed(data__train=[["1", "a"]]), "data.train: ['1', 'a'] is not a [weight, prefix]"),
    "blended twice": (changed(data__train=[[1, "a"], [2, "a"]]), "train names 'a' twice"),
    "valid twice": (changed(data__valid=["a", "a"]), "valid names 'a' twice"),
    "valid of nothing": (changed(data__valid=[]), "data.valid: [] is not valid"),
    "valid and split": (changed(data__valid=["a"], data__split="9,1"), "isn't used where valid names corpora"),
    "windows compiled": (
        changed(curriculum_learning__method="window", training__compile=True),
        'training.compile: true compiles one graph per length with curriculum_learning.method "window"',
    ),
    "optimizer list": (changed(optimizer=[]), "optimizer: [] is not an object"),
    "params string": (changed(optimizer__params="x"), "optimizer.params: 'x' is not an object"),
    "optimizer type": (changed(optimizer__type=None), "optimizer.type: required"),
    "zero null": (changed(zero_optimization=7), "zero_optimization: 7 is not an object"),
    "zero stage": (changed(zero_optimization__stage=9), "zero_optimization.stage: 9 is not valid"),
    "fp16 list": (changed(fp16=[]), "fp16: [] is not an object"),
    "clipping": (changed(gradient_clipping=-1), "gradient_clipping: -1 is not valid"),
    "lr infinite": (changed(optimizer__params__lr=1e300), "optimizer.params.lr: 1e+300 is not valid"),
    "scheduler case": (changed(scheduler__type="tokencosinelr"), "scheduler.type: 'tokencosinelr' is not valid"),
    "schedule type list": (changed(curriculum_learning__schedule_type=[]), "schedule_type: [] is not a schedule type"),
    "budget huge": (changed(training__train_tokens=1e19), "training.train_tokens: 1e+19 is not valid"),
    "ramp huge": (
        changed(curriculum_learning__schedule_config__total_curriculum_step=1e30),
        "total_curriculum_step: 1e+30 is not valid",
    ),
    "sum too large": (
        changed(
            data=None,
            model=None,
            training__train_tokens=1e15,
            curriculum_learning__min_difficulty=1,
            curriculum_learning__max_difficulty=2**24,
            curriculum_learning__schedule_config__difficulty_step=2**10,
            curriculum_learning__schedule_config__total_curriculum_step=1e12,
        ),
        "can't be counted in 64 bits",
    ),
    "seed huge": (changed(training__seed=10**30), "training.seed: "),
    "bad split": (changed(data__split="abc"), "data.split: 'abc' is not valid"),
    "corpus twice": (changed(data__train=["x", "x"]), "train names 'x' twice"),
    "zero rows": (
        changed(
            train_batch_size=0, curriculum_learning__schedule_config={"curriculum_fraction": 0.3, "difficulty_step": 8}
        ),
        "train_batch_size: 0 is not valid",
    ),
    "zero typo": (changed(zero_optimizaton={"stage": 3}), "did you mean 'zero_optimization'?"),
    "scheduler without type": (changed(scheduler={"params": {}}), "scheduler.type: required"),
    "scheduler type number": (changed(scheduler__type=5), "scheduler.type: 5 is not valid"),
    "model list": (changed(model=[]), "model: [] is not an object"),
    "warmup typo": (changed(batch_size_warmp=WARMUP), "unknown section; did you mean 'batch_size_warmup'?"),
    "warmup key": (changed(batch_size_warmup={**WARMUP, "samples": 3}), "batch_size_warmup.samples: unknown key"),
    "warmup incomplete": (changed(batch_size_warmup={"start": 2}), "batch_size_warmup.increment: required"),
    "warmup of nothing": (
        changed(batch_size_warmup={**WARMUP, "tokens": 0}),
        "batch_size_warmup.tokens: 0 is not valid",
    ),
    "warmup start": (changed(batch_size_warmup={**WARMUP, "start": 8}), "start: 8 is not below train_batch_size 8"),
    "warmup increment": (
        changed(batch_size_warmup={**WARMUP, "increment": 4}, training=None, data=None),
        "increment: 4 doesn't divide the 6 rows from start 2 to train_batch_size 8",
    ),
    "bucket above": (changed(training__seqlen_bucket=65), "training.seqlen_bucket: 65 is above the longest length 64"),
    "bucket zero": (changed(training__seqlen_bucket=0), "training.seqlen_bucket: 0 is not valid"),
    "clip twice": (changed(optimizer__params__max_grad_norm=2.0, gradient_clipping=1.0), "max_grad_norm: 2.0 differs"),
}


def test_the_guard_is_no_part_of_the_run():
    settings = {"on_spike": "rollback", "keep_last": 1, "spike_ratio": 3, "spike_skip_steps": 5000}
    guarded = changed(training={**GOOD["training"], **settings})
    assert RunConfig.from_dict(guarded).settings() == RunConfig.from_dict(GOOD).settings()


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
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
    with pytest.raises(ConfigError, match=r"run\.json: can't be read"):
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
    weights = json.dumps([[0.7, "wiki"], [0.3, "books"]])
    config = RunConfig.load(path, ["training.seed=7", f"data.train={weights}"])
    written = json.loads(json.dumps(config.as_file(), allow_nan=False))
    assert RunConfig.from_dict(written) == config
    assert (written["training"]["seed"], written["data"]["leftovers"]) == (7, config.data.leftovers)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_plans(path):
    config = RunConfig.load(path, require=("model", "data", "training"))
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
