"""Runs of MosaicML Composer's Trainer with a tiny Llama, for its tests. Importing this needs Composer."""

import numpy as np
import torch
from composer import Callback, Trainer
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from composer.utils import dist
from transformers import LlamaConfig, LlamaForCausalLM

from seqlen_curriculum.data.from_config import open_training_data
from seqlen_curriculum.integrations.composer import SequenceLengthWarmup
from seqlen_curriculum.integrations.torch_data import RunLoader, RunRows

RATE = 5e-3


class Llama(HuggingFaceModel):
    """A tiny Llama that records the batches it is given, and whether it trains on them."""

    def __init__(self, dropout=0.1):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=257, max_position_embeddings=32, attention_dropout=dropout, **sizes)
        super().__init__(LlamaForCausalLM(config))
        self.seen = []

    def forward(self, batch):
        self.seen.append((self.training, {name: value.clone() for name, value in batch.items()}))
        return super().forward(batch)


class Rates(Callback):
    """Keeps the optimizer's rate of each step."""

    def __init__(self):
        self.rates = []

    def after_train_batch(self, state, logger):  # noqa: ARG002 - Composer's signature
        self.rates.append(state.optimizers[0].param_groups[0]["lr"])


class Fit:
    """A run of the Trainer, and what it logged."""

    def __init__(self, run, *, model=None, loader=None, workers=0, balance=True, lr=RATE, **options):
        self.warmup = SequenceLengthWarmup(run, global_batch=8, max_lr=RATE, balance=balance)
        self.plan = self.warmup.plan
        self.model = model or Llama()
        self.callback, self.log = Rates(), InMemoryLogger()
        if loader is None:
            rank, ranks = dist.get_global_rank(), dist.get_world_size()
            loader = RunLoader(RunRows(self.plan), 8 // ranks, rank=rank, ranks=ranks, num_workers=workers)
        defaults = {
            "train_dataloader": self.warmup.data_spec(loader),
            "max_duration": self.warmup.max_duration,
            "algorithms": [self.warmup],
            "device_train_microbatch_size": 2,
            "optimizers": torch.optim.AdamW(self.model.parameters(), lr=lr),
            "callbacks": [self.callback],
            "loggers": [self.log],
            "progress_bar": False,
            "device": "cpu",
            "save_overwrite": True,
        }
        self.trainer = Trainer(model=self.model, **{**defaults, **options})
        self.trainer.fit()
        self.trainer.close()

    def logged(self, key):
        return [float(value) for _, value in self.log.data[key]]

    def steps(self):
        return self.trainer.state.timestamp.batch.value

    def tokens(self):
        return self.trainer.state.timestamp.token.value

    def micro_batches(self):
        return [batch for trains, batch in self.model.seen if trains]

    def rows_by_step(self):
        """All rows that each optimizer step trained on this rank, in order."""
        share = 8 // dist.get_world_size()
        rows = [row for batch in self.micro_batches() for row in batch["input_ids"].tolist()]
        return [rows[start : start + share] for start in range(0, len(rows), share)]


def expected_rows(plan, first=1):
    """The rows of each step as train_gpt2.py reads them."""
    data = open_training_data(plan.config)
    return [data.read(step)[0].astype(np.int64).tolist() for step in range(first, plan.steps + 1)]


def planned(plan, function, first=1):
    return [function(step) for step in range(first, plan.steps + 1)]
