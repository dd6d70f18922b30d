"""The one JSON file of a run: a DeepSpeed config plus our sections, read strictly.

Ours are ``curriculum_learning``, ``batch_size_warmup``, ``model``, ``data``, ``training`` and a ``scheduler`` whose type is
``TokenCosineLR``; the rest is DeepSpeed's, handed on as it is. All problems of a file are reported in one ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from seqlen_curriculum.config.compatibility import engine_problems, length_problems
from seqlen_curriculum.config.data import DataConfig
from seqlen_curriculum.config.deepspeed import DeepSpeedKeys, batch_shape, with_bf16, without_max_grad_norm
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.training import TrainingConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Section, flat, misspelt_sections, parse_section
from seqlen_curriculum.files import apply_override, read_json
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp, BatchSizeWarmup
from seqlen_curriculum.schedule.curriculum_config import (
    AdaptiveCurriculum,
    CurriculumConfig,
    constant_curriculum,
    curriculum_problems,
)
from seqlen_curriculum.schedule.scheduler import CurriculumScheduler
from seqlen_curriculum.schedule.shortening import Shortening
from seqlen_curriculum.schedule.timeline import Timeline
from seqlen_curriculum.schedule.token_lr import TokenCosine, TokenCosineConfig, is_token_cosine

__all__ = ["DataConfig", "RunConfig", "TrainingConfig"]

S = TypeVar("S", bound=Section)


_JUMPING = ("fixed_discrete", "fixed_mixed", "custom")
_PRECISION = ("fp16", "bf16", "amp", "torch_autocast", "data_types")
OURS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "batch_size_warmup": BatchSizeWarmup,
}


@dataclass(frozen=True)
class RunConfig:
    """A checked run. ``deepspeed`` goes to DeepSpeed, ``keys`` is what of it we read; a section the file lacks is None."""

    deepspeed: dict[str, Any]
    keys: DeepSpeedKeys
    curriculum: CurriculumConfig | None = None
    scheduler: TokenCosineConfig | None = None
    model: ModelConfig | None = None
    data: DataConfig | None = None
    training: TrainingConfig | None = None
    batch_size_warmup: BatchSizeWarmup | None = None
    held: tuple[int, ...] = ()
    """Steps after whose evaluation an ``adaptive`` schedule holds its lengths until the next one: no file tells them."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), require: Sequence[str] = ()) -> RunConfig:
        """Read a file, apply ``a.b=value`` overrides, check all of it. Raises ConfigError."""
        raw = read_json(Path(path))
        for override in overrides:
            apply_override(raw, override)
        return cls.from_dict(raw, where=str(path), require=require)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "", require: Sequence[str] = ()) -> RunConfig:
        """Check a configuration that is already in memory; ``require`` names sections that must be there."""
        found = [f"{name}: section required, but not given" for name in require if raw.get(name) is None]
        found += misspelt_sections(raw, {*OURS, "curriculum_learning", *DeepSpeedKeys.model_fields})
        sections: dict[str, Any] = {}
        for name, section in OURS.items():
            if raw.get(name) is not None:
                sections[name] = parse_section(section, raw[name], name, found)
        if is_token_cosine(raw.get("scheduler")):
            sections["scheduler"] = parse_section(TokenCosineConfig, raw["scheduler"], "scheduler", found)
        sections["curriculum"] = _parse_curriculum(raw, found)
        deepspeed = {name: value for name, value in raw.items() if value is not None and not _is_ours(name, raw)}
        deepspeed = with_bf16(without_max_grad_norm(deepspeed, found), found)
        keys = parse_section(DeepSpeedKeys, deepspeed, "", found)
        if keys is not None:
            batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
            deepspeed |= {name: getattr(keys, name) for name in batch if getattr(keys, name)}  # 32.0 is 32
            config = cls(deepspeed, keys, **sections)
            found += config._conflicts(complete=not found)
        if found or keys is None:
            raise ConfigError(found, where)
        return config

    def for_ranks(self, world_size: int) -> RunConfig:
        """The same run with DeepSpeed's three batch keys filled in for ``world_size`` ranks. ConfigError."""
        rows, micro, accumulation = batch_shape(self.keys, world_size)
        batch = {
            "train_batch_size": rows * self.keys.data_ranks(world_size),
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
        }
        if self.batch_size_warmup is not None:
            fixed = self.training is not None and self.training.micro_batch == "fixed"
            self.batch_size_warmup.check_ranks(self.keys.data_ranks(world_size), micro if fixed else 1)
            self.batch_size_warmup.rows(batch["train_batch_size"])
        return replace(self, deepspeed={**self.deepspeed, **batch}, keys=self.keys.model_copy(update=batch))

    @property
    def global_batch(self) -> int:
        """Rows of an optimizer step over all ranks. ConfigError without ``train_batch_size``."""
        if self.keys.train_batch_size is None:
            raise ConfigError(
                "train_batch_size: required, but not given; give the rows of one optimizer step over all ranks (it fixes "
                "the run whatever the number of ranks)"
            )
        return self.keys.train_batch_size

    @property
    def rows(self) -> int | BatchSizeRamp:
        """The global batch, or its warmup. ConfigError without ``train_batch_size``."""
        return self.batch_size_warmup.rows(self.global_batch) if self.batch_size_warmup else self.global_batch

    @property
    def adapts(self) -> bool:
        """Whether evaluations decide on the lengths to come."""
        return isinstance(self.curriculum, AdaptiveCurriculum)

    @property
    def train_tokens(self) -> int | None:
        """The token budget, None in a file without a training section."""
        return self.training.train_tokens if self.training else None

    def curriculum_scheduler(self) -> CurriculumScheduler:
        """The length of every step; constantly full length where there is no curriculum."""
        curriculum = self.curriculum or constant_curriculum(_needed(self.data, "data").seq_length)
        bucket = self.training.seqlen_bucket if self.training else None
        rows = self.rows if self.keys.train_batch_size else None
        scheduler = CurriculumScheduler(curriculum, rows, self.train_tokens, bucket, self.shortening.seq_length)
        if self.held:
            scheduler.hold(self.held, _needed(self.training, "training").eval_interval)
        return scheduler

    @property
    def shortening(self) -> Shortening:
        """How a sample is shortened to a step's seqlen."""
        seq_length = self.data.seq_length if self.data else None
        return self.curriculum.shortening(seq_length) if self.curriculum else Shortening(seq_length=seq_length or 0)

    def timeline(self) -> Timeline:
        """The whole run by arithmetic. ConfigError without ``train_batch_size`` or ``training.train_tokens``."""
        training = _needed(self.training, "training")
        return Timeline(self.curriculum_scheduler().pacing, self.rows, training.train_tokens, self.shortening)

    def learning_rate(self, timeline: Timeline, max_lr: float | None = None) -> TokenCosine | None:
        """The rate of every step, None when the schedule is DeepSpeed's own; ``max_lr`` of a user's own optimizer."""
        if self.scheduler is None:
            return None
        max_lr = max_lr or self.keys.lr
        if max_lr is None:
            raise ConfigError("optimizer.params.lr: required, but not given; TokenCosineLR warms up to it")
        return TokenCosine(timeline, self.scheduler.params, max_lr)

    def settings(self) -> dict[str, Any]:
        """What makes the run the run it is, flat: ``{"model.num_layers": 12, ...}``. Ranks, ZeRO and paths do not."""
        chosen: dict[str, Any] = {}
        if self.model:
            chosen["model"] = self.model.model_dump(exclude={"preset", "activation_checkpointing", "hf_checkpoint"})
            if self.model.initial:
                chosen["model"]["initial_weights"] = self.model.initial.fingerprint
        if self.curriculum:
            chosen["curriculum_learning"] = self.curriculum.model_dump()
        if self.data and self.training:
            chosen["data"] = self.data.model_dump(exclude={"train", "valid", "test"}) | {"weights": self.data.weights}
            decides = {"eval_interval", "eval_rows"} if self.adapts else set()
            chosen["training"] = self.training.model_dump(include={"train_tokens", "seed", "seqlen_bucket", *decides})
        if self.batch_size_warmup:
            chosen["batch_size_warmup"] = self.batch_size_warmup.model_dump()
        shared = ("train_batch_size", "optimizer", "scheduler", "gradient_clipping", *_PRECISION)
        chosen |= {name: self.deepspeed[name] for name in shared if name in self.deepspeed}
        if self.scheduler:
            chosen["scheduler"] = self.scheduler.model_dump()
        return {**dict(flat(chosen)), **self.keys.model_cuts}  # a model that is cut over ranks is saved in parts

    def as_file(self) -> dict[str, Any]:
        """All of it as a file would have it, defaults and overrides written out; read again it is the same run."""
        sections = {"curriculum_learning": self.curriculum, "scheduler": self.scheduler}
        sections |= {name: getattr(self, name) for name in OURS}
        given = {name: section for name, section in sections.items() if section is not None}
        ours = {name: section.model_dump(mode="json", exclude_none=True) for name, section in given.items()}
        return {**self.deepspeed, "curriculum_learning": {"enabled": False}, **ours}

    def warnings(self) -> list[str]:
        """What is allowed but ill-advised, one line each."""
        curriculum = self.curriculum
        if curriculum is None or curriculum.min_difficulty == curriculum.max_difficulty:
            return []
        found = []
        if self.adapts:
            found.append(
                "curriculum_learning.schedule_type adaptive: a plan is that of a run that never fluctuates; each evaluation "
                "that does holds the lengths for training.eval_interval steps more"
            )
        if self.batch_size_warmup:
            found.append(
                "batch_size_warmup and curriculum_learning are both on, and each makes the first steps smaller. The paper "
                "(Section 5.1) advises against it: a batch size warmup gave no stability benefit, because fewer full-length "
                "sequences are not simpler ones, and the batch must stay a multiple of the data-parallel size. Leave "
                "batch_size_warmup out"
            )
        if self.training and self.training.on_spike != "log" and curriculum.schedule_type in _JUMPING:
            found.append(
                f'training.on_spike: "{self.training.on_spike}" judges a loss by the least before it, at any length, and '
                f'the lengths of curriculum_learning.schedule_type "{curriculum.schedule_type}" may jump, where another '
                'loss is no spike. Raise training.spike_ratio above what the lengths alone make, or set on_spike to "log"'
            )
        return found

    def _conflicts(self, complete: bool) -> list[str]:
        """Problems between sections; with ``complete`` (no section has a problem) also what building the schedule finds."""
        checks = (self._seq_length_fits(), self._budget_is_tokens(), self._batch_warmup_fits(), self._is_evaluated())
        found = [problem for problem in checks if problem]
        found += engine_problems(
            self.keys, self.model, bool(self.training and self.training.compile), self.shortening.method
        )
        if found or not complete or not self.training or not (self.data or self.curriculum):
            return found
        try:
            if self.keys.train_batch_size:
                timeline = self.timeline()
                if self.keys.optimizer:
                    self.learning_rate(timeline)
                lengths = {row_tokens for _, row_tokens in timeline.shapes()}
                return length_problems(self.keys, sorted({*lengths, self.data.seq_length} if self.data else lengths))
        except ConfigError as error:
            return error.problems
        return []

    def _seq_length_fits(self) -> str | None:
        seq_length = self.data.seq_length if self.data else None
        if seq_length and self.curriculum and self.curriculum.max_difficulty > seq_length:
            return (
                f"curriculum_learning.max_difficulty: {self.curriculum.max_difficulty} is above data.seq_length "
                f"{seq_length}; lower it or cut the data longer"
            )
        longest = seq_length or (self.curriculum.max_difficulty if self.curriculum else 0)
        if self.model and longest > self.model.max_position_embeddings:
            key = "data.seq_length" if seq_length else "curriculum_learning.max_difficulty"
            more = "take another model.hf_checkpoint" if self.model.initial else "raise model.max_position_embeddings"
            positions = self.model.max_position_embeddings
            return f"{key}: {longest} is above the model's {positions} positions; lower it or {more}"
        return None

    def _is_evaluated(self) -> str | None:
        if self.adapts and self.training and not self.training.eval_interval:
            return (
                "training.eval_interval: 0 never evaluates, and curriculum_learning.schedule_type adaptive goes by "
                "evaluations; give the steps between them, or use fixed_linear"
            )
        return None

    def _batch_warmup_fits(self) -> str | None:
        try:
            if self.batch_size_warmup and self.keys.train_batch_size:
                self.batch_size_warmup.rows(self.keys.train_batch_size)
        except ConfigError as error:
            return str(error)
        return None

    def _budget_is_tokens(self) -> str | None:
        rows = self.keys.train_batch_size
        if self.training and rows and self.training.train_tokens < rows:
            return (
                f"training.train_tokens: {self.training.train_tokens} is less than one token for each of the {rows} rows of "
                "a step; give the budget in tokens"
            )
        return None


def _parse_curriculum(raw: Mapping[str, Any], found: list[str]) -> CurriculumConfig | None:
    """The block if it is enabled. DeepSpeed took a missing ``enabled`` for false in silence; here it must be written."""
    block = raw.get("curriculum_learning")
    if block is None:
        return None
    if isinstance(block, Mapping) and "enabled" not in block:
        found.append("curriculum_learning.enabled: required, but not given; write true or false")
    if isinstance(block, Mapping) and block.get("enabled") is False:
        full = block.get("max_difficulty")  # in a file without a data section it is all that tells the full length
        if isinstance(full, int) and not isinstance(full, bool) and full > 0 and raw.get("data") is None:
            return constant_curriculum(full)
        return None
    config, block_problems = curriculum_problems(block)
    found += block_problems
    return config


def _is_ours(name: str, raw: Mapping[str, Any]) -> bool:
    return name in OURS or name == "curriculum_learning" or (name == "scheduler" and is_token_cosine(raw[name]))


def _needed(section: S | None, name: str) -> S:
    if section is None:
        raise ConfigError(f"{name}: section required, but not given")
    return section
