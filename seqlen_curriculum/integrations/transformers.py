"""Sequence length warmup in Hugging Face's ``Trainer`` and its subclasses, such as TRL's.

An existing script adds ``trainer = warm_up(trainer, "run.json")``. The trainer's own loop, data and optimizer stay. Each
optimizer step has one length on all ranks, its batches are cut where the loop takes them (behind workers and prefetching),
and evaluations are at full length. ``max_steps`` is the run's number of steps, and a token-wise ``scheduler`` of the file
sets the rate of every step from its consumed tokens. A checkpoint keeps the schedule, and resuming it with another one is
refused.

Padding-free batches (TRL's BFD packing, ``DataCollatorWithFlattening``) keep every token: their documents are cut into
pieces of the step's length. They need ``method: "window"``, under which all tokens of a row count.

With ``RunRows`` as ``train_dataset`` every step reads the rows that ``train_gpt2.py`` reads, leftovers included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from seqlen_curriculum.batch import set_batch_sequence_length
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunRows
from seqlen_curriculum.integrations.trainer_checks import is_padding_free, rows_problems, trainer_problems
from seqlen_curriculum.schedule.micro_batch import balanced_rows
from seqlen_curriculum.training.lr_scheduler import TokenLR

__all__ = ["SequenceLengthWarmupMixin", "SequenceLengthWarmupState", "SequenceLengthWarmupTrainer", "warm_up"]

Curriculum = str | Path | Mapping[str, Any]
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


class SequenceLengthWarmupState(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps the schedule in the trainer's checkpoints (``trainer_state.json``)."""

    def __init__(self) -> None:
        self.plan: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return {"args": {}, "attributes": {"plan": self.plan}}


class SequenceLengthWarmupMixin:
    """Put before a ``Trainer`` class: ``class MyTrainer(SequenceLengthWarmupMixin, Trainer)``.

    ``curriculum`` is a file with our sections, or its content. ``balance`` gives the micro-batches of short steps more rows
    of the same step, so that each has about as many tokens as at full length. None selects this if the gradient stays the
    same: not under DeepSpeed, and only if the model's loss takes ``num_items_in_batch``.
    """

    def __init__(self, *args: Any, curriculum: Curriculum, balance: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_up_warmup(curriculum, balance)

    def set_up_warmup(self: Any, curriculum: Curriculum, balance: bool | None = None) -> None:
        """Plan the run and set ``args.max_steps``. Raises ConfigError with all that contradicts the plan."""
        self._padding_free = is_padding_free(self)
        can_balance = self.model_accepts_loss_kwargs and not self.is_deepspeed_enabled
        problems = list(trainer_problems(self))
        if balance and not can_balance:
            problems.append(
                "balance: not available under DeepSpeed, which counts micro-batches itself, or with a model whose loss "
                "takes no num_items_in_batch; leave it out"
            )
        try:
            self.plan = TrainerPlan.of(
                curriculum,
                global_batch=self.get_total_train_batch_size(self.args),
                max_lr=self.args.learning_rate,
                padding_free=self._padding_free,
            )
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems], error.where) from None
        problems += rows_problems(self.train_dataset, self.plan)
        if problems:
            raise ConfigError(problems)
        self.args.max_steps = self.plan.steps
        self.balances = can_balance if balance is None else balance
        self._held: list[dict[str, Any]] = []
        self._checked_state: Any = None
        self._state_callback = SequenceLengthWarmupState()
        self._state_callback.plan = self.plan.state()
        self.add_callback(self._state_callback)

    def get_batch_samples(
        self: Any, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of the coming step, cut to its length, and their number of target tokens."""
        step = self.state.global_step + 1
        self._check_checkpoint()
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # Accelerate wraps it
        if isinstance(scheduler, TokenLR):
            scheduler.seek(step)
        # The step's rows and target tokens are counted after the cut: each token weighs 1 / counted tokens.
        batches = (self._cut(batch, step) for batch in epoch_iterator)
        samples, items = super().get_batch_samples(batches, num_batches, device)  # type: ignore[misc]
        if len(samples) != self.args.gradient_accumulation_steps:
            raise DataError(
                f"step {step}: has {len(samples)} of {self.args.gradient_accumulation_steps} micro-batches, because an "
                "epoch of train_dataset ends there; make its length a multiple of the global batch, or use RunRows"
            )
        self._held = []
        return samples, items

    def _cut(self: Any, batch: Any, step: int) -> Any:
        seqlen = self.plan.seqlen(step)
        if isinstance(self.train_dataset, RunRows):
            tokens = batch["input_ids"].shape[-1]
            if tokens != seqlen:
                raise DataError(
                    f"step {step}: read rows of {tokens} tokens instead of {seqlen}, which belong to another step; RunRows "
                    "must be read in its order, so remove what shuffles or skips its items"
                )
            return batch
        # With shift_labels a row of s tokens has s targets; a model that shifts labels itself would train s - 1 of them.
        shifts = self.model_accepts_loss_kwargs and isinstance(batch, Mapping) and "labels" in batch
        return set_batch_sequence_length(
            batch,
            seqlen,
            truncate=self.plan.config.shortening.method != "segment",
            labels_shifted=False,
            emit_shift_labels=shifts and not self._padding_free,
            padding_free=self._padding_free,
            count_targets=False,
        )[0]

    def _check_checkpoint(self: Any) -> None:
        """Raise CheckpointError if the state was loaded from a checkpoint of another schedule."""
        if self._checked_state is self.state:
            return
        self._checked_state = self.state
        if self.state.global_step == 0:
            return
        stored = self.state.stateful_callbacks.get(SequenceLengthWarmupState.__name__)
        saved = (stored[0] if isinstance(stored, list) else stored or {}).get("attributes", {}).get("plan")
        if not saved:
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} was made without a sequence length warmup; start a new run"
            )
        self.plan.check(saved, self.state.global_step)

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the file's token-wise ``scheduler``, else the trainer's own scheduler."""
        if self.lr_scheduler is None and self.plan.learning_rate is not None:
            optimizer = self.optimizer if optimizer is None else optimizer
            while not isinstance(optimizer, torch.optim.Optimizer):  # Accelerate and DeepSpeed wrap it
                optimizer = optimizer.optimizer
            self.lr_scheduler = TokenLR(optimizer, self.plan.learning_rate)
            self._created_lr_scheduler = True
            return self.lr_scheduler
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, RunRows):
            return SequentialSampler(dataset)  # its items know their step: never shuffled
        sampler: Any = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        if sampler is None:
            return None
        if isinstance(sampler, BatchSampler):  # Axolotl's packed batches
            return _WholeStepsOfBatches(sampler, self.args.gradient_accumulation_steps * self.args.world_size)
        if type(sampler) is RandomSampler and not sampler.replacement:
            # Of this class Accelerate makes one that has the same order on all ranks, and the same again after a resume.
            whole = len(sampler) // self.plan.global_batch * self.plan.global_batch
            return RandomSampler(sampler.data_source, num_samples=whole, generator=sampler.generator)
        return _WholeSteps(sampler, self.plan.global_batch)

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        # Models take it as a keyword of their loss, which their forward doesn't name: it would be dropped as unused.
        if "shift_labels" not in self._signature_columns:
            self._signature_columns.append("shift_labels")

    def training_step(self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run forward and backward; a balanced step's first calls only collect rows, and its last call runs them all."""
        if not self.balances or num_items_in_batch is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc,no-any-return]
        self._held.append(dict(inputs))
        if len(self._held) < self.args.gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        micro_batches = self._balanced(self._held)
        self._held = []
        total = torch.zeros((), device=self.args.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                total += super().training_step(model, micro_batch, num_items_in_batch)  # type: ignore[misc]
        return total

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the trainer's loss. A compiled model gets inputs whose rows and tokens are dynamic sizes."""
        if _is_compiled(self.args, self.model):
            # Otherwise torch compiles the first length, a second one, and with balanced micro-batches the first change of
            # their rows: three graphs instead of one for all lengths. It specializes a single row.
            for value in inputs.values():
                if isinstance(value, Tensor):
                    for axis in range(value.ndim):
                        torch._dynamo.maybe_mark_dynamic(value, axis)
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _balanced(self: Any, held: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows of ``held`` in fewer micro-batches; as they are where a value isn't one row per sample."""
        rows = [len(batch["input_ids"]) for batch in held]
        for batch, count in zip(held, rows, strict=True):
            if not all(isinstance(value, Tensor) and len(value) == count for value in batch.values()):
                return held
        if len({tuple(value.shape[1:]) for batch in held for value in [batch["input_ids"]]}) > 1:
            return held
        whole = {key: torch.cat([batch[key] for batch in held]) for key in held[0]}
        seqlen = whole["input_ids"].shape[1]
        # Not rows[0]: under segment a short micro-batch already has more rows.
        count = balanced_rows(sum(rows), self.args.per_device_train_batch_size, self.plan.full_length, seqlen)
        return [
            {key: value[start : start + count] for key, value in whole.items()} for start in range(0, sum(rows), count)
        ]


class SequenceLengthWarmupTrainer(SequenceLengthWarmupMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with a sequence length warmup: its arguments, and those of ``SequenceLengthWarmupMixin``."""


def warm_up(trainer: AnyTrainer, curriculum: Curriculum, balance: bool | None = None) -> AnyTrainer:
    """Give a ready ``trainer``, also one of a subclass such as TRL's ``SFTTrainer``, a sequence length warmup; return it.

    Arguments as in ``SequenceLengthWarmupMixin``. Raises ConfigError.
    """
    # A new class, no patched methods: under DeepSpeed Hugging Face copies the trainer, and patches would keep the old one.
    base = type(trainer)
    trainer.__class__ = type(base.__name__, (SequenceLengthWarmupMixin, base), {})
    trainer.set_up_warmup(curriculum, balance)
    return trainer


class _WholeSteps(Sampler[Any]):
    """The items of another sampler without those at the end that fill no whole optimizer step."""

    def __init__(self, sampler: Any, items_per_step: int) -> None:
        self._sampler, self._items_per_step = sampler, items_per_step

    def __len__(self) -> int:
        return len(self._sampler) // self._items_per_step * self._items_per_step

    def __iter__(self) -> Iterator[Any]:
        for _, index in zip(range(len(self)), self._sampler, strict=False):
            yield index

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to a sampler that shuffles by it."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)


class _WholeStepsOfBatches(_WholeSteps, BatchSampler):
    """The micro-batches of another batch sampler without those at the end that fill no whole optimizer step."""

    def __init__(self, batches: BatchSampler, micro_batches: int) -> None:
        _WholeSteps.__init__(self, batches, micro_batches)
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last

    @property
    def sampler(self) -> Any:
        """The items' sampler, which Accelerate may replace."""
        return self._sampler.sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self._sampler.sampler = sampler


def _is_compiled(args: Any, model: Any) -> bool:
    """Return whether ``args.torch_compile``, ``model.compile()`` or ``torch.compile(model)`` was used."""
    return bool(args.torch_compile or getattr(model, "_compiled_call_impl", None) or hasattr(model, "_orig_mod"))
