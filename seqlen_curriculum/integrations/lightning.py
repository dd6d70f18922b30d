"""Sequence length warmup in PyTorch Lightning: a callback for your own data, and a data module with that of ``slw train``.

``Trainer(callbacks=[SequenceLengthWarmup("run.json", global_batch=64)])`` is all that a script needs. The module, its
optimizer and its data stay. Every optimizer step has one length on all ranks: batches are cut where the loop takes them,
behind workers and prefetching. Evaluation stays at full length. The rate of each step is that of the file's
token-wise ``scheduler``. Training stops at the token budget. A checkpoint keeps the schedule and can't be resumed with
another.

``RunDataModule`` reads the rows that ``train_gpt2.py`` reads, leftovers included. It resumes in the middle of an epoch, also
on another number of ranks.

Works with the package ``lightning`` and with ``pytorch_lightning``, whichever the script has imported first.

Shapes: B rows of a micro-batch, s the step's seqlen, S the full length.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from seqlen_curriculum.batch import iter_tensors, set_batch_sequence_length
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError
from seqlen_curriculum.integrations.lightning_checks import (
    data_problems,
    data_ranks,
    rate_problems,
    recount_batches,
    trainer_problems,
)
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import EvaluationRows, RunLoader, RunRows
from seqlen_curriculum.training.lr_scheduler import TokenLR

__all__ = ["RunDataModule", "SequenceLengthWarmup"]

# Both packages have classes of their own, and neither trainer takes a callback of the other.
_IMPORTED_OLD_NAME = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
pl: Any = import_module(
    "pytorch_lightning" if _IMPORTED_OLD_NAME or find_spec("lightning") is None else "lightning.pytorch"
)


class SequenceLengthWarmup(pl.Callback):  # type: ignore[misc]
    """Gives every optimizer step of a ``Trainer`` its sequence length and its rate.

    ``curriculum`` is a file with our sections, or its content. ``global_batch`` is the number of rows per optimizer step:
    those of a batch x ``accumulate_grad_batches`` x ranks. ``max_lr`` is the rate of the module's optimizer, if the file has
    a token-wise ``scheduler`` but no ``optimizer.params.lr``.

    Batches are tensors, or any nesting of dicts and tuples, that hold rows of S tokens with shifted labels. If the model
    shifts the labels by itself, as those of Hugging Face do, ``emit_shift_labels=True`` adds ``shift_labels``: without them
    a row of s tokens trains s - 1 targets.

    ``accumulate_grad_batches`` is required under manual optimization, where the trainer's own setting is always 1. Each
    optimizer must step once in that many batches.

    Raises ConfigError here, or when the fit starts, for what contradicts the plan.
    """

    def __init__(
        self,
        curriculum: str | Path | Mapping[str, Any],
        *,
        global_batch: int,
        max_lr: float | None = None,
        emit_shift_labels: bool = False,
        accumulate_grad_batches: int | None = None,
    ) -> None:
        self.plan = TrainerPlan.of(curriculum, global_batch=global_batch, max_lr=max_lr)
        """The run, also for ``RunDataModule``."""
        self.step = 0
        """The optimizer step of the latest training batch, 1-based; 0 before the first one."""
        self._emit_shift_labels = emit_shift_labels
        self._given_accumulation = accumulate_grad_batches
        self._accumulation = self._optimizers = 1
        self._limits_steps = False
        self._schedulers: list[TokenLR] = []
        self._hooked: Any = None

    @property
    def seqlen(self) -> int:
        """Return the sequence length of ``step``, in tokens."""
        return self.plan.seqlen(max(self.step, 1))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002 - Lightning's signature
        """Set the trainer's ``max_steps``, which ``configure_optimizers`` may read."""
        if stage == "fit" and trainer.max_steps == -1:
            trainer.fit_loop.epoch_loop.max_steps = self.plan.steps
            self._limits_steps = True

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Raise CheckpointError for a checkpoint of another schedule; count its batches in those of this trainer."""
        if trainer.state.fn != "fit":
            return
        saved = checkpoint["callbacks"].get(self.state_key)
        if not saved:
            raise CheckpointError("the checkpoint was made without a sequence length warmup; start a new run")
        self.plan.check(saved["plan"], checkpoint["global_step"] // saved["optimizers"])
        recount_batches(checkpoint, saved["accumulate_grad_batches"], self.batches_per_step(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores: the schedule, and what it takes to count its steps."""
        return {
            "plan": self.plan.state(),
            "optimizers": self._optimizers,
            "accumulate_grad_batches": self._accumulation,
        }

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the trainer and its optimizers, and hook into the module."""
        # Lightning's global_step counts the steps of all optimizers: with two, the third step begins at 4.
        self._optimizers = max(len(trainer.optimizers), 1)
        self._accumulation = self.batches_per_step(trainer)
        last_step = self.plan.steps * self._optimizers
        if self._limits_steps:
            trainer.fit_loop.epoch_loop.max_steps = last_step
        problems = [
            *trainer_problems(trainer, pl_module, self._given_accumulation, last_step),
            *rate_problems(trainer, self.plan),
        ]
        if problems:
            raise ConfigError(problems)
        own = [config.scheduler for config in trainer.lr_scheduler_configs]
        if not own and self.plan.learning_rate is not None:
            own = [TokenLR(optimizer, self.plan.learning_rate) for optimizer in trainer.optimizers]
        self._schedulers = [scheduler for scheduler in own if isinstance(scheduler, TokenLR)]
        self._hook(trainer, pl_module)

    def batches_per_step(self, trainer: Any) -> int:
        """Return how many batches of a rank an optimizer step has."""
        return self._given_accumulation or int(trainer.accumulate_grad_batches)

    def _hook(self, trainer: Any, pl_module: Any) -> None:
        """Put ``begin_batch`` behind ``on_before_batch_transfer``, which the loop calls with each batch that it takes."""
        self._unhook()
        # Lightning calls the module's hook, unless only the data module overrides it, or both do.
        owner, datamodule = pl_module, trainer.datamodule
        if datamodule is not None and (_overrides(datamodule) or not _overrides(pl_module)):
            owner = datamodule
        owner.on_before_batch_transfer = partial(_before_batch_transfer, self, trainer, owner.on_before_batch_transfer)
        self._hooked = owner

    def _unhook(self) -> None:
        if self._hooked is not None:
            del self._hooked.on_before_batch_transfer
        self._hooked = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002 - Lightning's signature
        """Raise ConfigError if the training data contradicts the plan."""
        problems = list(data_problems(trainer, self.plan, self._accumulation, self._optimizers))
        if problems:
            raise ConfigError(problems)

    def begin_batch(self, trainer: Any, batch: Any) -> Any:
        """Set the rate of the coming batch's step, and return the batch at its length."""
        self.step = trainer.global_step // self._optimizers + 1
        for scheduler in self._schedulers:
            scheduler.seek(self.step)
        if isinstance(trainer.train_dataloader, RunLoader):
            return batch
        emit, shortening = self._emit_shift_labels, self.plan.config.shortening
        cut = set_batch_sequence_length(
            batch,
            self.seqlen,
            truncate=shortening.method == "truncate",
            labels_shifted=not emit,
            emit_shift_labels=emit,
            count_targets=False,
        )[0]
        micro_batch = self.plan.global_batch // (self.batches_per_step(trainer) * data_ranks(trainer)[1])
        expected = (micro_batch * shortening.rows_per_sample(self.seqlen), self.seqlen)
        found = {tuple(tensor.shape[:2]) for _, tensor in iter_tensors(cut) if tensor.ndim > 1}
        if expected not in found:
            raise DataError(
                f"step {self.step}: {expected[0]} rows of {expected[1]} tokens are due in a batch, but it has "
                f"{', '.join(f'{rows} x {tokens}' for rows, tokens in sorted(found))}; give rows of {self.plan.full_length} "
                "tokens without packing, and drop the last batch of an epoch if it is smaller"
            )
        return cut

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Check that the optimizers step once per optimizer step; log ``seqlen`` and ``consumed_tokens``."""
        is_last = (batch_idx + 1) % self._accumulation == 0
        if trainer.global_step != (self.step - (not is_last)) * self._optimizers:
            raise DataError(
                f"step {self.step}: {trainer.global_step} steps of {self._optimizers} optimizers after batch {batch_idx} of "
                f"the epoch; let each of them step once in {self._accumulation} batches (accumulate_grad_batches)"
            )
        if is_last and self.step % trainer.log_every_n_steps == 0:
            metrics = {"seqlen": self.seqlen, "consumed_tokens": self.plan.consumed_tokens(self.step)}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=self.step - 1)  # Lightning logs its own from 0

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002 - Lightning's signature
        """Remove the hook."""
        self._unhook()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Remove the hook."""
        self._unhook()


def _overrides(owner: Any) -> bool:
    base = pl.LightningModule if isinstance(owner, pl.LightningModule) else pl.LightningDataModule
    return type(owner).on_before_batch_transfer is not base.on_before_batch_transfer


def _before_batch_transfer(
    callback: SequenceLengthWarmup, trainer: Any, hook: Any, batch: Any, dataloader_idx: int
) -> Any:
    """Call the user's own hook, then shorten a training batch; evaluation stays at full length."""
    batch = hook(batch, dataloader_idx)
    return callback.begin_batch(trainer, batch) if trainer.training else batch


class RunDataModule(pl.LightningDataModule):  # type: ignore[misc]
    """The data of a run: ``trainer.fit(module, datamodule=RunDataModule(warmup.plan, num_workers=4))``.

    Batches of ``RunRows``: dicts of ``input_ids``, ``labels`` (already shifted) and ``shift_labels``, (B, s) int64. The
    validation batches are ``training.eval_rows`` rows at full length. On several ranks Lightning repeats some of them if
    the ranks don't divide their number. The rows of a micro-batch follow from the global batch,
    ``accumulate_grad_batches`` and the ranks. One epoch is the whole run.

    ``options`` go to both ``DataLoader``. Raises ConfigError without a ``data`` section, DataError.
    """

    def __init__(self, plan: TrainerPlan, **options: Any) -> None:
        super().__init__()
        self._options = options
        self._rows = RunRows(plan)

    @property
    def micro_batch(self) -> int:
        """Return the rows of a batch on one rank. Raises ConfigError if the global batch can't be divided evenly."""
        warmups = [callback for callback in self.trainer.callbacks if isinstance(callback, SequenceLengthWarmup)]
        accumulation = warmups[0].batches_per_step(self.trainer) if warmups else self.trainer.accumulate_grad_batches
        ranks = data_ranks(self.trainer)[1]
        rows, rest = divmod(self._rows.plan.global_batch, accumulation * ranks)
        if rest or not rows:
            raise ConfigError(
                f"accumulate_grad_batches: {accumulation} batches on each of {ranks} ranks don't divide the global batch of "
                f"{self._rows.plan.global_batch}; choose a number that does"
            )
        return int(rows)

    def train_dataloader(self) -> RunLoader:
        """Return this rank's micro-batches of the whole run."""
        rank, ranks = data_ranks(self.trainer)
        return RunLoader(self._rows, self.micro_batch, rank=rank, ranks=ranks, **self._options)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation rows at full length. Raises DataError if the validation split has none."""
        rows = EvaluationRows(self._rows.plan)
        return DataLoader(rows, self.micro_batch, collate_fn=RunRows.collate, **self._options)
