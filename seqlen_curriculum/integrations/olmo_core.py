"""Sequence length warmup in OLMo-core: a callback for its ``Trainer``, and a data loader of the rows of ``slw train``.

    trainer.add_callback("warmup", SequenceLengthWarmup("run.json"))

OLMo-core's ``Trainer`` counts a batch at full length before any callback sees it. ``SequenceLengthWarmup`` shortens the
batch of each step before it is trained and corrects ``global_train_tokens_seen``, so that token durations, token-wise
schedulers, checkpoints and logs count trained tokens. Evaluations are at full length. Micro-batches of short steps have
more rows without any change, because ``rank_microbatch_size`` counts tokens.

Shapes: B rows of a rank, S full length, s the step's seqlen, K segments per row (1 if rows are truncated), D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from olmo_core.data.data_loader import DataLoaderBase
from olmo_core.data.utils import get_labels
from olmo_core.optim.config import INITIAL_LR_FIELD, LR_FIELD
from olmo_core.optim.scheduler import Scheduler, SchedulerUnits
from olmo_core.train.callbacks import BatchSizeSchedulerCallback, Callback, SequenceLengthSchedulerCallback
from olmo_core.train.common import Duration, DurationUnit
from torch import Tensor

from seqlen_curriculum.batch import set_batch_sequence_length
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunLoader, RunRows

__all__ = ["RunDataLoader", "SequenceLengthWarmup"]


@dataclass
class SequenceLengthWarmup(Callback):  # type: ignore[misc]
    """Give OLMo-core's ``Trainer`` a sequence length warmup.

    ``curriculum`` is a file with our sections, or its content. Raises ConfigError at the trainer's construction for what
    contradicts the plan, and CheckpointError for a checkpoint of another schedule.
    """

    priority: ClassVar[int] = 100  # before all callbacks that look at the batch or count its tokens

    curriculum: str | Path | Mapping[str, Any] = ""
    _plan: TrainerPlan | None = None
    _checked: bool = False

    @property
    def plan(self) -> TrainerPlan:
        """Return the schedule of the run."""
        assert self._plan is not None, "the callback belongs to no trainer yet"
        return self._plan

    def post_attach(self) -> None:
        """Plan the run and set its rates. The trainer calls this at its construction."""
        trainer = self.trainer
        loader, module = trainer.data_loader, trainer.train_module
        rates = [float(group.get(INITIAL_LR_FIELD) or group[LR_FIELD]) for group in module.optim.param_groups]
        full_length = _sequence_length(loader)
        self._plan = plan = TrainerPlan.of(
            self.curriculum, global_batch=loader.global_batch_size // full_length, max_lr=max(rates)
        )
        problems = list(_problems(trainer, plan, full_length))
        if problems:
            raise ConfigError(problems)
        if plan.learning_rate is not None:
            module.scheduler = _PlannedRate(plan.learning_rate)

    def pre_train(self) -> None:
        """Refuse callbacks that change the same batches. The trainer calls this before its first step."""
        for name, callback in self.trainer.callbacks.items():
            schedules = isinstance(callback, (BatchSizeSchedulerCallback, SequenceLengthSchedulerCallback))
            if schedules and callback.enabled:
                raise ConfigError(
                    f"callbacks: {name!r} ({type(callback).__name__}) changes the batches that SequenceLengthWarmup plans; "
                    "remove one of the two"
                )

    def pre_step(self, batch: dict[str, Any]) -> None:
        """Shorten ``batch`` in place to the length of the step, and correct the trainer's counters."""
        if isinstance(self.trainer.data_loader, RunDataLoader):
            return  # its batches are short already, and counted as such
        if batch["input_ids"].shape[1] != self.plan.full_length:
            raise DataError(
                f"step {self.step}: a batch of {batch['input_ids'].shape[1]} tokens per row, but the plan's full length is "
                f"{self.plan.full_length}; use a loader of fixed length"
            )
        trainer, module = self.trainer, self.trainer.train_module
        counted_flops = module.global_num_flops_in_batch(batch)
        seqlen = self.plan.seqlen(self.step)
        short = _shorten(batch, seqlen, self.plan.config.shortening.method == "segment", module.label_ignore_index)
        batch.clear()
        batch.update(short)
        trainer.global_train_tokens_seen = self.plan.consumed_tokens(self.step)
        if counted_flops is not None:
            tokens = self.plan.consumed_tokens(self.step) - self.plan.consumed_tokens(self.step - 1)
            trainer.global_train_petaflops += (module.num_flops_per_token(seqlen) * tokens - counted_flops) / 1e15

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the schedule, for the trainer's checkpoint."""
        return {"plan": self.plan.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise CheckpointError unless ``state_dict`` is of a run with the same steps so far."""
        self.plan.check(state_dict["plan"], self.step)
        self._checked = True

    def post_checkpoint_loaded(self, path: str | Path) -> None:
        """Raise CheckpointError if the trainer's state was loaded from a run without a warmup."""
        if self.step > 0 and not self._checked:
            raise CheckpointError(
                f"{path}: the checkpoint of step {self.step} was made without a sequence length warmup; start a new run"
            )


class RunDataLoader(DataLoaderBase):  # type: ignore[misc]
    """The rows of ``RunRows`` as batches of OLMo-core's ``Trainer``: what ``slw train`` reads, each at its step's length.

    ``dp_world_size`` and ``dp_rank`` as in OLMo-core's loaders. ``options`` go to torch's ``DataLoader``. Raises ConfigError
    where the ranks don't divide the global batch.
    """

    def __init__(
        self, rows: RunRows, *, work_dir: str | Path, dp_world_size: int = 1, dp_rank: int = 0, **options: Any
    ) -> None:
        plan = rows.plan
        self.sequence_length = plan.full_length
        self._plan = plan
        self._loader = RunLoader(
            rows, max(plan.global_batch // dp_world_size, 1), rank=dp_rank, ranks=dp_world_size, **options
        )
        super().__init__(
            work_dir=str(work_dir),
            global_batch_size=plan.global_batch * plan.full_length,
            dp_world_size=dp_world_size,
            dp_rank=dp_rank,
        )

    @property
    def total_batches(self) -> int:
        """Return the steps of the run."""
        return self._plan.steps

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches read, which is that of completed steps."""
        return {"batches_processed": self.batches_processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume after ``batches_processed`` steps, on any number of ranks."""
        self.batches_processed = state_dict["batches_processed"]

    def reshuffle(self, epoch: int | None = None, **options: Any) -> None:  # noqa: ARG002 - OLMo-core's signature
        """Set the epoch only. The order of the whole run is that of its plan."""
        self._epoch = epoch or 1

    def _iter_batches(self) -> Iterator[dict[str, Tensor]]:
        self._loader.load_state_dict({"samples": self.batches_processed * self._plan.global_batch})
        for batch in self._loader:
            yield {"input_ids": batch["input_ids"], "labels": batch["labels"]}

    def get_mock_batch(self) -> dict[str, Tensor]:
        """Return a batch of the largest shape, for the trainer's trial step."""
        rows = self._plan.global_batch // self.dp_world_size
        return {"input_ids": torch.zeros(rows, self.sequence_length, dtype=torch.int64)}

    def global_num_tokens_in_batch(self, batch: dict[str, Any]) -> int:
        """Return the target tokens of a batch over all ranks."""
        return int(batch["input_ids"].numel() * self.dp_world_size)


class _PlannedRate(Scheduler):  # type: ignore[misc]
    """The plan's rate of each step. A group with a smaller ``lr`` gets that share of it."""

    def __init__(self, rate: Any) -> None:
        super().__init__(units=SchedulerUnits.steps)
        self._rate = rate

    def get_lr(self, initial_lr: Any, current: int, t_max: int) -> Any:  # noqa: ARG002 - OLMo-core's signature
        """Return the rate of step ``current``."""
        return self._rate(current) * (initial_lr / self._rate.max_lr)


def _sequence_length(loader: Any) -> int:
    """Return the full length of a loader's rows, in tokens. Raises ConfigError if it is unknown."""
    for owner in (loader, getattr(loader, "dataset", None)):
        for name in ("sequence_length", "max_sequence_length"):
            if isinstance(getattr(owner, name, None), int):
                return int(getattr(owner, name))
    raise ConfigError(
        f"data_loader: the length of a row of {type(loader).__name__} is unknown; use a NumpyFSLDataLoader or RunDataLoader"
    )


def _problems(trainer: Any, plan: TrainerPlan, full_length: int) -> Iterator[str]:
    """Yield one line for each setting of the trainer that contradicts the plan."""
    loader, scheduler = trainer.data_loader, trainer.train_module.scheduler
    if full_length != plan.full_length:
        yield (
            f"sequence_length: {full_length} in the data loader, but the warmup ends at {plan.full_length} "
            "(curriculum_learning.max_difficulty); make them equal"
        )
    if isinstance(loader, RunDataLoader) and loader._plan.state()["settings"] != plan.state()["settings"]:
        yield "data_loader: its RunRows was made for another plan; make both from the same file and batch"
    if scheduler is not None and plan.learning_rate is not None:
        yield (
            f"scheduler: {type(scheduler).__name__} contradicts the file's scheduler, which sets the rate; remove one of "
            "the two"
        )
    # Both end with the same step. But a step-wise scheduler knows the last step only from a duration in steps, and a
    # token-wise one the last token only from a duration in tokens: the trainer converts at full length.
    steps = Duration.steps(plan.steps)
    tokens = Duration.tokens(plan.config.training.train_tokens if plan.config.training else 0)
    by_steps = scheduler is not None and scheduler.units == SchedulerUnits.steps
    wanted = [steps] if by_steps else [tokens] if scheduler is not None else [tokens, steps]
    if trainer.max_duration not in wanted:
        given = f"{DurationUnit(trainer.max_duration.unit)}({trainer.max_duration.value})"
        choices = " or ".join(f"Duration.{one.unit}({one.value})" for one in wanted)
        yield f"max_duration: Duration.{given} is not the end of the plan; set {choices}"


def _shorten(batch: dict[str, Any], seqlen: int, segment: bool, ignored: int) -> dict[str, Any]:
    """Return a batch of rows (B, S) as rows (B * K, s), with shifted ``labels``, so that all s columns have a target."""
    # The trainer would shift labels after the cut, and train s - 1 of s targets.
    labels = batch["labels"] if "labels" in batch else get_labels(batch, label_ignore_index=ignored)
    lists = {key: value for key, value in batch.items() if isinstance(value, list)}
    tensors = {key: value for key, value in batch.items() if key not in lists and key != "doc_lens"}
    short, _ = set_batch_sequence_length(
        {**tensors, "labels": labels}, seqlen, not segment, padding_free=False, count_targets=False
    )
    segments = len(short["input_ids"]) // len(batch["input_ids"])
    short |= {key: [item for item in value for _ in range(segments)] for key, value in lists.items()}
    if "doc_lens" in batch:
        short["doc_lens"] = _cut_documents(batch["doc_lens"], seqlen, segments)
        short["max_doc_lens"] = short["doc_lens"].amax(-1).tolist()
    return short


def _cut_documents(doc_lens: Tensor, seqlen: int, segments: int) -> Tensor:
    """Return the lengths (B * K, D) of documents inside each row's segments, 0 where a document has no token there."""
    # 5 and 3 tokens in segments of 4: ends 5 8 become 4 4 in the first (lengths 4 0) and 1 4 in the second (lengths 1 3).
    ends = doc_lens.cumsum(-1)[:, None] - torch.arange(segments, device=doc_lens.device)[:, None] * seqlen  # (B, K, D)
    ends = ends.clamp(0, seqlen).flatten(0, 1)
    return ends.diff(dim=-1, prepend=torch.zeros_like(ends[:, :1])).to(doc_lens.dtype)
