"""torchtitan's Trainer with a warmup, on one rank in this process and on two launched ones, against the plan of the run.

Its own loop, model, FlexAttention, FSDP, checkpoints and validation run here, on a CPU (see helpers/titan.py).
"""

import dataclasses
import gc
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchtitan")
pytestmark = pytest.mark.trainers

from helpers import titan  # noqa: E402
from helpers.launching import ROOT, TESTS, limit  # noqa: E402
from helpers.settings import changed  # noqa: E402
from torchtitan.components.loss import ChunkedLossWrapper  # noqa: E402
from torchtitan.components.validate import Validator  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention, create_varlen_metadata_for_document  # noqa: E402
from torchtitan.models.llama3 import config_registry  # noqa: E402

from seqlen_curriculum import set_batch_sequence_length  # noqa: E402
from seqlen_curriculum.data.from_config import open_training_data  # noqa: E402
from seqlen_curriculum.errors import CheckpointError, ConfigError  # noqa: E402
from seqlen_curriculum.integrations.torchtitan import RunDataLoader, SequenceLengthWarmupTrainer, warm_up  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _collect_garbage():
    yield
    gc.enable()  # torchtitan collects by itself


@pytest.fixture(scope="module")
def save(tiny_run, tmp_path_factory):
    """Write a run's file with these changes; return its path."""

    def write(**changes):
        base = {"data__leftovers": "recycle", "training__train_tokens": 4000}
        path = tmp_path_factory.mktemp("run") / "run.json"
        path.write_text(json.dumps(changed(tiny_run, **{**base, **changes})))
        return path

    return write


@pytest.fixture(scope="module")
def windows(save, tmp_path_factory):
    """A run of torchtitan's own text loader with method "window", and a validation every 10 steps."""
    config = titan.config(tmp_path_factory.mktemp("windows"))
    loader = HuggingFaceTextDataLoader.Config(dataset="sources", infinite=False)
    config.validator = Validator.Config(enable=True, freq=10, steps=1, dataloader=loader)
    return titan.train(config, save(curriculum_learning__method="window", training__train_tokens=6000))


def run_rows(folder, file, **changes):
    """Train on the rows of ``slw train``."""
    config = titan.config(folder)
    config.dataloader = RunDataLoader.Config(**changes)
    return titan.train(config, file)


@pytest.fixture(scope="module")
def truncated(save, tmp_path_factory):
    return run_rows(tmp_path_factory.mktemp("truncated"), save())


def expected(plan, step):
    inputs, targets = open_training_data(plan.config).read(step)
    return inputs.astype(np.int64).tolist(), targets.astype(np.int64).tolist()


def assert_at_the_rates_of_the_plan(recorder, first=1):
    plan = recorder.trainer.plan
    steps = range(first, plan.steps + 1)
    assert recorder.rates() == pytest.approx([plan.learning_rate(step) for step in steps], rel=1e-12)


def own_rows(recorder, count):
    """The first rows of the trainer's own loader, as it makes them without a warmup."""
    loader = HuggingFaceTextDataLoader.Config(dataset="sources").build(
        dp_world_size=1, dp_rank=0, tokenizer=recorder.trainer.tokenizer, seq_len=32, local_batch_size=count
    )
    inputs, labels = next(iter(loader))
    return inputs, labels


def test_windows_keep_every_token_at_one_shape(windows):
    plan = windows.trainer.plan
    assert [windows.trainer.step, plan.seqlen(1), plan.seqlen(plan.steps)] == [plan.steps, 8, 32]
    whole, _ = own_rows(windows, 8 * plan.steps)
    for step in range(1, plan.steps + 1):
        rows = slice(8 * (step - 1), 8 * step)
        assert windows.rows(step) == whole["input"][rows].tolist()
        positions = whole["positions"][rows]
        assert windows.rows(step, "positions") == (positions % plan.seqlen(step)).tolist()
        cut = {"input_ids": whole["input"][rows], "position_ids": positions, "labels": whole["input"][rows]}
        pieces, _ = set_batch_sequence_length(cut, plan.seqlen(step), labels_shifted=True, padding_free=True)
        assert windows.rows(step, "positions") == pieces["position_ids"].tolist()
    assert any(0 in row[1:] for row in whole["positions"].tolist())  # some rows hold two documents


def test_windows_count_all_tokens_and_follow_the_rate(windows):
    plan = windows.trainer.plan
    tokens = {step: metrics["tokens"] for step, metrics in windows.metrics.items()}
    assert tokens == {step: plan.consumed_tokens(step) for step in range(1, plan.steps + 1)}
    assert plan.consumed_tokens(1) == 8 * 32
    assert_at_the_rates_of_the_plan(windows)
    assert windows.metrics[plan.steps]["loss"] < windows.metrics[1]["loss"]


def test_validation_is_at_full_length(windows):
    assert [batch["step"] for batch in windows.evaluated] == [1, 10, 20]
    for batch in windows.evaluated:
        assert max(position for row in batch["positions"] for position in row) == 31


def test_tokens_attend_within_their_piece_only(windows):
    # What a piece of 8 tokens gives in a row of four must be what it gives alone.
    model = windows.trainer.model_parts[0]
    inputs, _ = own_rows(windows, 1)
    row = inputs["input"]
    with torch.no_grad(), windows.trainer.train_context():
        together = logits(model, row, torch.arange(32)[None] % 8)
        alone = [logits(model, row[:, start : start + 8], torch.arange(8)[None]) for start in range(0, 32, 8)]
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)
    metadata = create_varlen_metadata_for_document(torch.arange(32).repeat(2, 1) % 8)
    assert (metadata.cu_seq_q.tolist(), metadata.max_q) == (list(range(0, 65, 8)), 8)


def logits(model, tokens, positions):
    output = model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions=positions))
    return output.full_tensor() if hasattr(output, "full_tensor") else output


def test_run_rows_are_those_of_slw_train(truncated):
    plan = truncated.trainer.plan
    assert truncated.trainer.step == plan.steps
    for step in range(1, plan.steps + 1):
        assert truncated.rows(step) == expected(plan, step)[0]
        assert truncated.metrics[step]["tokens"] == plan.consumed_tokens(step)
    assert_at_the_rates_of_the_plan(truncated)


@pytest.mark.parametrize("method", ["segment", "window"])
def test_run_rows_with_workers_and_other_methods(save, tmp_path, method):
    recorder = run_rows(tmp_path, save(curriculum_learning__method=method), num_workers=2)
    plan = recorder.trainer.plan
    for step in range(1, plan.steps + 1):
        assert recorder.rows(step) == expected(plan, step)[0]
        assert max(map(max, recorder.rows(step, "positions"))) == plan.seqlen(step) - 1
    assert recorder.metrics[plan.steps]["tokens"] == plan.consumed_tokens(plan.steps)


def test_own_rows_are_truncated_and_the_loss_is_the_mean_over_what_is_left(save, tmp_path):
    config = titan.config(tmp_path)
    config.dataloader = HuggingFaceTextDataLoader.Config(dataset="sources", num_workers=1)
    recorder = titan.train(config, save(data=None, model=None, scheduler=None))
    plan = recorder.trainer.plan
    whole, _ = own_rows(recorder, 8 * plan.steps)
    for step in range(1, plan.steps + 1):
        rows = whole["input"][8 * (step - 1) : 8 * step, : plan.seqlen(step)]
        assert recorder.rows(step) == rows.tolist()
    # An untrained model has about ln(257) nats per token. Divided by the tokens of full rows it would be a fourth of that.
    assert recorder.metrics[1]["loss"] == pytest.approx(np.log(257), rel=0.05)
    # Without TokenCosineLR torchtitan's own schedule stays: a warmup of 5 steps, then a linear decay.
    assert recorder.rates()[:6] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 5e-3])


@pytest.mark.parametrize("kind", ["windows", "truncated"])
def test_resume_mid_warmup_is_bit_identical(kind, request):
    whole = request.getfixturevalue(kind)
    plan, before = whole.trainer.plan, whole.trainer.config
    config = titan.config(before.dump_folder)
    config.checkpoint = dataclasses.replace(config.checkpoint, load_step=10)
    config.dataloader = RunDataLoader.Config(num_workers=1) if kind == "truncated" else config.dataloader
    resumed = titan.train(config, before.curriculum)
    assert plan.seqlen(10) < plan.full_length
    assert resumed.batches[0]["step"] == 11
    assert resumed.batches == [batch for batch in whole.batches if batch["step"] > 10]
    assert resumed.metrics == {step: metrics for step, metrics in whole.metrics.items() if step > 10}
    for name, weight in whole.trainer.model_parts[0].state_dict().items():
        assert torch.equal(whole_tensor(resumed.trainer.model_parts[0].state_dict()[name]), whole_tensor(weight)), name


def whole_tensor(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def test_a_checkpoint_of_another_schedule_is_refused(truncated, save):
    folder = truncated.trainer.config.dump_folder
    with pytest.raises(CheckpointError, match="total_curriculum_step"):
        run_rows(folder, save(curriculum_learning__schedule_config__total_curriculum_step=40))


def test_a_checkpoint_without_a_warmup_is_refused(save, tmp_path):
    titan.train(titan.config(tmp_path, steps=2))
    with pytest.raises(CheckpointError, match="checkpoint: holds a checkpoint made without a sequence length warmup"):
        titan.train(titan.config(tmp_path), save())


@pytest.fixture(scope="module")
def two_ranks(truncated, tmp_path_factory):
    """The results of two ranks (FSDP): a run of their own, and the rest of the run of one rank from step 20 on."""
    out, one_rank = tmp_path_factory.mktemp("two"), truncated.trainer.config
    script = [TESTS / "helpers" / "titan.py", one_rank.curriculum, out / "ranks", out, one_rank.dump_folder]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*launcher, *map(str, script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=limit(300),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {"new": 0, "resumed": 1}
    return {
        name: [json.loads((out / f"ranks.{number}.{rank}").read_text()) for rank in range(2)]
        for name, number in names.items()
    }


@pytest.mark.parametrize(("name", "first"), [("new", 1), ("resumed", 21)])
def test_two_ranks_read_each_step_once_at_one_length(two_ranks, truncated, name, first):
    plan, ranks = truncated.trainer.plan, two_ranks[name]
    for step in range(first, plan.steps + 1):
        rows = [row for rank in ranks for batch in rank["batches"] if batch["step"] == step for row in batch["input"]]
        assert sorted(rows) == sorted(expected(plan, step)[0])
        rates = [batch["rate"] for rank in ranks for batch in rank["batches"] if batch["step"] == step]
        assert rates == pytest.approx([plan.learning_rate(step)] * len(rates), rel=1e-12)
        for rank in ranks:
            assert rank["metrics"][str(step)]["tokens"] == plan.consumed_tokens(step)
    assert ranks[0]["batches"][0]["step"] == first
    if name == "new":  # FSDP draws other initial weights on each rank
        return
    losses = [ranks[0]["metrics"][str(step)]["loss"] for step in range(first, plan.steps + 1)]
    assert losses == pytest.approx([truncated.metrics[step]["loss"] for step in range(first, plan.steps + 1)], abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "file", "named"),
    [
        ({"global_batch_size": 16}, {}, "train_batch_size: 8 in the file, but the trainer has 16"),
        ({"seq_len": 64}, {}, "training.seq_len: 64 in the trainer, but the run ends at 32 tokens"),
        ({}, {"optimizer__params__lr": 1.0}, "optimizer.params.lr: 1.0 in the file, but the trainer has 0.005"),
        ({"disable_cuda_graphs": False}, {}, "training.disable_cuda_graphs: False"),
        ({}, {"curriculum_learning__method": "segment"}, '"segment" needs RunDataLoader'),
        ({}, {"curriculum_learning__schedule_type": "adaptive"}, "curriculum_learning.schedule_type"),
    ],
)
def test_what_contradicts_the_plan_is_refused_before_the_model_is_built(save, tmp_path, changes, file, named):
    with pytest.raises(ConfigError) as error:
        titan.train(titan.config(tmp_path, **changes), save(**file))
    assert named in str(error.value)


def test_what_a_model_or_a_loss_cant_follow_is_refused(save, tmp_path):
    config = titan.config(tmp_path)
    config.model_spec.model.layers[0].attention.inner_attention = ScaledDotProductAttention.Config()
    with pytest.raises(ConfigError, match=r'"window" needs attention .*, but the model has ScaledDotProductAttention'):
        titan.train(config, save(curriculum_learning__method="window"))
    config = titan.config(tmp_path)
    config.loss = ChunkedLossWrapper.Config(loss_fn=config.loss)  # in 8 chunks
    with pytest.raises(
        ConfigError, match=r"loss.num_chunks: needs lengths that are multiples of 8, .* schedule has 12"
    ):
        titan.train(config, save())
    with pytest.raises(ConfigError, match=r"dataloader: RunDataLoader needs a run's file"):
        RunDataLoader.Config().build(dp_world_size=1, dp_rank=0, local_batch_size=1)


def test_a_config_function_and_the_command_line(save, monkeypatch):
    file, other = save(), save()
    monkeypatch.setattr(config_registry, "warmed_up", lambda: warm_up(config_registry.llama3_debugmodel(), file), False)
    command = ["--module", "llama3", "--config", "warmed_up", "--curriculum", str(other), "--training.seq_len", "32"]
    config = ConfigManager().parse_args(command)
    assert type(config) is SequenceLengthWarmupTrainer.Config
    assert (config.curriculum, config.training.seq_len) == (str(other), 32)
    with pytest.raises(ConfigError, match="belongs to another trainer"):
        warm_up(config, file)


def test_the_example_trains(save, tiny_run, tmp_path):
    config = runpy.run_path(str(ROOT / "examples" / "torchtitan_warmup.py"))["debugmodel"]()
    run = json.loads(Path(config.curriculum).read_text())
    run["data"]["train"], run["training"]["train_tokens"] = tiny_run["data"]["train"], 12_000
    (tmp_path / "run.json").write_text(json.dumps(run))
    config.curriculum, config.dump_folder = str(tmp_path / "run.json"), str(tmp_path)
    config.hf_assets_path = titan.byte_tokenizer(tmp_path / "tokenizer")
    config.optimizer.implementation, config.training.disable_cuda_graphs = "for-loop", True  # a CPU has no others
    config.training.mixed_precision_param = "float32"
    config.model_spec.model.layers = config.model_spec.model.layers[:1]
    recorder = titan.train(config)
    plan = recorder.trainer.plan
    assert plan.steps == 12  # of 16 rows of 64 tokens
    for step in (1, plan.steps):
        assert recorder.rows(step) == expected(plan, step)[0]
        assert max(map(max, recorder.rows(step, "positions"))) == plan.seqlen(step) - 1
    assert recorder.metrics[plan.steps]["loss"] < recorder.metrics[1]["loss"]
