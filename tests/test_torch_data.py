"""The data of a run through torch's DataLoader: the very rows of train_gpt2.py, whatever workers, ranks and resumes do."""

import shutil

import numpy as np
import pytest
import torch
from helpers.settings import changed
from torch.utils.data import DataLoader

from seqlen_curriculum.data.from_config import open_training_data
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunLoader, RunRows, RunSampler, lengthen


@pytest.fixture
def plan(tiny_run):
    return TrainerPlan.of(changed(tiny_run, data__leftovers="recycle"), global_batch=8, max_lr=5e-3)


def expected(plan, step):
    """The inputs and targets of a step, as train_gpt2.py reads them."""
    return [torch.from_numpy(part.astype(np.int64)) for part in open_training_data(plan.config).read(step)]


def assert_reads_the_run(plan, batches, first_step=1):
    """``batches``: the micro-batches of all steps from ``first_step`` on, all rows of a step together."""
    rows = list(batches)
    for step in range(first_step, plan.steps + 1):
        inputs, targets = expected(plan, step)
        part, count = [], 0
        while count < len(inputs):
            part.append(rows.pop(0))
            count += len(part[-1]["input_ids"])
        assert torch.equal(torch.cat([batch["input_ids"] for batch in part]), inputs), step
        assert torch.equal(torch.cat([batch["labels"] for batch in part]), targets), step
    assert rows == []


@pytest.mark.parametrize("method", ["truncate", "segment"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_reads_the_steps_of_the_run(tiny_run, method, workers):
    run = changed(tiny_run, data__leftovers="recycle", curriculum_learning__method=method)
    plan = TrainerPlan.of(run, global_batch=8, max_lr=5e-3)
    assert_reads_the_run(plan, RunLoader(RunRows(plan), 4, num_workers=workers))


@pytest.mark.parametrize("options", [{"persistent_workers": True}, {"multiprocessing_context": "spawn"}])
def test_persistent_and_spawned_workers_read_the_same(plan, options):
    assert_reads_the_run(plan, RunLoader(RunRows(plan), 8, num_workers=1, prefetch_factor=4, **options))


def test_two_sources_in_proportion(tiny_run, corpus, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"other{suffix}")
    run = changed(
        tiny_run, data__train=[[0.75, str(corpus)], [0.25, str(tmp_path / "other")]], data__leftovers="recycle"
    )
    plan = TrainerPlan.of(run, global_batch=8, max_lr=5e-3)
    assert_reads_the_run(plan, RunLoader(RunRows(plan), 8))


def test_any_order_of_items_has_the_length_of_their_own_steps(plan):
    rows = RunRows(plan)
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    for index, item in zip(shuffled, rows.__getitems__(shuffled), strict=True):
        inputs, targets = expected(plan, index // 8 + 1)
        assert torch.equal(item["input_ids"], inputs[index % 8])
        assert torch.equal(item["shift_labels"], targets[index % 8])
    with pytest.raises(IndexError, match=str(len(rows))):
        rows[len(rows)]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 2), (2, 4), (4, 1)])
def test_ranks_together_read_the_step_once(plan, ranks, micro_batch):
    rows = RunRows(plan)
    samplers = [RunSampler(rows, micro_batch, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert [len(sampler) for sampler in samplers] == [len(rows) // ranks] * ranks
    items = [list(sampler) for sampler in samplers]
    for step in range(plan.steps):
        own = slice(step * 8 // ranks, (step + 1) * 8 // ranks)
        assert sorted(index for rank in items for index in rank[own]) == list(range(step * 8, step * 8 + 8))


def test_the_first_step_of_a_sampler_is_chosen(plan):
    rows = RunRows(plan)
    later = RunSampler(rows, 2, rank=1, ranks=2, first_step=4)
    assert list(later) == list(RunSampler(rows, 2, rank=1, ranks=2))[3 * 4 :]
    assert len(later) == len(list(later))


def test_a_loader_resumes_after_what_it_handed_out_not_what_it_prefetched(plan):
    loader = RunLoader(RunRows(plan), 4, num_workers=2, prefetch_factor=4)
    batches = iter(loader)
    for _ in range(2 * 5):  # two micro-batches a step
        next(batches)
    state = loader.state_dict()
    assert state == {"samples": 40}
    del batches
    resumed = RunLoader(RunRows(plan), 4)
    resumed.load_state_dict(state)
    assert len(resumed) == len(loader) == 2 * plan.steps
    assert_reads_the_run(plan, resumed, first_step=6)


def test_a_loader_resumes_on_another_number_of_ranks(plan):
    ranks = [RunLoader(RunRows(plan), 2, rank=rank, ranks=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict({"samples": 40})
    assert_reads_the_run(plan, (batch for pair in zip(*ranks, strict=True) for batch in pair), first_step=6)
    with pytest.raises(CheckpointError, match="after 42 samples"):
        ranks[0].load_state_dict({"samples": 42})


def test_a_micro_batch_that_does_not_divide_is_refused(plan):
    with pytest.raises(ConfigError, match="micro_batch: 3 rows on each of 2 ranks"):
        RunLoader(RunRows(plan), 3, ranks=2)


def test_a_plan_without_data_has_no_rows(tiny_run):
    plan = TrainerPlan.of(changed(tiny_run, data=None, model=None), global_batch=8, max_lr=5e-3)
    with pytest.raises(ConfigError, match="data: section required"):
        RunRows(plan)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_loader_is_cut_step_by_step(plan, workers):
    full = [
        {"input_ids": torch.arange(32) + row, "labels": torch.arange(32) + row} for row in range(8 * plan.steps + 8)
    ]
    loader = DataLoader(full, batch_size=4, num_workers=workers, prefetch_factor=4 if workers else None)
    batches = list(lengthen(loader, plan, 2))
    assert len(batches) == 2 * plan.steps  # the loader has one step more than the run
    for number, batch in enumerate(batches):
        seqlen = plan.seqlen(number // 2 + 1)
        assert batch["input_ids"].shape == batch["labels"].shape == (4, seqlen)
        assert batch["input_ids"][:, 0].tolist() == list(range(4 * number, 4 * number + 4))


def test_a_resumed_loader_is_cut_from_its_own_step(plan):
    batches = lengthen([{"input_ids": torch.zeros(8, 32, dtype=torch.int64)}] * 3, plan, 1, first_step=9)
    assert [batch["input_ids"].shape[1] for batch in batches] == [plan.seqlen(step) for step in (9, 10, 11)]


def test_a_users_loader_is_segmented_as_the_plan_counts(tiny_run):
    plan = TrainerPlan.of(changed(tiny_run, curriculum_learning__method="segment"), global_batch=8, max_lr=5e-3)
    batches = lengthen([{"input_ids": torch.arange(32).repeat(8, 1)}] * plan.steps, plan, 1)
    assert sum(batch["input_ids"].numel() for batch in batches) == plan.consumed_tokens(plan.steps)
