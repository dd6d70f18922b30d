"""Sequence length warmup in torchtitan's ``Trainer`` (0.3).

A config function returns ``warm_up(llama3_8b(), "run.json")``. The trainer's own loop, model and parallelism stay. Each
optimizer step has one length on all ranks, batches are shortened where the loop takes them (behind the loader's workers),
and validation is at full length. ``training.steps`` becomes the run's number of steps, and a token-wise ``scheduler`` of the
file sets the rate of every step from its consumed tokens. A checkpoint keeps the schedule, and loading it with another one
is refused.

torchtitan's rows are full of documents, each with ``positions`` from 0, and FlexAttention and varlen attention mask by
them. With ``method: "window"`` the positions restart every ``seqlen`` tokens, so that tokens attend within pieces of that
length. Every token is trained, all steps have the same shape, and nothing is recompiled. ``method: "truncate"`` keeps the
first ``seqlen`` tokens of each row, as the paper does. With ``RunDataLoader`` every step reads the rows of ``slw train``.

Shapes: B rows, L the full length, s the step's seqlen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from seqlen_curriculum.config.run_file import read_run_file
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunLoader, RunRows

__all__ = ["RunDataLoader", "SequenceLengthWarmupTrainer", "warm_up"]

Batch = tuple[dict[str, Tensor], Tensor]


class RunDataLoader(BaseDataLoader):  # type: ignore[misc]
    """The rows of ``slw train`` for torchtitan: set ``config.dataloader = RunDataLoader.Config()`` before ``warm_up``.

    Yields ``{"input": (B, s), "positions": (B, s)}`` and targets (B, s); (B, L) with ``method: "window"``. Its state counts
    the samples of all ranks, so that a run resumes with the same rows on another number of ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        """``dataset`` and ``dataset_path`` are unused: the run's file names its corpora."""

        num_workers: int = 0
        """Worker processes that read the rows."""

    def __init__(self, config: Any, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any) -> None:
        """Open the corpora. Raises ConfigError outside a trainer with a warmup, or without a ``data`` section."""
        if not isinstance(config, _PlannedRows):
            raise ConfigError("dataloader: RunDataLoader needs a run's file; call warm_up(config, file) on the config")
        rows = RunRows(config._plan)
        self._loader = RunLoader(
            rows, local_batch_size, rank=dp_rank, ranks=dp_world_size, num_workers=config.num_workers
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's micro-batches, from the loaded state to the end of the run."""
        for batch in self._loader:
            tokens = batch["input_ids"]
            positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
            yield {"input": tokens, "positions": positions}, batch["labels"]

    def state_dict(self) -> dict[str, int]:
        """Return how many samples of the run all ranks have been given."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin after ``state``."""
        if state:
            self._loader.load_state_dict(state)

    def close(self) -> None:
        """Do nothing: workers end with the iterator."""


# Fields whose name starts with _ are left out of the configuration that torchtitan logs.
@dataclass(kw_only=True, slots=True)
class _PlannedRows(RunDataLoader.Config):
    _plan: TrainerPlan


@dataclass(kw_only=True, slots=True)
class _PlannedRates(LRSchedulersContainer.Config):  # type: ignore[misc]
    """The file's token-wise ``scheduler`` as the factor of every optimizer's own rate."""

    _plan: TrainerPlan

    def build(self, *, optimizers: Any, training_steps: int) -> Any:
        rate, last = self._plan.learning_rate, training_steps
        assert rate is not None
        # LambdaLR counts the finished steps; after the last one it asks for a step that doesn't exist.
        return LRSchedulersContainer(optimizers, lambda finished: rate(min(finished + 1, last)) / rate.max_lr)


class SequenceLengthWarmupTrainer(Trainer):  # type: ignore[misc]
    """``torchtitan.trainer.Trainer`` with a sequence length warmup. ``warm_up`` makes its config from an existing one."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # type: ignore[misc]
        """The fields of ``Trainer.Config``, and the run's file."""

        curriculum: str = ""
        """JSON file with a curriculum_learning and a training section; also read: scheduler (token-wise), data."""

    plan: TrainerPlan

    def init_distributed(self) -> Any:
        """Initialize torch.distributed, then plan the run. Raises ConfigError for what contradicts the plan."""
        # The first point where the ranks are known, and before the model, the optimizer and the loader are built.
        dims = super().init_distributed()
        self.plan = _plan(self.config, dims)
        self._windows = self.plan.config.shortening.method == "window"
        config, steps = self.config, self.plan.steps
        config.training = dataclasses.replace(config.training, steps=steps)
        if self.plan.learning_rate is not None:
            config.lr_scheduler = _PlannedRates(warmup_steps=config.lr_scheduler.warmup_steps, _plan=self.plan)
        if isinstance(config.dataloader, RunDataLoader.Config):
            config.dataloader = _PlannedRows(num_workers=config.dataloader.num_workers, _plan=self.plan)
        shortest = min(self.plan.seqlen(step) for step in (1, steps))
        logger.info(f"Sequence length warmup: {shortest} to {self.plan.full_length} tokens, {steps} steps")
        return dims

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the micro-batches, each shortened to the length of the step that takes it."""
        # Not in post_dataloading_process: the loss is divided by the targets that train_step counts before that hook.
        for inputs, labels in super().batch_generator(data_iterable):
            batch = self._shorten(inputs, labels)
            self.metrics_processor.ntokens_since_last_log -= labels.numel() - batch[1].numel()
            yield batch

    def _shorten(self, inputs: dict[str, Tensor], labels: Tensor) -> Batch:
        seqlen = self.plan.seqlen(self.step)
        if self._windows:
            # A document of 10 tokens at s 4 has positions 0 1 2 3, 0 1 2 3, 0 1: three documents to the attention.
            return {**inputs, "positions": inputs["positions"] % seqlen}, labels
        others = inputs.keys() - {"input", "positions"}
        if others:
            raise DataError(
                f'{sorted(others)[0]}: not one value per token, so rows can\'t be truncated; use method: "window"'
            )
        return {name: value[:, :seqlen] for name, value in inputs.items()}, labels[:, :seqlen]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the trainer and the settings of the schedule."""
        return {**super().state_dict(), "curriculum": json.dumps(self.plan.state(), sort_keys=True)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state. Raises CheckpointError if it was saved with another schedule."""
        self.plan.check(json.loads(state_dict["curriculum"]), state_dict["step"])
        super().load_state_dict(state_dict)
        # The checkpoint has the tokens of one of its ranks: too few or too many on another number of ranks.
        ranks = self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard * self.parallel_dims.cp
        self.ntokens_seen = self.plan.consumed_tokens(self.step) // ranks

    def train(self) -> None:
        """Train to the end of the token budget. Raises CheckpointError for a checkpoint of another schedule, or of none."""
        try:
            super().train()
        except CheckpointException as error:
            if "train_state.curriculum" not in str(error):
                raise
            raise CheckpointError(
                f"{self.config.checkpoint.folder}: holds a checkpoint made without a sequence length warmup; set another "
                "checkpoint.folder, or pass it as checkpoint.initial_load_path"
            ) from error


def warm_up(config: Any, curriculum: str | Path) -> Any:
    """Return ``config``, a ``Trainer.Config``, as one whose trainer has a sequence length warmup.

    ``curriculum`` is a file with our sections. The command line can still change every field, such as
    ``--training.local_batch_size`` or ``--curriculum``. Raises ConfigError for the config of a subclass of ``Trainer``.
    """
    if type(config) is not Trainer.Config:
        raise ConfigError(
            f"config: {type(config).__qualname__} belongs to another trainer, whose loop may differ; give a Trainer.Config"
        )
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return SequenceLengthWarmupTrainer.Config(**fields, curriculum=str(curriculum))


def _plan(config: Any, dims: Any) -> TrainerPlan:
    """Return the plan of the file for this trainer. Raises ConfigError for what contradicts it."""
    if not config.curriculum:
        raise ConfigError("curriculum: no file given; use warm_up(config, file), or --curriculum FILE")
    raw = read_run_file(config.curriculum)
    block = raw.get("curriculum_learning")
    windows = isinstance(block, Mapping) and block.get("method") == "window"
    rates = [group.optimizer_kwargs.get("lr") for group in config.optimizer.param_groups]
    batch = config.training.global_batch_size
    plan = TrainerPlan.of(
        config.curriculum,
        global_batch=batch if batch > 0 else config.training.local_batch_size * dims.dp_replicate * dims.dp_shard,
        max_lr=max((rate for rate in rates if rate is not None), default=None),
        padding_free=windows,
    )
    problems = [
        *_problems(config, plan),
        *(_window_problems(config) if windows else _shape_problems(config, dims, plan)),
    ]
    if problems:
        raise ConfigError(problems, config.curriculum)
    return plan


def _problems(config: Any, plan: TrainerPlan) -> Iterator[str]:
    """Yield one line for each setting that contradicts any method."""
    if config.training.seq_len != plan.full_length:
        yield (
            f"training.seq_len: {config.training.seq_len} in the trainer, but the run ends at {plan.full_length} tokens "
            "(curriculum_learning.max_difficulty); make them equal"
        )
    if plan.config.shortening.method == "segment" and not isinstance(config.dataloader, RunDataLoader.Config):
        yield (
            'curriculum_learning.method: "segment" needs RunDataLoader, which makes several rows of each sample; set '
            '"window" or "truncate"'
        )


def _window_problems(config: Any) -> Iterator[str]:
    attention = getattr(getattr(config.model_spec.model, "first_attention", None), "inner_attention", None)
    if not isinstance(attention, (FlexAttention.Config, VarlenAttention.Config)):
        name = type(attention).__qualname__.removesuffix(".Config")
        yield (
            f'curriculum_learning.method: "window" needs attention that masks by positions, but the model has {name}; '
            'set attn_backend="flex" or "varlen" in its model_registry, or method: "truncate"'
        )


def _shape_problems(config: Any, dims: Any, plan: TrainerPlan) -> Iterator[str]:
    """Yield one line for each feature that can't follow the shapes of shortened rows."""
    method = f'method: "{plan.config.shortening.method}"'
    if not config.training.disable_cuda_graphs:
        yield f'training.disable_cuda_graphs: False, but {method} changes shapes; set it to True, or method: "window"'
    if dims.pp > 1:
        yield (
            f"parallelism.pipeline_parallel_degree: {dims.pp}, but {method} changes the shapes that stages exchange; set "
            'method: "window"'
        )
    sequence_parallel = dims.tp if config.parallelism.enable_sequence_parallel else 1
    divisors = {"parallelism": sequence_parallel * (2 * dims.cp if dims.cp > 1 else 1)}
    if isinstance(config.loss, ChunkedLossWrapper.Config):
        divisors["loss.num_chunks"] = config.loss.num_chunks
    lengths = {length for _, length in plan.timeline.shapes()}
    for name, divisor in divisors.items():
        bad = sorted(length for length in lengths if length % divisor)
        if bad:
            yield (
                f"{name}: needs lengths that are multiples of {divisor}, but the schedule has {bad[0]}; set "
                f'difficulty_step and min_difficulty to multiples of {divisor}, or method: "window"'
            )
