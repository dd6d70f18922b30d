"""Axolotl's own training from its YAML file, with the plugin: lengths, tokens, rates, evaluation, resume and two ranks.

Axolotl has an environment of its own: bash scripts/test_trainers.sh axolotl. This module is also the launched script.
"""

import json
import random
from pathlib import Path

import pytest
from helpers.settings import changed

pytestmark = pytest.mark.trainers
PLUGIN = "seqlen_curriculum.integrations.axolotl.SequenceLengthWarmupPlugin"
END = "<|endoftext|>"


def write_model_and_texts(folder):
    """Write a tiny Llama with a tokenizer of characters, and texts of 3 to 31 characters in a JSONL file."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {**{chr(number): number for number in range(256)}, END: 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=END))
    named = {"eos_token": END, "pad_token": END, "bos_token": END}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=64, **sizes)).save_pretrained(folder / "model")
    chosen = random.Random(0)
    texts = ["".join(chosen.choices("abcdefgh", k=chosen.randrange(3, 32))) for _ in range(1500)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def settings(folder, output, run, packing, **changes):
    """Return Axolotl's configuration: 8 rows of 32 tokens per step."""
    return {
        "base_model": str(folder / "model"),
        "plugins": [PLUGIN],
        "sequence_length_warmup": run,
        "datasets": [{"path": str(folder / "texts.jsonl"), "type": "completion", "ds_type": "json"}],
        "dataset_prepared_path": str(folder / f"prepared-{packing}"),
        "output_dir": str(output),
        "sequence_len": 32,
        "sample_packing": packing,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "val_set_size": 0.02,
        "eval_steps": 9,
        "save_strategy": "no",
        "attn_implementation": "sdpa",
        "bf16": False,
        "seed": 1,
        "dataset_num_proc": 1,
        **changes,
    }


def one_process(monkeypatch):
    """Make datasets work in this process: its workers, forked from a process with many threads, can hang."""
    from datasets import Dataset

    for name in ("map", "filter", "save_to_disk"):
        original = getattr(Dataset, name)

        def alone(*args, original=original, num_proc=None, **options):
            return original(*args, **options)

        monkeypatch.setattr(Dataset, name, alone)


def train(folder, configuration, monkeypatch):
    """Train as ``axolotl train`` does; return the trainer and what its model was given."""
    import yaml
    from axolotl.cli import train as command
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.integrations.base import PluginManager

    one_process(monkeypatch)
    seen, trainers = [], []
    compute_loss, created = AxolotlTrainer.compute_loss, PluginManager.post_trainer_create

    def recorded(self, model, inputs, *args, **options):
        kept = {name: inputs[name].clone() for name in ("input_ids", "position_ids") if name in inputs}
        seen.append((model.training, self.state.global_step + 1, kept))
        return compute_loss(self, model, inputs, *args, **options)

    def collected(self, cfg, trainer):
        trainers.append(trainer)
        return created(self, cfg, trainer)

    monkeypatch.setattr(AxolotlTrainer, "compute_loss", recorded)
    monkeypatch.setattr(PluginManager, "post_trainer_create", collected)
    path = Path(folder) / "axolotl.yml"
    path.write_text(yaml.safe_dump(configuration))
    command.do_train(load_cfg(str(path)), TrainerCliArgs())
    monkeypatch.undo()
    return trainers[0], seen


@pytest.fixture(scope="module", autouse=True)
def offline():
    pytest.importorskip("axolotl")
    patch = pytest.MonkeyPatch()
    for name in ("AXOLOTL_DO_NOT_TRACK", "HF_HUB_OFFLINE", "WANDB_DISABLED"):
        patch.setenv(name, "1")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axolotl")
    write_model_and_texts(folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny_run):
    return changed(tiny_run, data=None, model=None, training__train_tokens=4000)


@pytest.fixture(scope="module")
def packed(folder, run, tmp_path_factory):
    """A packed run that leaves checkpoint-8, its schedule in a file of its own."""
    output = tmp_path_factory.mktemp("packed")
    (folder / "run.json").write_text(json.dumps(changed(run, curriculum_learning__method="window")))
    configuration = settings(
        folder, output, str(folder / "run.json"), True, save_strategy="steps", save_steps=8, dataloader_num_workers=2
    )
    patch = pytest.MonkeyPatch()
    trainer, seen = train(folder, configuration, patch)
    return configuration, trainer, seen


@pytest.fixture(scope="module")
def unpacked(folder, run, tmp_path_factory):
    """A run without packing, its schedule inside the YAML file."""
    return train(folder, settings(folder, tmp_path_factory.mktemp("rows"), run, False), pytest.MonkeyPatch())


def by_step(seen, name):
    """The values of a batch's tensor by optimizer step."""
    steps = {}
    for trains, step, batch in seen:
        if trains:
            steps.setdefault(step, []).append(batch[name])
    return steps


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_packed_documents_become_pieces_of_the_length_of_the_step(packed):
    _, trainer, seen = packed
    steps, plan = by_step(seen, "position_ids"), trainer.plan
    assert list(steps) == list(range(1, plan.steps + 1))
    for step, batches in steps.items():
        assert len(batches) == 4
        assert max(int(batch.max()) for batch in batches) + 1 == plan.seqlen(step)
        for row in (row for batch in batches for row in batch):
            assert row[0] == 0
            assert ((row[1:] == row[:-1] + 1) | (row[1:] == 0)).all()


def test_packed_rows_keep_every_token(packed):
    _, trainer, seen = packed
    for batches in by_step(seen, "input_ids").values():
        tokens = sum(int((batch != trainer.processing_class.pad_token_id).sum()) for batch in batches)
        assert tokens > 0.9 * 8 * 32 - 8 * 32 / 4  # each text of at least 4 tokens begins with one that is also padding


def test_rows_without_packing_have_the_length_of_the_step(unpacked):
    trainer, seen = unpacked
    plan = trainer.plan
    widths = {step: {batch.shape[1] for batch in batches} for step, batches in by_step(seen, "input_ids").items()}
    assert widths == {step: {plan.seqlen(step)} for step in range(1, plan.steps + 1)}
    rows = [sum(len(batch) for batch in batches) for batches in by_step(seen, "input_ids").values()]
    assert rows == [8] * plan.steps
    calls = [len(batches) for batches in by_step(seen, "input_ids").values()]
    assert calls[0] == 1  # balanced: 8 rows of 8 tokens in one micro-batch, as many tokens as 2 of 32
    assert calls[-1] == 4


@pytest.mark.parametrize("kind", ["packed", "unpacked"])
def test_the_rate_follows_the_consumed_tokens(kind, request):
    trainer = request.getfixturevalue(kind)[-2]
    plan = trainer.plan
    assert trainer.state.global_step == plan.steps == trainer.state.max_steps
    assert rates(trainer) == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]


@pytest.mark.parametrize("kind", ["packed", "unpacked"])
def test_evaluation_is_at_full_length(kind, request):
    trainer, seen = request.getfixturevalue(kind)[-2:]
    evaluated = {}
    for trains, step, batch in seen:
        if not trains:
            evaluated.setdefault(step, []).append(batch["input_ids"].tolist())
    assert len(evaluated) > 1
    assert trainer.plan.seqlen(min(evaluated)) < 32
    first, *others = evaluated.values()
    assert all(batches == first for batches in others)
    assert max(len(row) for batch in first for row in batch) >= 32


def test_resume_mid_warmup_is_bit_identical(folder, packed, tmp_path):
    import torch

    configuration, whole, seen = packed
    checkpoint = str(Path(configuration["output_dir"]) / "checkpoint-8")
    again = {**configuration, "output_dir": str(tmp_path), "resume_from_checkpoint": checkpoint}
    resumed, seen_again = train(folder, again, pytest.MonkeyPatch())
    assert whole.plan.seqlen(8) < 32
    before, after = by_step(seen, "input_ids"), by_step(seen_again, "input_ids")
    assert list(after) == list(range(9, whole.plan.steps + 1))
    for step, batches in after.items():
        assert all(torch.equal(old, new) for old, new in zip(before[step], batches, strict=True))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sequence_len": 64}, "sequence_len: 64 in Axolotl's configuration, but the warmup ends at 32"),
        ({"max_steps": 5}, "max_steps: 5 in Axolotl's configuration"),
        ({"warmup_steps": 3}, "warmup_steps: 3 contradicts the file's scheduler"),
        ({"lr_scheduler": "rex"}, "lr_scheduler: .*rex.* contradicts the file's scheduler"),
        ({"micro_batch_size": 1}, "train_batch_size: 8 in the file, but the trainer has 4"),
        ({"learning_rate": 1e-3}, "optimizer.params.lr: 0.005 in the file, but the trainer has 0.001"),
        ({"sample_packing": True}, 'curriculum_learning.method: .*set "window"'),
        ({"group_by_length": True}, "train_sampling_strategy: 'group_by_length'"),
    ],
)
def test_contradictions_with_the_plan_are_errors_before_training(folder, run, tmp_path, changes, named):
    from seqlen_curriculum.errors import ConfigError

    with pytest.raises(ConfigError, match=named):
        train(folder, {**settings(folder, tmp_path, run, False), **changes}, pytest.MonkeyPatch())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rl": "dpo"}, "rl: 'dpo' is not available"),
        ({"context_parallel_size": 2}, "context_parallel_size: 2"),
        ({"sample_packing": True, "attn_implementation": "fp8"}, "attn_implementation: 'fp8'"),
    ],
)
def test_batches_that_cannot_be_shortened_are_refused_before_data_is_prepared(changes, named):
    from axolotl.utils.dict import DictDefault

    from seqlen_curriculum.errors import ConfigError
    from seqlen_curriculum.integrations.axolotl import SequenceLengthWarmupPlugin

    with pytest.raises(ConfigError, match=named):
        SequenceLengthWarmupPlugin().load_datasets(DictDefault(changes))


def test_the_plugin_needs_its_key(folder, run, tmp_path):
    with pytest.raises(ValueError, match="sequence_length_warmup: required by SequenceLengthWarmupPlugin"):
        train(folder, settings(folder, tmp_path, None, False), pytest.MonkeyPatch())
