"""TRL's SFTTrainer with a tiny Llama, and the batches that it trains on, for the tests on one and on two ranks."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from helpers import hf
from helpers.settings import changed
from seqlen_curriculum.integrations.transformers import warm_up


class Recorded(SFTTrainer):
    """Keeps the micro-batches that it trains on, by step, and the lengths that it evaluates."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.trained = [*getattr(self, "trained", []), (self.state.global_step + 1, inputs, int(num_items_in_batch))]
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model, inputs, *args, **options):
        self.evaluated = {*getattr(self, "evaluated", ()), inputs["input_ids"].shape[1]}
        return super().prediction_step(model, inputs, *args, **options)


def documents(count=600):
    """Token ids of documents of 3 to 59 tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 60, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(256, (size,), generator=generator).tolist()} for size in sizes]


def tokenizer():
    """Return a tokenizer of 257 tokens."""
    end = "<|endoftext|>"
    vocabulary = {**{chr(number): number for number in range(256)}, end: 256}
    model = models.WordLevel(vocabulary, unk_token=end)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token=end, pad_token=end)


def sft_run(run, strategy):
    """Return the settings of a run on documents, with the method that the packing needs."""
    return changed(
        run, data=None, model=None, curriculum_learning__method="window" if strategy == "bfd" else "truncate"
    )


def sft_trainer(folder, run, strategy, **settings):
    """Return a warmed up SFTTrainer whose steps have 8 rows on one rank; ``run`` None: without a warmup.

    ``strategy`` is the strategy of packing, or None.
    """
    defaults = {
        **hf.settings(folder),
        "bf16": False,
        "max_length": 32,
        "activation_checkpointing": False,
        "packing": strategy is not None,
        "packing_strategy": strategy or "bfd",
    }
    rows = Dataset.from_list(documents())
    trainer = Recorded(
        model=hf.tiny_llama(),
        args=SFTConfig(**{**defaults, **settings}),
        train_dataset=rows,
        eval_dataset=rows.select(range(16)) if "eval_strategy" in settings else None,
        processing_class=tokenizer(),
    )
    return trainer if run is None else warm_up(trainer, sft_run(run, strategy))
