"""A tiny Llama that records its batches, and Hugging Face's arguments, for the tests of the Trainer."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from seqlen_curriculum.data.from_config import open_training_data


class Llama(LlamaForCausalLM):
    """Records the rows it is given, and whether it trains on them."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def forward(self, input_ids=None, labels=None, **options):
        self.seen.append((self.training, input_ids.clone()))
        return super().forward(input_ids=input_ids, labels=labels, **options)


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Llama(LlamaConfig(vocab_size=257, max_position_embeddings=32, **sizes))


def settings(folder):
    """Return settings of a Trainer, or of a subclass, whose steps have 8 rows on one rank."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 5e-3,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def arguments(folder, **changes):
    return TrainingArguments(**{**settings(folder), **changes})


def expected_rows(plan, first=1):
    """The rows of each step as train_gpt2.py reads them, sorted."""
    data = open_training_data(plan.config)
    return [sorted(data.read(step)[0].astype(np.int64).tolist()) for step in range(first, plan.steps + 1)]


def rates(trainer):
    """The learning rate of each step, as the Trainer logged it."""
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def losses(trainer):
    """The loss of each step, as the Trainer logged it."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
