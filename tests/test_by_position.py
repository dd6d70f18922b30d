"""The loss by position in the row against loops over positions, and the command that measures it."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.command import slw
from helpers.encoders import write_description
from helpers.models import complete
from helpers.settings import changed
from transformers import AutoModelForCausalLM

from seqlen_curriculum import RunConfig
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.data.from_config import open_samples
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError
from seqlen_curriculum.evaluation import by_position
from seqlen_curriculum.evaluation.by_position import BinLoss, bins, loss_by_position, measure, validation_rows
from seqlen_curriculum.evaluation.distributed import Ranks
from seqlen_curriculum.models.gpt2 import build_gpt2, save_hf
from seqlen_curriculum.models.pretrained import load_model
from seqlen_curriculum.models.pretrained_tokenizer import save_tokenizer

POSITIONS = 1024
BINS = {
    1: {"1-1": (1, 1)},
    7: {"1-7": (1, 7)},
    8: {"1-8": (1, 8)},
    9: {"1-8": (1, 8), "9-9": (9, 9)},
    1024: {"1-8": (1, 8), "9-64": (9, 64), "65-512": (65, 512), "513-1024": (513, 1024)},
}


def save(folder, seed=0, positions=POSITIONS):
    torch.manual_seed(seed)
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": positions}
    save_hf(build_gpt2(ModelConfig(**sizes, vocab_size=257)), folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "gpt2")


@pytest.fixture
def config(tiny_run):
    """Return a function from ``data.seq_length`` to the configuration of a run, without its curriculum."""

    def with_length(seq_length, **changes):
        changes |= {"data__seq_length": seq_length, "model__max_position_embeddings": max(seq_length, 32)}
        changes |= {"training__train_tokens": 10**6, "data__split": "1,1,0", **changes}
        return RunConfig.from_dict(changed(tiny_run, curriculum_learning={"enabled": False}, **changes))

    return with_length


def looped(folder, config, rows):
    """Return the loss of each position by a loop over rows and positions."""
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    samples = open_samples(config, "valid")
    sums = [0.0] * samples.seq_length
    for row in np.arange(rows) * samples.num_samples // rows:
        tokens = samples.read([row], samples.seq_length)[0].tolist()
        with torch.no_grad():
            logits = lm(torch.tensor([tokens[:-1]])).logits[0].double()
        for position in range(samples.seq_length):
            sums[position] -= torch.log_softmax(logits[position], 0)[tokens[position + 1]].item()
    return [total / rows for total in sums]


@pytest.mark.parametrize("seq_length", BINS)
def test_losses_are_those_of_a_loop(model, config, seq_length):
    run = config(seq_length)
    found = loss_by_position(model, run, ranks=Ranks(), batch_tokens=2 * seq_length + 1)  # batches of 2, 2 and 1 rows
    expected = looped(model, run, 5)
    assert list(found) == list(BINS[seq_length])
    for name, (first, last) in BINS[seq_length].items():
        assert found[name].tokens == 5 * (last - first + 1)
        assert found[name].loss == pytest.approx(sum(expected[first - 1 : last]) / (last - first + 1), abs=1e-6)
    assert by_position.mean_loss(found) == pytest.approx(sum(expected) / seq_length, abs=1e-6)


def test_bins_cover_a_row():
    assert bins(65) == [(1, 8), (9, 64), (65, 65)]
    for seqlen in range(1, 600):
        assert [position for first, last in bins(seqlen) for position in range(first, last + 1)] == list(
            range(1, seqlen + 1)
        )


def test_ranks_share_the_rows(model, config):
    valid, lm = validation_rows(model, config(9), rows=5), load_model(model)

    class Alone(Ranks):
        """A rank whose sums stay its own."""

        def total(self, values):
            return values

    whole, *parts = (measure(lm, valid, ranks, 9) for ranks in (Ranks(), Alone(0, 2), Alone(1, 2)))
    for name in whole:
        assert 0 < parts[1][name].loss < parts[0][name].loss  # two rows and three
        assert sum(part[name].loss for part in parts) == pytest.approx(whole[name].loss, rel=1e-12)


def test_rows_are_at_most_those_of_the_split(model, config):
    valid = validation_rows(model, config(1024), rows=10**6)
    assert valid.ids.tolist() == list(range(valid.samples.num_samples))
    assert len(validation_rows(model, config(1024)).ids) == 5  # training.eval_rows


def test_weights_that_diverged_are_reported(model, config):
    lm = load_model(model)
    with torch.no_grad():
        lm.transformer.wpe.weight[7] = float("nan")
    with pytest.raises(CheckpointError, match="gpt2: the loss of 9 of 9 positions is not finite"):
        measure(lm, validation_rows(model, config(9)), Ranks(), name="gpt2")


def test_mismatches_are_reported_before_the_weights_are_read(model, config, corpus, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(by_position, "load_model", None)
    with pytest.raises(ConfigError, match="BertForMaskedLM is an encoder, trained on masked tokens; it has no loss by"):
        loss_by_position(write_description(tmp_path / "bert"), config(8))
    with pytest.raises(ConfigError, match=r"data\.seq_length: 1025 is above the 1024 positions of the model in .*gpt2"):
        loss_by_position(model, config(1025))
    with pytest.raises(ConfigError, match="training: section required"):
        loss_by_position(model, RunConfig.from_dict({"data": tiny_run["data"], "train_batch_size": 8}))
    small = complete(shutil.copytree(model, tmp_path / "small"), vocab_size=200)
    with pytest.raises(DataError, match=r"token .* has id 256, outside the vocabulary of 200"):
        loss_by_position(small, config(8))
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"bytes{suffix}")
    (tmp_path / "bytes.json").write_text('{"vocab_size": 257}')
    run = config(8, data__train=[str(tmp_path / "bytes")])
    with pytest.raises(
        DataError, match=r"was made with a vocabulary of 257, .*small has 200; give the run that trained"
    ):
        loss_by_position(small, run)
    other = shutil.copytree(model, tmp_path / "other")
    save_tokenizer(build_tokenizer(TokenizerChoice(train_vocab=257), ["ab" * 9]), other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "bytes.tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"bytes\.tokenizer\.json: is not the tokenizer in .*other: id .*; prepare"):
        loss_by_position(other, run)
    with pytest.raises(DataError, match="no sample in this split"):
        loss_by_position(model, config(8, data__split="1,0,0", training__eval_interval=0))


# The command


@pytest.fixture
def runs(tmp_path, tiny_run):
    """Two runs' folders, with two checkpoints and one."""
    for name, steps in {"a": (1, 2), "b": (3,)}.items():
        for step in steps:
            complete(save(tmp_path / name / f"global_step{step}", seed=step, positions=32), step=step)
        (tmp_path / name / "run.json").write_text(json.dumps({"config": tiny_run, "launches": []}))
    return tmp_path


def test_checkpoints_of_a_run_and_runs(runs, tiny_run):
    checkpoints = ["a/global_step1", "a/global_step2"]
    arguments = ["evaluate", *checkpoints, "--by-position", "--device", "cpu", "--png", "p.png", "--out", "p.json"]
    result = slw(*arguments, cwd=runs)
    expected = {
        path: loss_by_position(runs / path, RunConfig.from_dict(tiny_run), ranks=Ranks()) for path in checkpoints
    }
    head, _, title, columns, *lines = result.stdout.splitlines()
    assert (head, title) == ("float32, 5 validation rows of 32 tokens", "loss by position (nats/token)")
    assert columns.split() == ["all", "1-8", "9-32"]
    for path, line in zip(checkpoints, lines, strict=True):
        name, *losses = line.split()
        numbers = [by_position.mean_loss(expected[path]), *(each.loss for each in expected[path].values())]
        assert (name, losses) == (path.split("/")[1], [f"{number:.6f}" for number in numbers])
    written = json.loads((runs / "p.json").read_text())
    assert (written["seqlen"], written["rows"], written["ranks"]) == (32, 5, 1)
    for path in checkpoints:
        measured = written["by_position"][path.split("/")[1]]
        assert measured["checkpoint"] == path
        assert {name: BinLoss(**each) for name, each in measured["positions"].items()} == expected[path]
    assert (runs / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert "--png p.png: exists already" in slw("evaluate", "a", "--by-position", "--png", "p.png", cwd=runs).stderr
    both = json.loads(slw("evaluate", "a", "b", "--by-position", "--device", "cpu", "--json", cwd=runs).stdout)
    assert list(both["by_position"]) == ["a", "b"]
    assert both["by_position"]["a"]["checkpoint"] == "a/global_step2"


def test_runs_with_other_rows_are_not_compared(runs, tiny_run):
    other = changed(tiny_run, training__eval_rows=4)
    (runs / "b" / "run.json").write_text(json.dumps({"config": other, "launches": []}))
    assert (
        "a, b: their runs have different validation rows" in slw("evaluate", "a", "b", "--by-position", cwd=runs).stderr
    )
    arguments = ["evaluate", "a", "b", "--by-position", "--device", "cpu", "--json", "--run"]
    assert json.loads(slw(*arguments, "b", cwd=runs).stdout)["rows"] == 4
    assert json.loads(slw(*arguments, "a", "--rows", 3, cwd=runs).stdout)["rows"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--by-position", "--limit", "0"], "--limit 0: not used with --by-position; leave it out"),
        (["a", "--by-position", "--harness", "piqa"], "--harness piqa: not used with --by-position"),
        (["a", "--by-position", "--seq-length", "16"], "--seq-length 16: not used with --by-position"),
        (["a", "--by-position", "--rows", "0"], "--rows: 0 is not valid; give 1 or more"),
        (["a", "--by-position", "--png", "p.txt"], "--png p.txt: not the name of an image file"),
        (["a", "a", "--by-position"], "a is given twice"),
        (["hf", "--by-position"], "--run: neither hf nor the folder that it is in has a run.json; give the folder"),
        (["a", "--task", "lambada=x", "--rows", "3"], "--rows 3: only used with --by-position; leave it out"),
        (["a", "b", "--task", "lambada=x"], "CHECKPOINT: 2 are given, and tasks are scored on one"),
    ],
)
def test_mistakes_are_one_line(runs, monkeypatch, arguments, message):
    shutil.copytree(runs / "a" / "global_step1", runs / "hf")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    result = slw("evaluate", *arguments, cwd=runs)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
