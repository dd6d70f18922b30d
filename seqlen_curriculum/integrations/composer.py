"""Sequence length warmup in MosaicML Composer, and in llm-foundry, which trains with it.

``SequenceLengthWarmup`` is an algorithm of the ``Trainer``. Batches are cut by the ``DataSpec`` that its ``data_spec``
returns, because Composer counts tokens right after ``DataSpec.batch_transforms``, before the first event of an algorithm.
So ``time/token`` counts the tokens that are trained on. Each batch has the length of its optimizer step on all ranks, and
evaluations, which have a ``DataSpec`` of their own, are at full length.

With ``RunLoader`` as the loader every batch has the rows that ``train_gpt2.py`` reads, leftovers included.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer import Algorithm, DataSpec, Event, Logger, State
from composer.core import TimeUnit
from composer.models import HuggingFaceModel
from composer.utils import dist
from torch import Tensor

from seqlen_curriculum.batch import set_batch_sequence_length
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunLoader, RunRows
from seqlen_curriculum.schedule.micro_batch import balanced_rows
from seqlen_curriculum.training.lr_scheduler import TokenLR

__all__ = ["SequenceLengthWarmup"]

FULL_LENGTH_COUNTS = {"total_tokens", "loss_generating_tokens"}
"""Keys by which llm-foundry's loaders pass on the token counts of full rows. Without them it counts those of the batch."""


class SequenceLengthWarmup(Algorithm):  # type: ignore[misc]
    """Sets the length of every batch, and the rate of every step if the file has a token-wise ``scheduler``.

    The loader goes through ``data_spec``, and ``max_duration`` is the run's:

        warmup = SequenceLengthWarmup("run.json", global_batch=512, max_lr=6e-4)
        Trainer(..., algorithms=[warmup], train_dataloader=warmup.data_spec(loader), max_duration=warmup.max_duration)

    The rate of the file replaces that of the trainer's ``schedulers``. Composer's checkpoints keep the schedule. Resuming
    with another one is refused.

    A ``HuggingFaceModel`` also gets ``shift_labels``, if its model hands keyword arguments to its loss: a row of s tokens
    then trains s targets. Other models that shift their labels train s - 1.
    """

    def __init__(
        self,
        curriculum: str | Path | Mapping[str, Any],
        *,
        global_batch: int,
        max_lr: float | None = None,
        balance: bool = True,
    ) -> None:
        """Plan the run of ``curriculum``, a file with our sections or its content. Raises ConfigError.

        ``global_batch``: rows per optimizer step over all ranks. ``max_lr``: the optimizer's rate, which a token-wise
        ``scheduler`` warms up to. ``balance``: the micro-batches of short steps have more rows, so that each has about as
        many tokens as ``device_train_microbatch_size`` rows have at full length. All micro-batches of a step have the same
        number of rows, so the gradient stays the same up to rounding.
        """
        self.plan = TrainerPlan.of(curriculum, global_batch=global_batch, max_lr=max_lr)
        self._balance = balance
        self._state: State | None = None
        self._loader: Any = None
        self._shifts = False
        self._rates: list[TokenLR] = []
        self._saved: dict[str, Any] | None = None

    @property
    def max_duration(self) -> str:
        """Return the length of the run in batches, such as ``"330000ba"``: the trainer's ``max_duration``."""
        return f"{self.plan.steps}ba"

    def data_spec(self, loader: Any, **options: Any) -> DataSpec:
        """Return the trainer's ``train_dataloader``: batches of ``loader``, each cut to the length of its step.

        ``loader`` gives this rank ``global_batch / ranks`` full-length rows per batch. It may be a ``RunLoader``, whose
        batches have their length already, or a ``DataSpec``, such as llm-foundry's, whose functions are kept. ``options``
        are those of ``DataSpec``. Raises ConfigError.
        """
        spec = loader if isinstance(loader, DataSpec) else DataSpec(loader, **options)
        self._loader = spec.dataloader
        self._check_loader()
        warmed = copy.copy(spec)
        warmed.batch_transforms = lambda batch: self._cut(spec, spec.batch_transforms(batch))
        if self._balance:
            warmed.split_batch = lambda batch, rows: spec.split_batch(batch, self._balanced(spec, batch, rows))
        return warmed

    def match(self, event: Event, state: State) -> bool:  # noqa: ARG002 - Composer's signature
        """Run at the start, after a checkpoint is loaded, and before every step."""
        return event in (Event.INIT, Event.AFTER_LOAD, Event.FIT_START, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Check the run, or set the rates of the coming step. Raises ConfigError, CheckpointError."""
        if event == Event.INIT:
            self._state = state
            self._shifts = _let_through_shift_labels(state.model)
        elif event == Event.AFTER_LOAD:
            self._check_checkpoint(state.timestamp.batch.value)
        elif event == Event.FIT_START:
            self._check_trainer(state)
            self._rates = self._make_rates(state)
        else:
            self._start_step(logger)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return {**super().state_dict(), "plan": self.plan.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the checkpoint's schedule until its step is loaded too."""
        self._saved = state.get("plan")

    def _step(self) -> int:
        """Return the step that is about to start or running, from 1."""
        if self._state is None:
            raise ConfigError("algorithms: has no SequenceLengthWarmup; give the Trainer algorithms=[warmup]")
        return int(self._state.timestamp.batch.value) + 1

    def _cut(self, spec: DataSpec, batch: Any) -> Any:
        step = self._step()
        if isinstance(self._loader, RunLoader):
            self._check_position(step)
            # Composer's metrics of a HuggingFaceModel shift labels too; the targets are in shift_labels.
            return {**batch, "labels": batch["input_ids"].clone()} if self._shifts else batch
        rows = spec.get_num_samples_in_batch(batch)
        ranks = dist.get_world_size()
        if rows * ranks != self.plan.global_batch:
            raise DataError(
                f"step {step}: this rank's batch has {rows} rows, but {self.plan.global_batch} over {ranks} ranks are "
                f"{self.plan.global_batch / ranks:g}; give the loader that batch_size, and drop_last=True"
            )
        if isinstance(batch, Mapping) and batch.keys() & FULL_LENGTH_COUNTS:
            batch = {name: value for name, value in batch.items() if name not in FULL_LENGTH_COUNTS}
        return set_batch_sequence_length(
            batch,
            self.plan.seqlen(step),
            truncate=self.plan.config.shortening.method != "segment",
            labels_shifted=False,
            emit_shift_labels=self._shifts and isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor),
            padding_free=False,
            count_targets=False,
        )[0]

    def _balanced(self, spec: DataSpec, batch: Any, rows: int | float) -> int | float:
        """Return the rows of a micro-batch at the step's length, for ``rows`` at full length."""
        whole = spec.get_num_samples_in_batch(batch)
        if isinstance(rows, float) or isinstance(whole, float):  # parts of rows, under sequence parallelism
            return rows
        return balanced_rows(whole, rows, self.plan.full_length, self.plan.seqlen(self._step()))

    def _make_rates(self, state: State) -> list[TokenLR]:
        """Return the schedulers of the optimizers' rates. Raises ConfigError for another rate than ``max_lr``."""
        rate = self.plan.learning_rate
        if rate is None:
            return []
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        # A checkpoint has initial_lr, which stays, while lr is the rate of its last step.
        lrs = sorted({group.setdefault("initial_lr", group["lr"]) for group in groups})
        if rate.max_lr not in lrs:
            raise ConfigError(
                f"max_lr: {rate.max_lr:g}, but the optimizer has {', '.join(f'{lr:g}' for lr in lrs)}; make them equal"
            )
        return [TokenLR(optimizer, rate, last_epoch=0) for optimizer in state.optimizers]  # 0: from initial_lr

    def _start_step(self, logger: Logger) -> None:
        """Set and log the rates. Composer's own schedulers see the time before a step, and lag by one."""
        step = self._step()
        logger.log_metrics({"sequence_length_warmup/seqlen": self.plan.seqlen(step)})
        for rate in self._rates:
            rate.seek(step)
            logger.log_metrics({"sequence_length_warmup/learning_rate": rate.get_last_lr()[0]})

    def _check_loader(self) -> None:
        """Raise ConfigError if the loader's batches can't be those of the plan."""
        rows, ranks = getattr(self._loader, "batch_size", None), dist.get_world_size()
        if isinstance(rows, int) and rows * ranks != self.plan.global_batch:
            raise ConfigError(
                f"batch_size: {rows} rows on each of {ranks} ranks are {rows * ranks} per step, but the global batch is "
                f"{self.plan.global_batch}; Composer's loaders give a rank all its rows of a step"
            )
        dataset = getattr(self._loader, "dataset", None)
        if isinstance(dataset, RunRows):
            if not isinstance(self._loader, RunLoader):
                raise ConfigError(
                    "train_dataloader: RunRows must be read in its order; use RunLoader(rows, batch_size)"
                )
            if dataset.plan.state()["settings"] != self.plan.state()["settings"]:
                raise ConfigError(
                    "train_dataloader: RunRows was made for another plan; make it with RunRows(warmup.plan)"
                )

    def _check_position(self, step: int) -> None:
        """Raise ConfigError if Composer doesn't read the loader from the resumed step on."""
        read = self._loader.state_dict()["samples"] // self.plan.global_batch
        if read != step:
            raise ConfigError(
                f"spin_dataloaders: RunLoader gives the rows of step {read}, but step {step} is trained; set "
                "spin_dataloaders=True, and fit with one loader"
            )

    def _check_trainer(self, state: State) -> None:
        """Raise ConfigError for arguments of the trainer that contradict the plan."""
        if state.dataloader is not self._loader:
            raise ConfigError(
                "train_dataloader: its batches are not cut; give the Trainer train_dataloader=warmup.data_spec(loader)"
            )
        ends = {TimeUnit.BATCH: self.plan.steps, TimeUnit.TOKEN: self.plan.consumed_tokens(self.plan.steps)}
        duration = state.max_duration
        if duration.unit not in ends or duration.value > ends[duration.unit]:
            raise ConfigError(
                f"max_duration: {duration.to_timestring()}, but the plan ends after {self.plan.steps}ba; give the Trainer "
                "max_duration=warmup.max_duration"
            )

    def _check_checkpoint(self, step: int) -> None:
        """Raise CheckpointError if a checkpoint of another schedule was loaded."""
        if step == 0:
            return
        if self._saved is None:
            raise CheckpointError(
                f"the checkpoint of step {step} was made without a sequence length warmup; start a new run, or set "
                "load_weights_only=True"
            )
        self.plan.check(self._saved, step)


def _let_through_shift_labels(model: Any) -> bool:
    """Return whether ``model`` is a HuggingFaceModel whose loss takes ``shift_labels``, and let it hand them on."""
    if not isinstance(model, HuggingFaceModel):
        return False
    parameters = inspect.signature(model.model.forward).parameters.values()
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return False
    # It drops what the model's forward doesn't name; forward passes it on to the loss as a keyword.
    model.model_forward_args = {*model.model_forward_args, "shift_labels"}
    return True
