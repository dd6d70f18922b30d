"""TRL's SFTTrainer with a warmup: packing "bfd" (padding-free), "wrapped" and none, by the batches that it trains on."""

import pytest
import torch
from helpers.settings import changed

pytest.importorskip("trl")

from datasets import Dataset
from helpers.hf import rates, tiny_llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.integrations.transformers import warm_up


class Recorded(SFTTrainer):
    """Keeps the micro-batches that it trains on, by step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.trained = [*getattr(self, "trained", []), (self.state.global_step + 1, inputs, int(num_items_in_batch))]
        return super().training_step(model, inputs, num_items_in_batch)


def documents(count=600):
    """Token ids of documents of 3 to 59 tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 60, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(256, (size,), generator=generator).tolist()} for size in sizes]


@pytest.fixture
def tokenizer():
    vocabulary = {**{chr(number): number for number in range(256)}, "<|endoftext|>": 256}
    model = models.WordLevel(vocabulary, unk_token="<|endoftext|>")
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token=end, pad_token=end)


@pytest.fixture
def sft(tiny_run, tokenizer, tmp_path):
    """A warmed up SFTTrainer on these settings, and its run."""

    def make(method="truncate", **settings):
        run = changed(tiny_run, data=None, model=None, training__train_tokens=4000, curriculum_learning__method=method)
        args = SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            learning_rate=5e-3,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            max_length=32,
            activation_checkpointing=False,
            **settings,
        )
        trainer = Recorded(
            model=tiny_llama(), args=args, train_dataset=Dataset.from_list(documents()), processing_class=tokenizer
        )
        return warm_up(trainer, run)

    return make


@pytest.mark.parametrize("settings", [{"packing": True, "packing_strategy": "wrapped"}, {"packing": False}])
def test_rows_are_cut_to_the_step(sft, settings):
    trainer = sft(**settings)
    trainer.train()
    plan = trainer.plan
    assert trainer.state.global_step == plan.steps
    for step, inputs, items in trainer.trained:
        assert inputs["input_ids"].shape[1] <= plan.seqlen(step)
        assert inputs["shift_labels"].shape == inputs["input_ids"].shape
        assert items <= 8 * plan.seqlen(step)
    longest = {
        step: max(len(row) for at, inputs, _ in trainer.trained if at == step for row in inputs["input_ids"])
        for step in range(1, plan.steps + 1)
    }
    assert longest == {step: plan.seqlen(step) for step in range(1, plan.steps + 1)}
    assert rates(trainer) == [plan.learning_rate(step) for step in range(1, plan.steps + 1)]


def test_padding_free_packing_keeps_every_token(sft):
    trainer = sft(method="window", packing=True, packing_strategy="bfd")
    trainer.train()
    plan = trainer.plan
    assert trainer.state.global_step == plan.steps
    for step, inputs, _ in trainer.trained:
        positions = inputs["position_ids"][0]
        assert int(positions.max()) < plan.seqlen(step)
        starts = (positions == 0).nonzero().flatten().tolist()
        pieces = [positions[start:end] for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]
        assert all(piece.tolist() == list(range(len(piece))) for piece in pieces)
    tokens = [sum(inputs["input_ids"].numel() for at, inputs, _ in trainer.trained if at == step) for step in (1, 10)]
    assert min(tokens) > 0.9 * 8 * 32  # rows stay full: nothing is cut off at short lengths


def test_padding_free_packing_needs_the_method_that_counts_its_tokens(sft):
    with pytest.raises(ConfigError, match=r'curriculum_learning.method: .*set "window"'):
        sft(method="truncate", packing=True, packing_strategy="bfd")
    with pytest.raises(ConfigError, match='"window" needs padding-free batches'):
        sft(method="window", packing=False)
