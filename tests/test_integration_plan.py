"""The plan of a run for another trainer: the same numbers as train_gpt2.py's, and what can't be served is refused."""

import json

import pytest
from helpers.settings import changed

from seqlen_curriculum import RunConfig
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.integrations.plan import TrainerPlan


def test_the_plan_is_that_of_the_file(tiny_run, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_run))
    ours, plan = RunConfig.load(path).plan, TrainerPlan.of(path, global_batch=8, max_lr=5e-3)
    assert plan.steps == ours.steps
    for step in (1, 7, 20, ours.steps):
        assert plan.seqlen(step) == ours.timeline.seqlen(step)
        assert plan.consumed_tokens(step) == ours.timeline.consumed_tokens(step)
        assert plan.learning_rate(step) == ours.learning_rate()(step)


def test_deepspeed_keys_are_left_to_the_trainer(tiny_run):
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "bf16": {"enabled": "auto"},
    }
    plan = TrainerPlan.of({**tiny_run, **auto}, global_batch=16, max_lr=1e-3)
    assert plan.global_batch == 16
    assert plan.consumed_tokens(1) == 16 * plan.seqlen(1)
    assert max(plan.learning_rate(step) for step in range(1, plan.steps + 1)) == pytest.approx(1e-3)


def test_the_rate_of_the_file_is_the_default(tiny_run):
    plan = TrainerPlan.of(tiny_run, global_batch=8)
    assert plan.learning_rate(5) == 5e-3
    for without in ({**tiny_run, "optimizer": {"params": {"lr": "auto"}}}, changed(tiny_run, optimizer=None)):
        with pytest.raises(ConfigError, match=r"optimizer\.params\.lr: required"):
            TrainerPlan.of(without, global_batch=8)


def test_a_rate_of_the_trainers_own_is_left_alone(tiny_run):
    scheduled = {**tiny_run, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}
    assert TrainerPlan.of(scheduled, global_batch=8).learning_rate is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train_batch_size": 16}, "train_batch_size: 16 in the file, but the trainer has 8"),
        ({"optimizer__params__lr": 1.0}, "optimizer.params.lr: 1.0 in the file, but the trainer has 0.005"),
        ({"batch_size_warmup": {"start": 2, "increment": 2, "tokens": 500}}, "batch_size_warmup"),
        ({"curriculum_learning__batch_growth": True}, "curriculum_learning.batch_growth"),
        ({"curriculum_learning__schedule_type": "adaptive"}, "curriculum_learning.schedule_type"),
        ({"curriculum_learning__method": "window"}, 'curriculum_learning.method: "window" needs padding-free'),
        ({"training__objective": "masked"}, "training.objective: not available in another trainer (its batches bring"),
        ({"training": None}, "training: section required"),
    ],
)
def test_what_no_trainer_can_do_is_refused_by_name(tiny_run, changes, named):
    with pytest.raises(ConfigError) as error:
        TrainerPlan.of(changed(tiny_run, **changes), global_batch=8, max_lr=5e-3)
    assert named in str(error.value)


def test_a_checkpoint_of_another_schedule_is_refused(tiny_run):
    plan = TrainerPlan.of(tiny_run, global_batch=8, max_lr=5e-3)
    saved = json.loads(json.dumps(plan.state()))
    plan.check(saved, 10)
    longer = changed(tiny_run, curriculum_learning__schedule_config__total_curriculum_step=40)
    with pytest.raises(CheckpointError, match="total_curriculum_step"):
        TrainerPlan.of(longer, global_batch=8, max_lr=5e-3).check(saved, 10)
    with pytest.raises(CheckpointError, match="learning rate"):
        TrainerPlan.of(changed(tiny_run, optimizer=None), global_batch=8, max_lr=1e-3).check(saved, 10)


def test_another_ramp_continues_while_its_steps_are_the_same(tiny_run):
    # From 8 by multiples of 4: at T 20 length 12 begins at step 4, at T 21 too. Up to step 3 both are the same.
    constant_rate = changed(tiny_run, scheduler=None)
    saved = TrainerPlan.of(constant_rate, global_batch=8).state()
    other = changed(constant_rate, curriculum_learning__schedule_config__total_curriculum_step=21)
    TrainerPlan.of(other, global_batch=8).check(saved, 3)
    with pytest.raises(CheckpointError):
        TrainerPlan.of(other, global_batch=8).check(saved, 20)


def test_a_cool_down_begins_later_from_a_stable_checkpoint_of_a_trainer(tiny_run):
    def plan(train_tokens, decay_tokens, max_lr=5e-3):
        params = {"warmup_steps": 5, "decay_tokens": decay_tokens, "min_lr": 1e-4}
        run = changed(tiny_run, scheduler={"type": "TokenWSDLR", "params": params}, training__train_tokens=train_tokens)
        return TrainerPlan.of(changed(run, optimizer=None), global_batch=8, max_lr=max_lr)

    planned, longer = plan(9_500, 2_000), plan(30_000, 3_000)
    last_stable = planned.timeline.steps_to(7_500) - 1
    assert planned.consumed_tokens(last_stable) < 7_500 < planned.consumed_tokens(last_stable + 1)
    assert planned.learning_rate(last_stable) == 5e-3 > planned.learning_rate(last_stable + 1)
    assert planned.learning_rate(planned.steps) == 1e-4
    saved = json.loads(json.dumps(longer.state()))
    planned.check(saved, last_stable)
    with pytest.raises(CheckpointError, match=r"training\.train_tokens"):
        planned.check(saved, last_stable + 1)
    with pytest.raises(CheckpointError, match="learning rate"):
        plan(9_500, 2_000, max_lr=1e-3).check(saved, last_stable)
