"""Hugging Face's Trainer with a warmup: lengths, rows, tokens, rates, evaluation and resume, against the plan of the run.

Run with the real Trainer in this process; tests/test_trainer_ranks.py has two ranks.
"""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from helpers.own_rows import FullRows
from helpers.settings import changed

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from helpers.hf import arguments, expected_rows, losses, rates, tiny_llama  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset, RandomSampler  # noqa: E402
from transformers import (  # noqa: E402
    BloomConfig,
    BloomForCausalLM,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)

from seqlen_curriculum.data.from_config import open_training_data  # noqa: E402
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError  # noqa: E402
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


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning"
)  # more workers than this machine has cores
@pytest.mark.parametrize(
    ("balance", "workers"),
    [
        (True, {}),
        (False, {"dataloader_num_workers": 4, "dataloader_prefetch_factor": 4}),
        (
            True,
            {
                "dataloader_num_workers": 1,
                "dataloader_prefetch_factor": 4,
                "dataloader_persistent_workers": True,
                "dataloader_multiprocessing_context": "spawn",
            },
        ),
    ],
    ids=["no workers", "4 workers", "spawned, persistent"],
)
def test_every_step_trains_the_rows_of_the_run_at_its_rate(run, tmp_path, balance, workers):
    # drop_last has nothing to drop: the rows of a run are whole steps.
    trainer = train(run, tmp_path, balance=balance, dataloader_drop_last=True, **workers)
    plan = trainer.plan
    assert trainer.state.global_step == plan.steps == trainer.state.max_steps
    assert rows_by_step(trainer) == expected_rows(plan)
    assert rates(trainer) == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]


def test_segments_of_two_sources_are_the_rows_of_the_run(run, corpus, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"other{suffix}")
    sources = [[0.75, str(corpus)], [0.25, str(tmp_path / "other")]]
    run = changed(run, curriculum_learning__method="segment", data__train=sources)
    plan = TrainerPlan.of(run, global_batch=8, max_lr=5e-3)
    trainer = SequenceLengthWarmupTrainer(
        model=tiny_llama(),
        args=arguments(tmp_path),
        train_dataset=RunRows(plan),
        data_collator=RunRows.collate,
        curriculum=run,
    )
    trainer.train()
    seen = iter([row for _, input_ids in trainer.model.seen for row in input_ids.tolist()])
    steps = expected_rows(plan)
    assert {len(step) // 8 for step in steps} == {1, 2, 4}  # segments of a sample
    assert [sorted(itertools.islice(seen, len(step))) for step in steps] == steps
    assert list(seen) == []
    # A micro-batch has at most as many tokens as one of 2 rows at full length.
    assert max(input_ids.numel() for _, input_ids in trainer.model.seen) == 2 * 32


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


def test_resume_mid_warmup_is_bit_identical(run, tmp_path):
    whole = train(run, tmp_path, save_strategy="steps", save_steps=10)
    resumed = train(run, tmp_path, resume=str(tmp_path / "checkpoint-10"), dataloader_num_workers=2)
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


def test_a_users_own_rows_are_cut_where_they_are_used(run, tmp_path):
    wsd = {"type": "TokenWSDLR", "params": {"warmup_steps": 2, "decay_tokens": 1000}}
    run = changed(run, data=None, model=None, scheduler=wsd)
    # 85 rows are 10 steps and 5 rows, which an epoch leaves out: each step has all of its rows.
    trainer = train(run, tmp_path, dataset=FullRows(85), dataloader_num_workers=2, eval_strategy="no")
    lengths = [input_ids.shape[1] for trains, input_ids in trainer.model.seen for _ in range(len(input_ids)) if trains]
    plan = trainer.plan
    assert lengths == [plan.seqlen(step) for step in range(1, plan.steps + 1) for _ in range(8)]
    assert rates(trainer) == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]
    assert rates(trainer)[-1] == 0 < rates(trainer)[-2] < rates(trainer)[3] == 5e-3


def test_a_users_own_rows_become_segments(run, tmp_path):
    run = changed(run, data=None, model=None, curriculum_learning__method="segment", training__train_tokens=2500)
    trainer = train(run, tmp_path, dataset=FullRows(80), eval_strategy="no")
    plan, trained = trainer.plan, [input_ids for trains, input_ids in trainer.model.seen if trains]
    assert sum(input_ids.numel() for input_ids in trained) == plan.consumed_tokens(plan.steps)
    assert {input_ids.shape[1] for input_ids in trained} == {plan.seqlen(step) for step in range(1, plan.steps + 1)}


def test_a_users_own_rows_are_those_of_a_trainer_without_a_warmup(run, tmp_path):
    run = changed(run, data=None, model=None)
    saved = {"save_strategy": "steps", "save_steps": 15}
    whole = train(run, tmp_path, dataset=FullRows(80), **saved)  # 10 steps are an epoch
    plain = Trainer(
        model=tiny_llama(), args=arguments(tmp_path, max_steps=whole.plan.steps), train_dataset=FullRows(80)
    )
    plain.train()
    rows = [torch.cat([ids[:, :8] for trains, ids in trainer.model.seen if trains]) for trainer in (whole, plain)]
    assert len(rows[0]) == 8 * whole.plan.steps > 80
    assert torch.equal(*rows)
    resumed = train(run, tmp_path, dataset=FullRows(80), resume=str(tmp_path / "checkpoint-15"))  # in the second epoch
    assert rows_by_step(resumed) == rows_by_step(whole)[15:]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


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
    assert all(later < earlier for earlier, later in itertools.pairwise(decays))


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
        ({}, FullRows(7), "train_dataset: has 7 rows, but a step needs 8"),
        ({"ignore_data_skip": True}, None, "ignore_data_skip"),
        ({"dataloader_in_order": False}, None, "dataloader_in_order"),
    ],
)
def test_contradictions_are_errors_at_construction(run, tmp_path, changes, dataset, named):
    with pytest.raises(ConfigError, match=named):
        train(run, tmp_path, dataset=dataset, max_steps=3, **changes)


class OwnOrder(Trainer):
    """A trainer with a loader of its own."""

    def _get_train_sampler(self, train_dataset=None):
        return RandomSampler(train_dataset or self.train_dataset)

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=2, shuffle=True))


def test_a_trainer_that_orders_the_rows_itself_is_refused(run, tmp_path):
    rows = RunRows(TrainerPlan.of(run, global_batch=8, max_lr=5e-3))
    trainer = OwnOrder(model=tiny_llama(), args=arguments(tmp_path), train_dataset=rows)
    with pytest.raises(ConfigError, match=r"(?s)_get_train_sampler: OwnOrder.*get_train_dataloader: OwnOrder"):
        warm_up(trainer, run)
    # One that changes the order later is stopped at the first step that gets rows of another one.
    trainer = warm_up(Trainer(model=tiny_llama(), args=arguments(tmp_path), train_dataset=rows), run)
    trainer.get_train_dataloader = lambda: OwnOrder.get_train_dataloader(trainer)
    with pytest.raises((DataError, RuntimeError), match=r"step 1: read rows of|stack expects each tensor"):
        trainer.train()


def test_all_contradictions_are_listed_at_once(run, tmp_path):
    changes = {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2}
    dispatched = {"accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(ConfigError) as error:
        train(run, tmp_path, dataset=FullRows(80), **changes, **dispatched)
    named = ["train_sampling_strategy", "accelerator_config.dispatch_batches", "train_batch_size"]
    assert [problem.partition(":")[0] for problem in error.value.problems] == named


def padding_free(run, folder, collator=None, model=None, dataset=None, **changes):
    """A Trainer whose micro-batches are one row of documents side by side."""
    run = changed(run, data=None, model=None, curriculum_learning__method="window")
    trainer = Trainer(
        model=model or tiny_llama(),
        args=arguments(folder, **changes),
        train_dataset=dataset or FullRows(80),
        data_collator=collator or DataCollatorWithFlattening(),
    )
    return warm_up(trainer, run)


def test_padding_free_rows_are_cut_into_pieces_that_do_not_see_each_other(run, tmp_path):
    trainer = padding_free(run, tmp_path)
    assert not trainer.model.config.use_cache
    row = {"input_ids": torch.arange(40)[None], "position_ids": torch.arange(40)[None] % 20}
    row["labels"] = row["input_ids"]
    cut = trainer._cut(row, 1)  # two documents of 20 tokens in pieces of at most 8
    assert cut["position_ids"][0].tolist() == [*range(8), *range(8), *range(4)] * 2
    model, second = trainer.model.eval(), slice(20, 28)
    with torch.no_grad():
        alone = model(input_ids=cut["input_ids"][:, second]).logits[0]
        together = model(input_ids=cut["input_ids"], position_ids=cut["position_ids"]).logits[0, second]
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
        model.config.use_cache = True  # what is refused: the second document attends to the first
        together = model(input_ids=cut["input_ids"], position_ids=cut["position_ids"]).logits[0, second]
    assert float((together - alone).abs().max()) > 1e-3


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=257, hidden_size=16, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_cache": True}, "use_cache: True"),
        ({"collator": DataCollatorWithFlattening(return_position_ids=False)}, "return_position_ids is False"),
        ({"model": bloom()}, "model: BloomForCausalLM takes no position_ids"),
    ],
)
def test_padding_free_rows_without_a_mask_between_documents_are_refused(run, tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        padding_free(run, tmp_path, **changes)


def test_padding_free_rows_of_the_run_are_refused(run, tmp_path):
    rows = RunRows(TrainerPlan.of(run, global_batch=8, max_lr=5e-3))
    with pytest.raises(ConfigError, match="data_collator: joins the rows of RunRows"):
        padding_free(run, tmp_path, dataset=rows)


class Shapes(Trainer):
    """Keeps the shape of every micro-batch."""

    def compute_loss(self, model, inputs, *args, **options):
        self.shapes = [*getattr(self, "shapes", []), tuple(inputs["input_ids"].shape)]
        return super().compute_loss(model, inputs, *args, **options)


def test_a_compiled_model_has_one_graph_for_all_lengths_and_rows(run, tmp_path):
    run = changed(run, data=None, model=None)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    model = LlamaForCausalLM(tiny_llama().config)
    settings = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer = warm_up(Shapes(model=model, args=settings, train_dataset=FullRows(80)), run)
    trainer.train()
    assert {rows for rows, _ in trainer.shapes} == {8, 4, 2}  # balanced micro-batches
    assert {tokens for _, tokens in trainer.shapes} == set(range(8, 36, 4))
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


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
