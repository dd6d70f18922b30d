"""Which leading steps two runs share, by hand and from their stored settings."""

import sys

import pytest

from seqlen_curriculum import RunConfig
from seqlen_curriculum.config.equivalence import count_identical_steps, trains_identically


def run(total=40, lowest=8, **changes):
    """Lengths 8 to 48 in steps of 8, 4 rows, a warmup of 10 steps; ``a.b`` in changes is written ``a__b``."""
    raw = {
        "train_batch_size": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
        "curriculum_learning": {
            "enabled": True,
            "curriculum_type": "seqlen",
            "min_difficulty": lowest,
            "max_difficulty": 48,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": total, "difficulty_step": 8},
        },
        "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 10}},
        "data": {"train": ["x"], "seq_length": 48},
        "training": {"train_tokens": 20_000},
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = raw
        for parent in parents:
            section = section[parent]
        section[key] = value
    return RunConfig.from_dict(raw)


def wsd(train_tokens=20_000, decay_tokens=4_000, **params):
    """The run with a WSD rate: by default it decays from 16,000 consumed tokens to the end."""
    params = {"warmup_steps": 10, "decay_tokens": decay_tokens, **params}
    return run(scheduler={"type": "TokenWSDLR", "params": params}, training__train_tokens=train_tokens)


# Raw lengths are 8 + 40 t / T: 16 is reached at t = T / 5, step 8 of T = 40 and 16 of T = 80.
@pytest.mark.parametrize(
    ("one", "other", "steps"),
    [
        (run(), run(), 12),  # as many as were asked for
        (run(40), run(80), 7),
        (run(80), run(40), 7),
        (run(200), run(80), 12),
        (run(), run(lowest=16), 0),
        (run(), run(scheduler__params__warmup_steps=11), 0),
        (run(), run(training__train_tokens=30_000), 10),  # the same warmup, another decay
        (run(), run(curriculum_learning__method="window"), 0),
        (run(), run(scheduler__type="WarmupLR"), 0),  # whose rates nobody here knows
    ],
)
def test_steps_alike_by_hand(one, other, steps):
    assert count_identical_steps(one, other, 12) == steps


# 4,000 tokens are consumed by the end of the ramp at step 40, then 192 per step: 15,904 by step 102, 16,096 by step 103.
@pytest.mark.parametrize(
    ("other", "steps"),
    [
        (wsd(), 200),
        (wsd(decay_tokens=8_000), 81),
        (wsd(train_tokens=60_000), 102),
        (wsd(train_tokens=60_000, decay_tokens=50_000), 71),
        (wsd(decay_type="linear"), 102),
        (wsd(min_lr=1e-5), 102),
        (wsd(warmup_steps=11), 0),
        (run(scheduler={"type": "TokenLinearLR", "params": {"warmup_steps": 10}}), 10),
    ],
)
def test_a_wsd_is_the_same_run_until_the_first_of_two_decays(other, steps):
    planned = wsd()
    steps = min(steps, planned.plan.steps)
    assert count_identical_steps(planned, other, planned.plan.steps) == steps
    assert trains_identically(planned.settings(), other.settings(), steps)
    if steps < planned.plan.steps:
        assert not trains_identically(planned.settings(), other.settings(), steps + 1)


def test_stored_settings_are_enough():
    ours, other = run(40).settings(), run(80).settings()
    assert trains_identically(other, ours, 7)
    assert not trains_identically(other, ours, 8)
    assert not trains_identically({**other, "curriculum_learning.schedule_type": "of another version"}, ours, 7)


WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}


@pytest.mark.parametrize(
    ("saved", "ours"),
    [
        (run(training__seed=1), run(training__seed=2)),
        (run(optimizer__params__lr=1e-3), run(optimizer__params__lr=2e-3)),
        (run(scheduler=WARMUP), run(scheduler={**WARMUP, "params": {"warmup_num_steps": 1000}})),
        (run(scheduler=WARMUP), run()),
        (
            run(curriculum_learning__method="window"),
            run(curriculum_learning__method="window", curriculum_learning__restart_positions=True),
        ),
        # What its evaluations have decided follows from no setting.
        (run(curriculum_learning__schedule_type="adaptive"), run()),
        (
            run(curriculum_learning__schedule_type="adaptive"),
            run(curriculum_learning__schedule_type="adaptive", training__train_tokens=30_000),
        ),
    ],
)
def test_differences_outside_the_schedules_make_another_run(saved, ours):
    assert not trains_identically(saved.settings(), ours.settings(), 2)


@pytest.mark.parametrize("ours_is_custom", [False, True])
def test_a_checkpoint_imports_no_function_that_the_file_does_not_name(tmp_path, monkeypatch, ours_is_custom):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text("def lengths(step): return 16\n")
    (tmp_path / "foreign.py").write_text("open('canary', 'w')\ndef lengths(step): return 16\n")
    monkeypatch.chdir(tmp_path)
    custom = {"curriculum_learning__schedule_type": "custom", "curriculum_learning__schedule_config": {}}
    config = run(**custom, curriculum_learning__schedule_config__function="own:lengths")
    ours = (config if ours_is_custom else run()).settings()
    saved = {**config.settings(), "curriculum_learning.schedule_config.function": "foreign:lengths"}
    assert not trains_identically(saved, ours, 7)
    assert not (tmp_path / "canary").exists()
    longer = run(**custom, curriculum_learning__schedule_config__function="own:lengths", training__train_tokens=30_000)
    assert trains_identically(longer.settings(), config.settings(), 7)


def test_a_checkpoint_after_the_end_of_its_run_is_none_of_it():
    ours, other = run(40).settings(), run(80).settings()
    assert not trains_identically(other, ours, 10**15)  # whose lengths would take 8 PB


def test_a_function_that_a_checkpoint_nests_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    ours = run().settings()
    custom = {"schedule_type": "custom", "schedule_config": {"function": "evil:run"}}
    nested = {key: value for key, value in ours.items() if not key.startswith("curriculum_learning")}
    assert not trains_identically({**nested, "curriculum_learning": custom}, ours, 1)
    assert not trains_identically({**nested, "curriculum_learning.schedule_config": custom["schedule_config"]}, ours, 1)
    assert not trains_identically({**ours, "curriculum_learning": 3}, ours, 1)
    assert "evil" not in sys.modules
