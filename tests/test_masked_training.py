"""Encoders trained on masked tokens by two ranks in one launch: equal to a plain loop on one rank, resumed, exported.

Shapes: B rows, S tokens, M masked targets of a row.
"""

import json

import numpy as np
import pytest
import torch
from helpers.command import slw
from helpers.encoders import MASK, write_encoder
from helpers.runs import Runs, records
from helpers.runs import run as run_of
from transformers import AutoModelForMaskedLM

from seqlen_curriculum import RunConfig
from seqlen_curriculum.analysis.read_run import load_run
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.data.mask_tokens import open_objective
from seqlen_curriculum.export.model_card import ModelCard
from seqlen_curriculum.models.pretrained import load_model

RUNS = {  # name: (encoder, more settings, checkpoint to resume from)
    "bert": ("bert", [], None),
    "bert-resumed": ("bert", [], "bert/global_step9"),
    "bert-zero3": ("bert", ["zero_optimization.stage=3"], None),
    "bert-segment": ("bert", ["zero_optimization.stage=1", "curriculum_learning.method=segment"], None),
    "modernbert-zero2": ("modernbert", ["zero_optimization.stage=2", "training.mlm_probability=0.3"], None),
}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, tiny_run):
    """18 steps of 8 rows of 8 to 32 tokens, checkpoints and evaluations at 9 and 18."""
    folder = tmp_path_factory.mktemp("masked_runs")
    run = {name: section for name, section in tiny_run.items() if name != "model"}
    run["training"] = {**run["training"], "train_tokens": 2_528, "eval_interval": 9, "save_interval": 9, "keep_last": 9}
    run["training"] |= {"variance_interval": 5, "objective": "masked", "mask_token_id": MASK}
    run["train_micro_batch_size_per_gpu"] = 4  # all rows of a rank, which is faster
    (folder / "run.json").write_text(json.dumps(run))
    for name in ("bert", "modernbert"):
        write_encoder(folder / "models" / name, name)
    return folder / "run.json"


def settings(run_file, name):
    encoder, sets, _ = RUNS[name]
    return [f"model.hf_checkpoint={run_file.parent / 'models' / encoder}", *sets]


@pytest.fixture(scope="module")
def trained(run_file):
    root = run_file.parent
    runs = Runs(root)
    parts = [
        run_of(run_file, root / name, settings(run_file, name), root / resume if resume else "auto")
        for name, (_, _, resume) in RUNS.items()
    ]
    parts[1].after = "bert"
    runs.launch("all", parts, ranks=2)
    return runs


def losses(folder, kind="loss"):
    training, evaluations = records(folder)
    return [record[kind] for record in (training if kind == "loss" else evaluations)]


def as_labels(inputs, targets):
    """Return tensors of inputs (B, S), and of transformers' labels (B, S) for targets (B, 2, M)."""
    inputs, targets = torch.from_numpy(inputs), torch.from_numpy(targets)
    return inputs, torch.full_like(inputs, -100).scatter(1, targets[:, 0], targets[:, 1])


def plain_losses(run_file, name):
    """Return the losses of a loop of torch and transformers on one rank, with the whole batch of a step at once."""
    config = RunConfig.load(run_file, settings(run_file, name))
    data, objective, rate = open_run_data(config)[0], open_objective(config), config.plan.learning_rate()
    model = load_model(run_file.parent / "models" / RUNS[name][0])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0)
    found = []
    for step in range(1, config.plan.steps + 1):
        inputs, labels = as_labels(*objective.of_step(*data.read(step), step, 0))
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", ["bert", "bert-segment", "modernbert-zero2"])
def test_two_ranks_train_as_a_plain_loop_on_one(trained, run_file, name):
    found, expected = losses(trained[name]), plain_losses(run_file, name)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=3e-4)  # Adam amplifies the rounding of gradients near 0
    assert found[-1] < found[0] - 0.2  # ln(512) is 6.2


def test_zero3_trains_as_zero0(trained):
    for kind in ("loss", "valid_loss"):
        assert losses(trained["bert-zero3"], kind) == pytest.approx(losses(trained["bert"], kind), rel=1e-5)


def test_a_resumed_run_has_the_same_masks_to_the_last_bit(trained):
    for whole, resumed in zip(records(trained["bert"]), records(trained["bert-resumed"]), strict=True):
        assert resumed == [record for record in whole if record["step"] > 9]


def test_the_warmup_counts_all_tokens_of_the_rows(trained):
    training, _ = records(trained["bert"])
    assert [record["seqlen"] for record in training][::6] == [8, 16, 20]
    assert training[-1]["consumed_tokens"] == sum(8 * record["seqlen"] for record in training)


@pytest.mark.parametrize(("name", "step"), [("bert", 9), ("bert-zero3", 18), ("modernbert-zero2", 18)])
def test_an_evaluation_is_the_loss_of_fixed_masks_of_the_saved_weights(trained, run_file, name, step):
    config = RunConfig.load(run_file, settings(run_file, name))
    _, valid = open_run_data(config)
    ids = np.arange(5) * valid.num_samples // 5
    inputs, labels = as_labels(*open_objective(config).of_samples(valid.read(ids, 32), ids))
    assert inputs.shape == (5, 32)  # always at full length
    model = AutoModelForMaskedLM.from_pretrained(trained[name] / f"global_step{step}").eval()
    with torch.no_grad():
        loss = float(model(input_ids=inputs, labels=labels).loss)
    _, evaluations = records(trained[name])
    (record,) = [record for record in evaluations if record["step"] == step]
    assert record["valid_loss"] == pytest.approx(loss, rel=1e-5)
    assert record["objective"] == "masked"
    assert f"validation loss of masked tokens {record['valid_loss']:.4f}, pseudo-perplexity" in trained.outputs["all"]


def test_another_share_or_mask_is_another_run(run_file):
    config = RunConfig.load(run_file, settings(run_file, "bert"))
    other = RunConfig.load(run_file, [*settings(run_file, "bert"), "training.mlm_probability=0.3"])
    assert config.settings() != other.settings()


def test_the_card_of_a_checkpoint_names_its_perplexity(trained):
    facts = {"parameters": 1, "sizes": {}, "dtype": "float32", "has_tokenizer": False}
    card = ModelCard("bert", "BertForMaskedLM", "bert", **facts, settings={}, run=load_run(trained["bert"])).markdown()
    assert "(pseudo-perplexity of masked tokens " in card


def test_tasks_of_next_tokens_are_refused(trained):
    refused = slw("evaluate", trained["bert"], "--task", f"wikitext103={__file__}")
    assert "BertForMaskedLM is an encoder, trained on masked tokens; these tasks score next tokens" in refused.stderr


def test_the_plan_of_a_masked_run(run_file):
    planned = slw("plan", run_file, "--json", *[word for one in settings(run_file, "bert") for word in ("--set", one)])
    assert json.loads(planned.stdout)["consumed_tokens"] == 2_528
