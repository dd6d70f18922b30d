"""MosaicML Composer with a warmup: lengths, rows, tokens, rates, evaluation and resume, against the plan of the run.

Run with the real Trainer, in an environment of its own: bash scripts/test_trainers.sh composer. This module is also
the script that Composer's launcher starts on two ranks.
"""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import torchvision_operators  # noqa: F401 - Composer imports torchvision

pytest.importorskip("composer")

from composer import DataSpec
from composer.algorithms import SeqLengthWarmup
from composer.models import ComposerModel
from composer.utils import dist
from helpers.launching import ROOT, free_port, limit, running
from helpers.mosaicml import RATE, Fit, Llama, expected_rows, planned
from helpers.own_rows import FullRows
from helpers.settings import changed
from torch.utils.data import DataLoader

from seqlen_curriculum.data.from_config import open_training_data
from seqlen_curriculum.data.preparation.prepare import Request, prepare
from seqlen_curriculum.data.tokenizer import TokenizerChoice
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError
from seqlen_curriculum.integrations.composer import SequenceLengthWarmup
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunLoader, RunRows

pytestmark = pytest.mark.trainers
RANKS = 2
LAUNCHER = "from helpers import torchvision_operators; from composer.cli.launcher import main; main()"


@pytest.fixture(scope="module")
def run(tiny_run):
    return changed(tiny_run, data__leftovers="recycle", training__train_tokens=4000)


@pytest.fixture(scope="module")
def own_data(run):
    return changed(run, data=None, model=None)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """An uninterrupted run, and its folder with the checkpoint of step 10."""
    folder = tmp_path_factory.mktemp("whole")
    return Fit(run, save_folder=str(folder), save_interval="10ba", save_filename="ba{batch}.pt"), folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("balance", [True, False])
def test_every_step_trains_the_rows_of_the_run_at_its_rate(run, workers, balance):
    fit = Fit(run, workers=workers, balance=balance)
    plan = fit.plan
    assert fit.steps() == plan.steps
    assert fit.rows_by_step() == expected_rows(plan)
    assert fit.logged("sequence_length_warmup/seqlen") == planned(plan, plan.seqlen)
    assert fit.callback.rates == planned(plan, plan.learning_rate)
    assert fit.logged("sequence_length_warmup/learning_rate") == fit.callback.rates
    assert fit.logged("time/token")[: plan.steps] == [plan.consumed_tokens(step) for step in range(plan.steps)]
    assert fit.tokens() == plan.consumed_tokens(plan.steps)


def test_balanced_micro_batches_have_the_gradient_of_plain_ones(run):
    fits = [Fit(run, balance=balance, model=Llama(dropout=0.0)) for balance in (False, True)]
    plan = fits[0].plan
    # 8 rows in micro-batches of 2 x 32 tokens: one of 8 x 8 at length 8, two of 4 at 12 and 16, four of 2 from 20 on.
    calls = [{8: 1, 12: 2, 16: 2}.get(plan.seqlen(step), 4) for step in range(1, plan.steps + 1)]
    assert [len(fit.micro_batches()) for fit in fits] == [4 * plan.steps, sum(calls)]
    assert fits[0].logged("loss/train/total") == pytest.approx(fits[1].logged("loss/train/total"), abs=1e-4)
    for plain, balanced in zip(fits[0].model.parameters(), fits[1].model.parameters(), strict=True):
        torch.testing.assert_close(plain, balanced, atol=2e-5, rtol=1e-4)


def test_the_loss_is_the_mean_over_all_target_tokens(run):
    fit = Fit(run, model=Llama(dropout=0.0), max_duration="1ba")
    inputs, targets = (torch.from_numpy(part.astype(np.int64)) for part in open_training_data(fit.plan.config).read(1))
    logits = Llama(dropout=0.0).model(input_ids=inputs).logits.detach()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert fit.logged("loss/train/total") == pytest.approx([float(loss)], abs=1e-5)


def test_segments_are_rows_of_the_run_too(run):
    fit = Fit(changed(run, curriculum_learning__method="segment"))
    seen = torch.cat([row for batch in fit.micro_batches() for row in batch["input_ids"]])
    assert seen.tolist() == [token for step in expected_rows(fit.plan) for row in step for token in row]
    assert fit.tokens() == fit.plan.consumed_tokens(fit.plan.steps)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("method", ["truncate", "segment"])
def test_a_users_own_rows_are_cut_where_they_are_used(own_data, workers, method):
    run = changed(own_data, curriculum_learning__method=method)
    # 45 rows are 5 steps and 5 rows that drop_last leaves out, so the run takes several epochs.
    loader = DataLoader(FullRows(45), 8, shuffle=True, drop_last=True, num_workers=workers)
    fit = Fit(run, loader=loader, balance=False)
    plan = fit.plan
    assert (fit.steps(), fit.trainer.state.timestamp.epoch.value > 2) == (plan.steps, True)
    assert fit.logged("time/token")[: plan.steps] == [plan.consumed_tokens(step) for step in range(plan.steps)]
    assert fit.callback.rates == planned(plan, plan.learning_rate)
    segments = plan.config.shortening.rows_per_sample
    lengths = [length for length in planned(plan, plan.seqlen) for _ in range(8 * segments(length))]
    assert [batch["input_ids"].shape[1] for batch in fit.micro_batches() for _ in batch["input_ids"]] == lengths
    first = fit.micro_batches()[0]
    assert first["shift_labels"].shape == first["input_ids"].shape  # a row of 8 tokens trains 8 targets
    assert ((first["shift_labels"][:, :-1] == first["input_ids"][:, 1:]) & (first["shift_labels"][:, 1:] >= 0)).all()


class Pairs(ComposerModel):
    """A model of one's own that takes pairs of inputs and targets."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(257, 257)
        self.seen = []

    def forward(self, batch):
        self.seen.append((self.training, {"input_ids": batch[0]}))
        return self.table(batch[0])

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())


def test_pairs_of_inputs_and_targets(own_data):
    rows = [(torch.arange(32) + row, torch.arange(1, 33) + row) for row in range(40)]
    fit = Fit(own_data, model=Pairs(), loader=DataLoader(rows, 8), balance=False)
    lengths = [batch["input_ids"].shape[1] for batch in fit.micro_batches()]
    assert lengths == [length for length in planned(fit.plan, fit.plan.seqlen) for _ in range(4)]


def test_a_data_spec_keeps_its_functions_but_not_llm_foundrys_counts_of_full_rows(own_data):
    spec = DataSpec(
        DataLoader(FullRows(40), 8),
        batch_transforms=lambda batch: {**batch, "total_tokens": [32] * 8},
        get_num_tokens_in_batch=lambda batch: sum(batch.get("total_tokens", [7 * batch["input_ids"].numel()])),
    )
    fit = Fit(own_data, loader=spec)
    assert fit.logged("sequence_length_warmup/seqlen") == planned(fit.plan, fit.plan.seqlen)
    assert fit.tokens() == 7 * fit.plan.consumed_tokens(fit.plan.steps)


def test_evaluation_is_at_full_length(run):
    fit = Fit(run, eval_dataloader=DataLoader(FullRows(8), 4), eval_interval="5ba")
    evaluated = [batch["input_ids"].shape[1] for trains, batch in fit.model.seen if not trains]
    assert len(evaluated) >= 2 * (fit.plan.steps // 5)
    assert set(evaluated) == {32}
    assert fit.rows_by_step() == expected_rows(fit.plan)


def test_a_run_without_token_rates_keeps_the_schedulers(own_data):
    run = changed(own_data, scheduler=None)
    fit = Fit(run, loader=DataLoader(FullRows(40), 8), schedulers=lambda state: 1 / (1 + state.timestamp.batch.value))
    assert fit.callback.rates[-1] < fit.callback.rates[1] / 5


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_mid_warmup_is_bit_identical(run, whole, workers):
    uninterrupted, folder = whole
    resumed = Fit(run, workers=workers, load_path=str(folder / "ba10.pt"))
    plan = resumed.plan
    assert plan.seqlen(10) < plan.full_length
    assert resumed.rows_by_step() == expected_rows(plan, first=11)
    assert resumed.callback.rates == planned(plan, plan.learning_rate, first=11)
    assert resumed.logged("loss/train/total") == uninterrupted.logged("loss/train/total")[10:]
    assert resumed.tokens() == plan.consumed_tokens(plan.steps)
    for name, weight in uninterrupted.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_checkpoints_of_other_schedules_are_refused(run, whole, tmp_path):
    other = changed(run, curriculum_learning__schedule_config__total_curriculum_step=9)
    with pytest.raises(CheckpointError, match="total_curriculum_step"):
        Fit(other, load_path=str(whole[1] / "ba10.pt"))
    plain = {"algorithms": [], "train_dataloader": DataLoader(FullRows(40), 8), "max_duration": "2ba"}
    Fit(run, save_folder=str(tmp_path), save_filename="plain.pt", **plain)
    with pytest.raises(CheckpointError, match="step 2 was made without a sequence length warmup"):
        Fit(run, load_path=str(tmp_path / "plain.pt"))


def test_rows_of_another_step_are_refused(run, whole):
    with pytest.raises(ConfigError, match="spin_dataloaders: RunLoader gives the rows of step 1, but step 11"):
        Fit(run, load_path=str(whole[1] / "ba10.pt"), spin_dataloaders=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_duration": "2ep"}, "max_duration: 2ep, but the plan ends after"),
        ({"max_duration": "900ba"}, "max_duration: 900ba"),
        ({"max_duration": "9000tok"}, "max_duration: 9000tok"),
        ({"lr": 1e-3}, "max_lr: 0.005, but the optimizer has 0.001"),
        ({"loader": DataLoader(FullRows(40), 4)}, "batch_size: 4 rows on each of 1 ranks are 4 per step"),
        ({"train_dataloader": DataLoader(FullRows(40), 8)}, "train_dataloader: its batches are not cut"),
        ({"algorithms": []}, "algorithms: has no SequenceLengthWarmup"),
    ],
)
def test_contradictions_are_errors_before_the_first_step(run, options, message):
    with pytest.raises(ConfigError, match=message):
        Fit(run, **options)


def test_a_last_batch_with_fewer_rows_is_refused(own_data):
    with pytest.raises(DataError, match="step 6: this rank's batch has 5 rows"):
        Fit(own_data, loader=DataLoader(FullRows(45), 8))


def test_rows_in_another_order_or_of_another_plan_are_refused(run):
    warmup = SequenceLengthWarmup(run, global_batch=8, max_lr=RATE)
    with pytest.raises(ConfigError, match="use RunLoader"):
        warmup.data_spec(DataLoader(RunRows(warmup.plan), 8, shuffle=True))
    other = TrainerPlan.of(changed(run, curriculum_learning__min_difficulty=12), global_batch=8, max_lr=RATE)
    with pytest.raises(ConfigError, match="RunRows was made for another plan"):
        warmup.data_spec(RunLoader(RunRows(other), 8))


def test_composers_own_algorithm_counts_full_length_tokens(run):
    """The reason for ``data_spec``: Composer counts tokens before its algorithms cut a batch."""
    own = SeqLengthWarmup(duration=1.0, min_seq_length=8, max_seq_length=32, step_size=4)
    fit = Fit(run, algorithms=[own], train_dataloader=DataLoader(FullRows(40), 8), max_duration="12ba")
    trained = sum(batch["input_ids"].numel() for batch in fit.micro_batches())
    assert fit.tokens() == 12 * 8 * 32 > trained


def test_the_example_trains(tmp_path):
    sources = [Path(json.__file__).parent, Path(runpy.__file__), Path(importlib.util.__file__).parent]
    prepare(Request(str(tmp_path / "stdlib"), TokenizerChoice(train_vocab=300), inputs=sources, workers=1))
    settings = json.loads((ROOT / "examples" / "run.json").read_text())
    settings["data"]["train"], settings["training"]["train_tokens"] = [str(tmp_path / "stdlib")], 20_000
    (run := tmp_path / "run.json").write_text(json.dumps(settings))
    plan = TrainerPlan.of(run, global_batch=16, max_lr=3e-3)
    history = runpy.run_path(str(ROOT / "examples" / "composer_trainer.py"))["main"](run)
    assert [seqlen for seqlen, _ in history] == planned(plan, plan.seqlen)
    assert history[-1][1] < history[0][1]


@pytest.fixture(scope="module")
def two_ranks(run, whole, tmp_path_factory):
    """Return the results of each part on both ranks."""
    folder = tmp_path_factory.mktemp("two")
    saves = {"save_folder": str(folder / "saved"), "save_interval": "10ba", "save_filename": "ba{batch}.pt"}
    parts = {
        "whole": {"run": run, "workers": 2, **saves},
        "resumed": {"run": run, "load_path": str(folder / "saved" / "ba10.pt")},
        "from_one": {"run": run, "load_path": str(whole[1] / "ba10.pt")},
    }
    (folder / "parts.json").write_text(json.dumps(parts))
    flags = ["-n", str(RANKS), "--master_port", free_port(), "--stdout", f"{folder}/rank{{rank}}.log"]
    command = [sys.executable, "-c", LAUNCHER, *flags, __file__, str(folder)]
    with running(command, folder / "launcher.log") as process:
        process.wait(timeout=limit(240))
    assert process.returncode == 0, "".join(path.read_text()[-4000:] for path in sorted(folder.glob("*.log")))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def both(two_ranks, part):
    """The rows of each step on both ranks, sorted."""
    return [sorted(one + other) for one, other in zip(*(rank[part]["rows"] for rank in two_ranks), strict=True)]


@pytest.mark.parametrize(("part", "first"), [("whole", 1), ("resumed", 11), ("from_one", 11)])
def test_two_ranks_train_the_rows_of_the_run_at_its_rates(two_ranks, whole, part, first):
    plan, one = whole[0].plan, two_ranks[0][part]
    assert both(two_ranks, part) == [sorted(rows) for rows in expected_rows(plan, first)]
    assert one["rates"] == planned(plan, plan.learning_rate, first)
    assert one["tokens"] == plan.consumed_tokens(plan.steps)
    losses = whole[0].logged("loss/train/total")[first - 1 :]
    assert one["losses"] == pytest.approx(losses, abs=0.1)  # other dropout masks


def test_two_ranks_resume_mid_warmup_bit_identically(two_ranks):
    for rank in two_ranks:
        assert rank["resumed"]["losses"] == rank["whole"]["losses"][10:]


def do_parts(folder):
    """Run the parts on this rank."""
    results = {}
    for name, options in json.loads((folder / "parts.json").read_text()).items():
        fit = Fit(**options)
        results[name] = {
            "rows": fit.rows_by_step(),
            "rates": fit.callback.rates,
            "tokens": fit.tokens(),
            "losses": fit.logged("loss/train/total"),
        }
    (folder / f"rank{dist.get_global_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    do_parts(Path(sys.argv[-1]))
