"""Sequence length warmup in PyTorch Lightning, on a corpus of slw prepare.

Run:  slw prepare --stdlib --train-vocab 512 --out corpus/stdlib
      python examples/lightning_module.py        (on two ranks: torchrun --nproc_per_node 2 examples/lightning_module.py)
"""

import os
import sys
from pathlib import Path

import lightning as L
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seqlen_curriculum.integrations.lightning import RunDataModule, SequenceLengthWarmup

RUN = Path(__file__).with_name("run.json")
ACCUMULATION = 4


class LanguageModel(L.LightningModule):
    """A small Llama. It sets no rate but the highest one: the warmup sets that of every step."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=64, **sizes))

    def training_step(self, batch):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch):
        self.log("valid_loss", self.model(**batch).loss, prog_bar=True, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(run=RUN, **settings):
    """Train and return the trainer and the warmup."""
    L.seed_everything(0)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    warmup = SequenceLengthWarmup(run, global_batch=4 * ACCUMULATION * ranks, max_lr=3e-3)
    trainer = L.Trainer(
        callbacks=[warmup], devices=ranks, max_epochs=-1, accumulate_grad_batches=ACCUMULATION, **settings
    )
    # The rows that train_gpt2.py reads, each at the length of its step. A loader of your own works too: rows of full
    # length, which the callback cuts.
    trainer.fit(LanguageModel(), datamodule=RunDataModule(warmup.plan))
    return trainer, warmup


if __name__ == "__main__":
    main(*sys.argv[1:])
