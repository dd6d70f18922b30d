"""The one JSON file of a run: a DeepSpeed config plus our sections, read strictly.

Ours are ``curriculum_learning``, ``model``, ``data``, ``training`` and ``scheduler`` when its type is ``TokenCosineLR``;
everything else is DeepSpeed's and is handed on as it is. All problems of a file are reported in one ConfigError.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from seqlen_curriculum.architecture import ModelConfig
from seqlen_curriculum.curriculum import (
    CurriculumConfig,
    CustomCurriculum,
    constant_curriculum,
    curriculum_problems,
)
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Count, CountOrZero, Section, problems
from seqlen_curriculum.jsonfile import apply_override, read_json
from seqlen_curriculum.scheduler import CurriculumScheduler
from seqlen_curriculum.timeline import Timeline
from seqlen_curriculum.token_lr import TokenCosine, TokenCosineConfig

__all__ = ["DataConfig", "RunConfig", "TrainingConfig"]

S = TypeVar("S", bound=Section)


class DataConfig(Section):
    """The ``data`` section: which corpora, cut how."""

    train: list[str] = Field(min_length=1)
    """Prefixes of Megatron ``.bin/.idx`` pairs; several are read as one corpus, each weighing by its size."""
    seq_length: Count
    """Full length of a sample in tokens."""
    split: str = "949,50,1"
    """Shares of the documents for training, validation and test, as in Megatron."""
    leftovers: Literal["drop"] = "drop"
    """What becomes of the tail of a truncated sample: dropped, as in the paper."""


class TrainingConfig(Section):
    """The ``training`` section: when to stop, evaluate and save."""

    train_tokens: Count
    """Stop at the first step whose end has consumed this many target tokens (Megatron-DeepSpeed's ``--train-tokens``)."""
    seed: CountOrZero = 1234
    """Keys weights, sample order and dropout."""
    eval_interval: CountOrZero = 100
    """Steps between evaluations at full length; one more comes at the end. 0: never."""
    eval_rows: Count = 64
    """Full-length rows of the validation split per evaluation, the same ones each time."""
    save_interval: CountOrZero = 1000
    """Steps between checkpoints; one more comes at the end. 0: only then."""
    keep_last: Count = 3
    """Newest checkpoints to keep; older ones are deleted once a newer one is complete."""
    log_sample_ids: bool = False
    """Also write the ids of the samples each rank reads, to ``SAVE/samples.rank*.jsonl``."""


OURS: dict[str, type[Section]] = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}


@dataclass(frozen=True)
class RunConfig:
    """A checked run. ``deepspeed`` holds what goes to DeepSpeed; a section that the file lacks is None."""

    deepspeed: dict[str, Any]
    curriculum: CurriculumConfig | None = None
    scheduler: TokenCosineConfig | None = None
    model: ModelConfig | None = None
    data: DataConfig | None = None
    training: TrainingConfig | None = None

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
        found = [f"{name}: section required, but not given" for name in require if name not in raw]
        found += _misspelt_sections(raw)
        sections: dict[str, Any] = {}
        for name, section in OURS.items():
            if name in raw:
                sections[name] = _parse(section, raw[name], name, found)
        if _ours_is_scheduler(raw):
            sections["scheduler"] = _parse(TokenCosineConfig, raw["scheduler"], "scheduler", found)
        sections["curriculum"] = _parse_curriculum(raw.get("curriculum_learning"), found)
        deepspeed = {name: value for name, value in raw.items() if not _is_ours(name, raw)}
        config = cls(deepspeed=_without_max_grad_norm(deepspeed, found), **sections)
        found += config._conflicts()
        if found:
            raise ConfigError(found, where)
        return config

    @property
    def global_batch(self) -> int:
        """Rows of an optimizer step over all ranks. ConfigError without a whole ``train_batch_size``."""
        rows = self.deepspeed.get("train_batch_size")
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ConfigError(
                f"train_batch_size: {rows!r} is not a positive whole number; give the rows of one optimizer step over all "
                "ranks (it fixes the run whatever the number of ranks)"
            )
        return rows

    def batch_shape(self, world_size: int) -> tuple[int, int, int]:
        """Rows of a rank, of a micro-batch, and micro-batches of a step, for ``world_size`` ranks. ConfigError."""
        rows, ragged = divmod(self.global_batch, world_size)
        if ragged:
            raise ConfigError(
                f"train_batch_size: {self.global_batch} rows don't divide over {world_size} ranks; make it a multiple"
            )
        given = {
            key: self.deepspeed.get(key) for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        }
        for key, value in given.items():
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1 or rows % value
            ):
                raise ConfigError(f"{key}: {value!r} doesn't divide the {rows} rows of a rank ({world_size} ranks)")
        micro, accumulation = given.values()
        micro = micro or rows // (accumulation or 1)
        if accumulation and accumulation * micro != rows:
            raise ConfigError(
                f"gradient_accumulation_steps: {accumulation} x train_micro_batch_size_per_gpu {micro} x {world_size} ranks "
                f"is {accumulation * micro * world_size}, not train_batch_size {self.global_batch}; leave one of them out"
            )
        return rows, micro, rows // micro

    @property
    def train_tokens(self) -> int | None:
        """The token budget, None in a file without a training section."""
        return self.training.train_tokens if self.training else None

    def curriculum_scheduler(self) -> CurriculumScheduler:
        """The length of every step; constantly full length where there is no curriculum."""
        if self.curriculum is None:
            return CurriculumScheduler(constant_curriculum(_needed(self.data, "data").seq_length))
        rows = self.deepspeed.get("train_batch_size")
        return CurriculumScheduler(self.curriculum, rows if isinstance(rows, int) else None, self.train_tokens)

    def timeline(self) -> Timeline:
        """The whole run by arithmetic. ConfigError without ``train_batch_size`` or ``training.train_tokens``."""
        return Timeline(
            self.curriculum_scheduler().pacing, self.global_batch, _needed(self.training, "training").train_tokens
        )

    def settings(self) -> dict[str, Any]:
        """What makes the run the run it is, flat: ``{"model.num_layers": 12, ...}``. Ranks, paths and intervals do not."""
        ours = {name: getattr(self, name) for name in ("model", "curriculum", "scheduler")}
        chosen: dict[str, Any] = {name: section.model_dump() for name, section in ours.items() if section}
        if self.data and self.training:
            chosen["data"] = self.data.model_dump(exclude={"train"})
            chosen["training"] = self.training.model_dump(include={"train_tokens", "seed"})
        shared = ("train_batch_size", "optimizer", "gradient_clipping", "fp16", "bf16")
        chosen |= {name: self.deepspeed[name] for name in shared if name in self.deepspeed}
        chosen["zero_optimization"] = {"stage": self.deepspeed.get("zero_optimization", {}).get("stage", 0)}
        return dict(_flat(chosen))

    def learning_rate(self, timeline: Timeline) -> TokenCosine | None:
        """The rate of every step, None when the schedule is DeepSpeed's own."""
        if self.scheduler is None:
            return None
        return TokenCosine(timeline, self.scheduler.params, self.deepspeed["optimizer"]["params"]["lr"])

    def _conflicts(self) -> list[str]:
        """Problems between sections that are each valid."""
        checks = (self._seq_length_fits, self._lr_given, self._budget_is_tokens, self._schedule_builds)
        return [problem for check in checks if (problem := check())]

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
            return (
                f"{key}: {longest} is above the model's {self.model.max_position_embeddings} positions; lower it or raise "
                "model.max_position_embeddings"
            )
        return None

    def _lr_given(self) -> str | None:
        optimizer = self.deepspeed.get("optimizer")
        lr = (optimizer.get("params") or {}).get("lr") if isinstance(optimizer, Mapping) else None
        if self.scheduler and (isinstance(lr, bool) or not isinstance(lr, (int, float)) or not lr > 0):
            return (
                f"optimizer.params.lr: {lr!r} is not a positive number; TokenCosineLR warms up to it and decays from it"
            )
        return None

    def _budget_is_tokens(self) -> str | None:
        rows = self.deepspeed.get("train_batch_size")
        if self.training and isinstance(rows, int) and self.training.train_tokens < rows:
            return (
                f"training.train_tokens: {self.training.train_tokens} is less than one token for each of the {rows} rows of "
                "a step; give the budget in tokens"
            )
        return None

    def _schedule_builds(self) -> str | None:
        """Build what the file is complete for, so that its problems show before any work."""
        if isinstance(self.curriculum, CustomCurriculum) or not (self.training and (self.data or self.curriculum)):
            return None
        if self._lr_given():
            return None
        try:
            self.learning_rate(self.timeline())
        except ConfigError as error:
            return "; ".join(error.problems)
        return None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _parse(section: type[S], value: object, name: str, found: list[str]) -> S | None:
    try:
        return section.model_validate(value)
    except ValidationError as error:
        found += problems(error, section, name)
        return None


def _parse_curriculum(block: object, found: list[str]) -> CurriculumConfig | None:
    """The block if it is enabled. DeepSpeed took a missing ``enabled`` for false in silence; here it must be written."""
    if block is None:
        return None
    if isinstance(block, Mapping) and "enabled" not in block:
        found.append("curriculum_learning.enabled: required, but not given; write true or false")
    if isinstance(block, Mapping) and block.get("enabled") is False:
        return None
    config, block_problems = curriculum_problems(block)
    found += block_problems
    return config


def _ours_is_scheduler(raw: Mapping[str, Any]) -> bool:
    scheduler = raw.get("scheduler")
    kind = scheduler.get("type") if isinstance(scheduler, Mapping) else None
    return isinstance(kind, str) and bool(difflib.get_close_matches(kind, ["TokenCosineLR"], cutoff=0.8))


def _is_ours(name: str, raw: Mapping[str, Any]) -> bool:
    return name in OURS or name == "curriculum_learning" or (name == "scheduler" and _ours_is_scheduler(raw))


def _misspelt_sections(raw: Mapping[str, Any]) -> list[str]:
    """DeepSpeed ignores top-level keys it doesn't know, so a misspelt section of ours would be lost in silence."""
    ours = [*OURS, "curriculum_learning", "scheduler"]
    close = {name: difflib.get_close_matches(name, ours, n=1, cutoff=0.8) for name in raw if name not in ours}
    return [f"{name}: unknown section; did you mean '{match[0]}'?" for name, match in close.items() if match]


def _without_max_grad_norm(deepspeed: dict[str, Any], found: list[str]) -> dict[str, Any]:
    """Move ``optimizer.params.max_grad_norm``, which old files hold and DeepSpeed refuses, to ``gradient_clipping``."""
    optimizer = deepspeed.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, Mapping) else None
    if not isinstance(params, Mapping) or "max_grad_norm" not in params:
        return deepspeed
    norm = params["max_grad_norm"]
    clipping = deepspeed.get("gradient_clipping", norm)
    if clipping != norm:
        found.append(
            f"optimizer.params.max_grad_norm: {norm} differs from gradient_clipping {clipping}; keep the latter"
        )
    rest = {name: value for name, value in params.items() if name != "max_grad_norm"}
    return {**deepspeed, "gradient_clipping": clipping, "optimizer": {**dict(optimizer or {}), "params": rest}}


def _needed(section: S | None, name: str) -> S:
    if section is None:
        raise ConfigError(f"{name}: section required, but not given")
    return section
