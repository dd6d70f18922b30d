"""Hugging Face's Trainer with a warmup: lengths, rows, tokens, rates, evaluation and resume, against the plan of the run.

Run with the real Trainer in this process; the launched part has two ranks.
"""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.settings import changed

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from helpers.hf import arguments, expected_rows, losses, rates, tiny_llama  # noqa: E402
from torch.utils.data import Dataset, IterableDataset  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402

from seqlen_curriculum.data.from_config import open_training_data  # noqa: E402
from seqlen_curriculum.errors import CheckpointError, ConfigError  # noqa: E402
from seqlen_curriculum.integrations.plan import TrainerPlan  # noqa: E402
from seqlen_curriculum.integrations.torch_data import RunRows  # noqa: E402
from seqlen_curriculum.integrations.transformers import SequenceLengthWarmupTrainer, warm_up  # noqa: E402


@pytest.fixture
def run(tiny_run):
    return changed(tiny_run, data__leftovers="recycle", training__train_tokens=4000)


def train(run, folder, model=None, dataset=None, resume=None, balance=None, **changes):
    """Train with the Trainer; return it and its model."""
    model = model or tiny_llama()
    rows = RunRows(TrainerPlan.of(run, global_batch=8, max_lr=5e-3)) if dataset is None else dataset
    trainer = SequenceLengthWarmupTrainer(
        model=model, args=arguments(folder, **changes), train_dataset=rows, curriculum=run, balance=balance
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rows_by_step(trainer):
    """All rows that each optimizer step trained on, sorted."""
    steps, rows = [], []
    for trains, input_ids in trainer.model.seen:
        rows += input_ids.tolist() if trains else []
        if trains and len(rows) == trainer.plan.global_batch:
            steps.append(sorted(rows))
            rows = []
    assert rows == []
    return steps


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_step_trains_the_rows_of_the_run_at_its_rate(run, tmp_path, workers, balance):
    trainer = train(run, tmp_path, balance=balance, dataloader_num_workers=workers)
    plan = trainer.plan
    assert trainer.state.global_step == plan.steps == trainer.state.max_steps
    assert rows_by_step(trainer) == expected_rows(plan)
    assert rates(trainer) == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]


def test_segments_are_rows_of_the_run_too(run, tmp_path):
    run = changed(run, curriculum_learning__method="segment")
    plan = TrainerPlan.of(run, global_batch=8, max_lr=5e-3)
    trainer = SequenceLengthWarmupTrainer(
        model=tiny_llama(),
        args=arguments(tmp_path),
        train_dataset=RunRows(plan),
        data_collator=RunRows.collate,
        curriculum=run,
    )
    trainer.train()
    seen = [row for _, input_ids in trainer.model.seen for row in input_ids.tolist()]
    assert sorted(seen) == sorted(row for step in expected_rows(plan) for row in step)


def test_balanced_micro_batches_have_the_gradient_of_plain_ones(run, tmp_path):
    plain, balanced = (train(run, tmp_path / str(balance), balance=balance) for balance in (False, True))
    # 8 rows in micro-batches of 2 x 32 tokens: one of 8 x 8 at length 8, two of 4 at 12 and 16, four of 2 from 20 on.
    plan = plain.plan
    calls = [{8: 1, 12: 2, 16: 2}.get(plan.seqlen(step), 4) for step in range(1, plan.steps + 1)]
    assert sum(trains for trains, _ in balanced.model.seen) == sum(calls) < 4 * plan.steps
    assert sum(trains for trains, _ in plain.model.seen) == 4 * plan.steps
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(balanced.model.state_dict()[name], weight, atol=2e-5, rtol=1e-4)
    assert losses(plain) == pytest.approx(losses(balanced), abs=1e-4)


def test_the_loss_is_the_mean_over_all_target_tokens(run, tmp_path):
    trainer = train(run, tmp_path)
    inputs, targets = open_training_data(trainer.plan.config).read(1)
    model = tiny_llama()
    logits = model(input_ids=torch.from_numpy(inputs.astype(np.int64))).logits
    loss = torch.nn.functional.cross_entropy(
        logits.detach().flatten(0, 1), torch.from_numpy(targets.astype(np.int64)).flatten()
    )
    assert losses(trainer)[0] == pytest.approx(float(loss), abs=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_mid_warmup_is_bit_identical(run, tmp_path, workers):
    whole = train(run, tmp_path, save_strategy="steps", save_steps=10, dataloader_num_workers=workers)
    resumed = train(run, tmp_path, resume=str(tmp_path / "checkpoint-10"), dataloader_num_workers=workers)
    assert resumed.plan.seqlen(10) < resumed.plan.full_length
    assert rows_by_step(resumed) == expected_rows(resumed.plan, first=11)
    assert rates(resumed)[10:] == rates(whole)[10:]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_a_checkpoint_of_another_schedule_is_refused(run, tmp_path):
    train(run, tmp_path, save_strategy="steps", save_steps=10)
    other = changed(run, curriculum_learning__schedule_config__total_curriculum_step=9)
    with pytest.raises(CheckpointError, match="total_curriculum_step"):
        train(other, tmp_path, resume=str(tmp_path / "checkpoint-10"))
    state = tmp_path / "checkpoint-10" / "trainer_state.json"
    without = json.loads(state.read_text())
    del without["stateful_callbacks"]["SequenceLengthWarmupState"]
    state.write_text(json.dumps(without))
    with pytest.raises(CheckpointError, match="without a sequence length warmup"):
        train(run, tmp_path, resume=str(tmp_path / "checkpoint-10"))


class FullRows(Dataset):
    """A user's own data: rows of 32 tokens, of which the first says which row it is."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        tokens = torch.cat([torch.tensor([index % 257]), torch.randint(257, (31,), generator=torch.manual_seed(index))])
        return {"input_ids": tokens, "labels": tokens.clone(), "attention_mask": torch.ones(32, dtype=torch.int64)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_own_rows_are_cut_where_they_are_used(run, tmp_path, workers):
    run = changed(run, data=None, model=None)
    # 85 rows are 10 steps and 5 rows, which an epoch leaves out: each step has all of its rows.
    trainer = train(run, tmp_path, dataset=FullRows(85), dataloader_num_workers=workers, eval_strategy="no")
    lengths = [input_ids.shape[1] for trains, input_ids in trainer.model.seen for _ in range(len(input_ids)) if trains]
    plan = trainer.plan
    assert lengths == [plan.seqlen(step) for step in range(1, plan.steps + 1) for _ in range(8)]
    assert rates(trainer) == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]


def test_evaluation_is_at_full_length(run, tmp_path):
    run = changed(run, data=None, model=None)
    trainer = warm_up(
        Trainer(
            model=tiny_llama(),
            args=arguments(tmp_path, eval_strategy="steps", eval_steps=5),
            train_dataset=FullRows(80),
            eval_dataset=FullRows(8),
        ),
        run,
    )
    trainer.train()
    assert {input_ids.shape[1] for trains, input_ids in trainer.model.seen if not trains} == {32}
    assert type(trainer).__name__ == "Trainer"


def test_a_trainer_without_token_rates_keeps_its_own(run, tmp_path):
    run = changed(run, data=None, model=None, scheduler=None)
    trainer = train(run, tmp_path, dataset=FullRows(80), lr_scheduler_type="linear")
    decays = rates(trainer)
    assert all(later < earlier for earlier, later in pairwise(decays))


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


@pytest.mark.parametrize(
    ("changes", "dataset", "named"),
    [
        ({"gradient_accumulation_steps": 2}, FullRows(80), "train_batch_size: 8 in the file, but the trainer has 4"),
        ({"learning_rate": 1.0}, FullRows(80), "optimizer.params.lr: 0.005 in the file"),
        ({"train_sampling_strategy": "group_by_length"}, FullRows(80), "train_sampling_strategy"),
        ({"auto_find_batch_size": True}, FullRows(80), "auto_find_batch_size"),
        ({"accelerator_config": {"dispatch_batches": True}}, FullRows(80), "dispatch_batches"),
        ({"accelerator_config": {"split_batches": True}}, FullRows(80), "split_batches"),
        ({}, Endless(), "train_dataset: its length is unknown"),
        ({"ignore_data_skip": True}, None, "ignore_data_skip"),
    ],
)
def test_contradictions_are_errors_at_construction(run, tmp_path, changes, dataset, named):
    with pytest.raises(ConfigError, match=named):
        train(run, tmp_path, dataset=dataset, max_steps=3, **changes)


def test_rows_of_another_plan_are_refused(run, tmp_path):
    other = changed(run, curriculum_learning__min_difficulty=12)
    rows = RunRows(TrainerPlan.of(other, global_batch=8, max_lr=5e-3))
    with pytest.raises(ConfigError, match="RunRows was made for another plan"):
        train(run, tmp_path, dataset=rows)


def test_callbacks_may_be_restored_from_the_checkpoint(run, tmp_path):
    class Counter(TrainerCallback):
        pass

    train(run, tmp_path, save_strategy="steps", save_steps=10)
    resumed = train(run, tmp_path, resume=str(tmp_path / "checkpoint-10"), restore_callback_states_from_checkpoint=True)
    assert resumed.state.global_step == resumed.plan.steps
