"""A tiny language model that records its batches, and a Trainer of Lightning, for the tests of its integration."""

import lightning as L
import torch
from torch.nn import Embedding, Linear
from torch.nn.functional import cross_entropy

from seqlen_curriculum.integrations.lightning import RunDataModule, SequenceLengthWarmup


class TinyModule(L.LightningModule):
    """Predicts the next token from the mean of all tokens so far; batches are dicts, pairs, or a tensor of inputs."""

    def __init__(self, optimizer=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = Embedding(257, 16), Linear(16, 257)
        self.optimizer = optimizer or (lambda module: torch.optim.AdamW(module.parameters(), lr=5e-3))
        self.rows, self.evaluated, self.losses, self.rates = [], [], [], []

    def loss(self, batch):
        """Return the input ids of a batch and its mean loss."""
        if isinstance(batch, torch.Tensor):
            batch = batch, batch
        inputs, targets = (batch["input_ids"], batch["labels"]) if isinstance(batch, dict) else batch
        counts = torch.arange(1, inputs.shape[1] + 1, device=inputs.device)
        logits = self.head(self.embed(inputs).cumsum(1) / counts[:, None])
        return inputs, cross_entropy(logits.flatten(0, 1), targets.flatten())

    def training_step(self, batch, batch_idx):  # noqa: ARG002 - Lightning's signature
        inputs, loss = self.loss(batch)
        self.rows.append(inputs.tolist())
        self.losses.append(loss.item())
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch, batch_idx):  # noqa: ARG002 - Lightning's signature
        inputs, loss = self.loss(batch)
        self.evaluated += inputs.tolist()
        self.log("valid_loss", loss)

    def configure_optimizers(self):
        return self.optimizer(self)


def make_trainer(folder, *callbacks, **changes):
    """Return a Trainer whose steps have 4 batches."""
    defaults = {
        "default_root_dir": str(folder),
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "accumulate_grad_batches": 4,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **changes})


def checkpoints(folder):
    """Return a callback that keeps ``step=10.ckpt``."""
    return L.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)


def fit(run, folder, *callbacks, module=None, data=None, valid=None, options=None, resume=None, warmup=None, **changes):
    """Train the rows of the run, or those of the loader ``data``; return the module and the callback."""
    module, warmup = module or TinyModule(), warmup or SequenceLengthWarmup(run, global_batch=8)
    own = {"train_dataloaders": data, "val_dataloaders": valid}
    data = {"datamodule": RunDataModule(warmup.plan, **(options or {}))} if data is None else own
    saves = any(isinstance(callback, L.pytorch.callbacks.ModelCheckpoint) for callback in callbacks)
    trainer = make_trainer(folder, warmup, *callbacks, enable_checkpointing=saves, **changes)
    trainer.fit(module, **data, ckpt_path=resume)
    return module, warmup


def by_step(batches, steps, first=1):
    """Return the rows of each step, sorted; the batches are those of whole steps, each with as many."""
    count, rest = divmod(len(batches), steps - first + 1)
    assert rest == 0
    return [
        sorted(row for batch in batches[start : start + count] for row in batch)
        for start in range(0, len(batches), count)
    ]
