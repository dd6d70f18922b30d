"""Lightning's Trainer with a warmup: lengths, rows, tokens, rates, evaluation and resume, against the plan of the run.

Run with the real Trainer in this process; the launched part has two ranks.
"""

import csv
import importlib.util
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.settings import changed
from torch.utils.data import DataLoader, Dataset, IterableDataset

L = pytest.importorskip("lightning")

from helpers.hf import expected_rows  # noqa: E402
from helpers.lightning import TinyModule, by_step, checkpoints, fit, make_trainer  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from seqlen_curriculum import TokenCosineLR  # noqa: E402
from seqlen_curriculum.data.from_config import open_samples  # noqa: E402
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from seqlen_curriculum.integrations.lightning import RunDataModule, SequenceLengthWarmup  # noqa: E402
from seqlen_curriculum.integrations.plan import TrainerPlan  # noqa: E402
from seqlen_curriculum.integrations.torch_data import RunLoader, RunRows  # noqa: E402

pytestmark = [
    # Hints on workers and on srun
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),  # in Lightning
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks .*ModelCheckpoint"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes"),
]


@pytest.fixture(scope="module")
def run(tiny_run):
    return changed(tiny_run, data__leftovers="recycle", training__train_tokens=4000)


@pytest.fixture(scope="module")
def plan(run):
    return TrainerPlan.of(run, global_batch=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def whole(run, folder):
    """A run with evaluations and a log, which leaves step=10.ckpt."""
    return fit(
        run,
        folder,
        checkpoints(folder),
        logger=CSVLogger(folder, name="", version="log"),
        log_every_n_steps=5,
        val_check_interval=4 * 7,
        num_sanity_val_steps=1,
    )


def test_every_step_trains_the_rows_of_the_run_at_its_rate(whole, plan):
    module, warmup = whole
    assert module.trainer.global_step == warmup.step == plan.steps
    assert by_step(module.rows, plan.steps) == expected_rows(plan)
    assert module.rates == [plan.learning_rate(step) for step in range(1, plan.steps + 1) for _ in range(4)]
    assert sum(len(row) for batch in module.rows for row in batch) == plan.consumed_tokens(plan.steps)


def test_evaluation_is_at_full_length_on_the_rows_of_the_run(whole, run):
    samples = open_samples(SequenceLengthWarmup(run, global_batch=8).plan.config, "valid")
    rows = samples.read(np.arange(5) * samples.num_samples // 5, 32)[:, :-1].tolist()
    # A sanity check of one batch of 2 rows, then 5 rows each time.
    assert whole[0].evaluated == rows[:2] + rows * ((len(whole[0].evaluated) - 2) // 5)
    assert len(whole[0].evaluated) > 5


def test_lengths_and_tokens_are_logged(whole, folder, plan):
    logged = [row for row in csv.DictReader((folder / "log" / "metrics.csv").read_text().splitlines()) if row["seqlen"]]
    steps = range(5, plan.steps + 1, 5)
    assert [int(row["step"]) for row in logged] == [step - 1 for step in steps]
    assert [int(row["seqlen"]) for row in logged] == [plan.seqlen(step) for step in steps]
    assert [int(row["consumed_tokens"]) for row in logged] == [plan.consumed_tokens(step) for step in steps]


WORKERS = [
    {},
    {"num_workers": 4},
    {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "spawn"},
]


@pytest.mark.parametrize("options", WORKERS, ids=["none", "four", "spawned"])
def test_resume_mid_warmup_is_bit_identical(whole, run, folder, plan, options):
    module, _ = fit(run, folder, options=options, resume=folder / "step=10.ckpt", limit_val_batches=0)
    assert plan.seqlen(10) < plan.full_length
    assert by_step(module.rows, plan.steps, first=11) == expected_rows(plan, first=11)
    assert module.losses == whole[0].losses[40:]
    assert module.rates == whole[0].rates[40:]
    for name, weight in whole[0].state_dict().items():
        assert torch.equal(module.state_dict()[name], weight), name


def test_other_batches_resume_to_the_same_rows(whole, run, folder, plan):
    # 4 batches of 2 rows per step before, 2 batches of 4 rows after
    module, _ = fit(run, folder, resume=folder / "step=10.ckpt", accumulate_grad_batches=2)
    assert len(module.rows) == 2 * (plan.steps - 10)
    assert by_step(module.rows, plan.steps, first=11) == expected_rows(plan, first=11)
    assert module.losses[-1] == pytest.approx(np.mean(whole[0].losses[-2:]), abs=1e-4)


@pytest.mark.usefixtures("whole")
def test_a_checkpoint_of_another_schedule_is_refused(run, folder, tmp_path):
    other = changed(run, curriculum_learning__schedule_config__total_curriculum_step=9)
    with pytest.raises(CheckpointError, match="total_curriculum_step"):
        fit(other, folder, resume=folder / "step=10.ckpt")
    checkpoint = torch.load(folder / "step=10.ckpt")
    checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] += 1
    torch.save(checkpoint, tmp_path / "within.ckpt")
    with pytest.raises(CheckpointError, match="after 1 of the 4 batches of a step"):
        fit(run, folder, resume=tmp_path / "within.ckpt")
    del checkpoint["callbacks"]["SequenceLengthWarmup"]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    with pytest.raises(CheckpointError, match="without a sequence length warmup"):
        fit(run, folder, resume=tmp_path / "without.ckpt")


def test_segments_are_rows_of_the_run_too(run, tmp_path):
    run = changed(run, curriculum_learning__method="segment")
    module, warmup = fit(run, tmp_path)
    assert by_step(module.rows, warmup.plan.steps) == expected_rows(warmup.plan)
    assert {len(row) for row in module.evaluated} == {32}


class FullRows(Dataset):
    """A user's own data: rows of 32 tokens and their shifted labels."""

    def __init__(self, rows, form=dict, tokens=32):
        self.rows, self.form, self.tokens = rows, form, tokens

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        inputs = torch.arange(index, index + self.tokens) % 257
        if self.form is torch.Tensor:
            return inputs
        pair = inputs, (inputs + 1) % 257
        return dict(zip(("input_ids", "labels"), pair, strict=True)) if self.form is dict else pair


def own_rows(rows=80, workers=0, form=dict, tokens=32, **options):
    return DataLoader(FullRows(rows, form, tokens), batch_size=2, num_workers=workers, **options)


@pytest.fixture(scope="module")
def own(run):
    """The run of a user's own data."""
    return changed(run, data=None, model=None)


@pytest.mark.parametrize(("form", "workers"), [(dict, 4), (tuple, 0), (torch.Tensor, 0)])
def test_a_users_own_rows_are_cut_where_they_are_used(own, plan, tmp_path, form, workers):
    # Epochs of 10 steps, each with two evaluations
    data, valid = own_rows(form=form, workers=workers), own_rows(4, form=form)
    module, _ = fit(own, tmp_path, data=data, valid=valid, val_check_interval=18)
    lengths = [len(row) for batch in module.rows for row in batch]
    assert lengths == [plan.seqlen(step) for step in range(1, plan.steps + 1) for _ in range(8)]
    assert module.rates[::4] == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]
    assert {len(row) for row in module.evaluated} == {32}
    assert "on_before_batch_transfer" not in vars(module)


def test_a_stream_without_a_length_trains(own, plan, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from FullRows(80)

    module, _ = fit(own, tmp_path, data=DataLoader(Stream(), batch_size=8), accumulate_grad_batches=1)
    assert [len(batch[0]) for batch in module.rows] == [plan.seqlen(step) for step in range(1, plan.steps + 1)]


def test_a_segmented_row_trains_all_its_segments(own, tmp_path):
    module, warmup = fit(changed(own, curriculum_learning__method="segment"), tmp_path, data=own_rows())
    assert [len(batch) for batch in module.rows[:4]] == [2 * 32 // 8] * 4
    trained = sum(len(row) for batch in module.rows for row in batch)
    assert trained == warmup.plan.consumed_tokens(warmup.plan.steps)


@pytest.mark.filterwarnings("ignore:You have overridden .on_before_batch_transfer.")  # with and without a warmup
@pytest.mark.parametrize("owner", [L.LightningModule, L.LightningDataModule])
def test_the_users_own_hook_still_runs(own, plan, tmp_path, owner):
    class Hook:
        def on_before_batch_transfer(self, batch, dataloader_idx):  # noqa: ARG002
            return {**batch, "labels": batch["labels"] * 0}

    class Module(*([Hook] if owner is L.LightningModule else []), TinyModule):
        def training_step(self, batch, batch_idx):
            assert not batch["labels"].any()
            return super().training_step(batch, batch_idx)

    class Data(*([Hook] if owner is L.LightningDataModule else []), L.LightningDataModule):
        def train_dataloader(self):
            return own_rows()

    module = Module()
    trainer = make_trainer(tmp_path, SequenceLengthWarmup(own, global_batch=8))
    trainer.fit(module, datamodule=Data())
    assert [len(batch[0]) for batch in module.rows[::4]] == [plan.seqlen(step) for step in range(1, plan.steps + 1)]


def test_shift_labels_are_made_for_a_model_that_shifts(own, plan, tmp_path):
    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            assert torch.equal(batch["shift_labels"][:, :-1], batch["labels"][:, 1:])
            assert batch["shift_labels"].shape == batch["labels"].shape
            assert (batch["shift_labels"] == -100).any() == (batch["labels"].shape[1] == 32)
            return super().training_step(batch, batch_idx)

    warmup = SequenceLengthWarmup(own, global_batch=8, emit_shift_labels=True)
    module, _ = fit(own, tmp_path, data=own_rows(), module=Module(), warmup=warmup)
    assert len(module.rows) == 4 * plan.steps


class Manual(TinyModule):
    """Steps two optimizers by itself, once in ``every`` batches."""

    def __init__(self, every):
        super().__init__(lambda module: [torch.optim.SGD(part.parameters(), lr=5e-3) for part in module.children()])
        self.automatic_optimization, self.every = False, every

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if (batch_idx + 1) % self.every == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


def test_several_optimizers_step_together(run, plan, tmp_path):
    warmup = SequenceLengthWarmup(run, global_batch=8, accumulate_grad_batches=4)
    module, _ = fit(run, tmp_path, module=Manual(4), warmup=warmup, accumulate_grad_batches=1)
    assert module.trainer.global_step == 2 * plan.steps  # Lightning counts each optimizer
    assert by_step(module.rows, plan.steps) == expected_rows(plan)
    for optimizer in module.trainer.optimizers:
        assert optimizer.param_groups[0]["lr"] == plan.learning_rate(plan.steps)
    assert module.rates[::4] == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]


def test_optimizers_that_step_at_other_times_are_an_error(own, tmp_path):
    warmup = SequenceLengthWarmup(own, global_batch=8, accumulate_grad_batches=4)
    with pytest.raises(DataError, match="2 steps of 2 optimizers after batch 1"):
        fit(own, tmp_path, data=own_rows(), module=Manual(2), warmup=warmup, accumulate_grad_batches=1)


def scheduled(make, interval="step"):
    """Return ``configure_optimizers`` with a scheduler."""

    def configure(module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": interval}}

    return configure


def test_a_scheduler_of_the_module_is_set_to_the_step(own, plan, tmp_path):
    # Lightning steps it once per epoch of 10 steps
    module = TinyModule(scheduled(lambda optimizer: TokenCosineLR(optimizer, plan.learning_rate), "epoch"))
    fit(own, tmp_path, data=own_rows(), module=module)
    assert module.rates[::4] == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]


def halved(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def test_without_token_rates_the_module_keeps_its_own(own, tmp_path):
    module, _ = fit(changed(own, scheduler=None), tmp_path, data=own_rows(), module=TinyModule(scheduled(halved)))
    assert all(later == earlier / 2 for earlier, later in pairwise(module.rates[::4]))


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


class Reader(TinyModule):
    def training_step(self, dataloader_iter):  # noqa: ARG002
        raise AssertionError


@pytest.mark.parametrize(
    ("trainer", "options", "named"),
    [
        ({"accumulate_grad_batches": 2}, {}, r"global_batch: 8, but the trainer has 4 rows .*2 x 2 acc.* x 1 ranks"),
        ({"max_steps": 1000}, {}, "max_steps: 1000, but the token budget ends with step"),
        ({"max_epochs": 1}, {}, "max_epochs: 1 epochs of 40 batches"),
        ({"overfit_batches": 4}, {}, "overfit_batches: 4"),
        ({}, {"data": own_rows(86)}, "limit_train_batches=40"),
        ({}, {"data": DataLoader(Endless(), batch_size=2)}, "train_dataloader: its length is unknown"),
        ({}, {"data": [own_rows(), own_rows()]}, "train_dataloader: 2 loaders"),
        ({"accumulate_grad_batches": 1}, {"module": Manual(4)}, "accumulate_grad_batches: unknown under manual"),
        ({}, {"module": Reader()}, "training_step: reads batches by itself"),
        ({}, {"module": TinyModule(scheduled(halved))}, "configure_optimizers: returns a ExponentialLR"),
        (
            {},
            {"module": TinyModule(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))},
            "optimizer.params.lr: 0.005 in the plan, but the optimizer of configure_optimizers has 0.1",
        ),
    ],
)
def test_contradictions_are_errors_before_the_first_step(own, tmp_path, trainer, options, named):
    module = options.get("module", TinyModule())
    with pytest.raises(ConfigError, match=named):
        fit(own, tmp_path, **{"data": own_rows(), "module": module, **options}, **trainer)
    assert module.rows == []
    assert "on_before_batch_transfer" not in vars(module)


def test_a_number_of_batches_given_twice_must_be_the_same(own, tmp_path):
    warmup = SequenceLengthWarmup(own, global_batch=8, accumulate_grad_batches=2)
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches: 2 given .* the trainer has 4"):
        fit(own, tmp_path, data=own_rows(), warmup=warmup)


def test_a_file_of_another_batch_is_refused_at_construction(own):
    with pytest.raises(ConfigError, match="train_batch_size: 8 in the file, but the trainer has 4"):
        SequenceLengthWarmup(own, global_batch=4)


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        (own_rows(tokens=24), "2 rows of 28 tokens are due in a batch, but it has 2 x 24"),
        (own_rows(rows=79), "step 10: 2 rows of .* but it has 1 x"),
    ],
)
def test_batches_that_the_plan_does_not_count_are_an_error(own, tmp_path, loader, found):
    with pytest.raises(DataError, match=found):
        fit(own, tmp_path, data=loader)


def test_rows_of_the_run_in_another_order_or_of_another_plan_are_refused(run, plan, tmp_path):
    loader = DataLoader(RunRows(plan), batch_size=2, shuffle=True)
    with pytest.raises(ConfigError, match="a DataLoader reads RunRows in an order of its own"):
        fit(run, tmp_path, data=loader)
    other = TrainerPlan.of(changed(run, curriculum_learning__min_difficulty=12), global_batch=8)
    with pytest.raises(ConfigError, match="RunRows were made for another plan"):
        fit(run, tmp_path, data=RunLoader(RunRows(other), 2))
    with pytest.raises(ConfigError, match="limit_train_batches: leaves 12 of the run's"):
        fit(run, tmp_path, limit_train_batches=12)
    with pytest.raises(ConfigError, match="accumulate_grad_batches: 3 batches on each of 1 ranks"):
        fit(run, tmp_path, accumulate_grad_batches=3)


def test_fewer_steps_than_the_plan_are_a_beginning_of_it(run, plan, tmp_path):
    module, _ = fit(run, tmp_path, max_steps=3)
    assert by_step(module.rows, 3) == expected_rows(plan)[:3]


def test_a_data_module_needs_a_data_section(own):
    with pytest.raises(ConfigError, match="data: section required"):
        RunDataModule(TrainerPlan.of(own, global_batch=8))


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
def test_a_script_may_import_pytorch_lightning(own, tmp_path, monkeypatch):
    pl = pytest.importorskip("pytorch_lightning")
    spec = importlib.util.find_spec("seqlen_curriculum.integrations.lightning")
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    spec.loader.exec_module(loaded)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.lengths = torch.nn.Linear(1, 1), []

        def training_step(self, batch):
            self.lengths.append(batch.shape[1])
            return self.layer(batch[..., None].float()).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=5e-3)

    module, warmup = Module(), loaded.SequenceLengthWarmup(own, global_batch=8)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(callbacks=[warmup], default_root_dir=tmp_path, accelerator="cpu", max_epochs=-1, **quiet)
    trainer.fit(module, DataLoader(FullRows(80, torch.Tensor), batch_size=8))
    assert module.lengths == [warmup.plan.seqlen(step) for step in range(1, warmup.plan.steps + 1)]


def test_the_last_rate_is_the_lowest(whole):
    assert math.isclose(whole[0].rates[-1], 1e-4)
