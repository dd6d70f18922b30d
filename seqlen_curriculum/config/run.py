"""Read the JSON file of a run strictly: a DeepSpeed configuration plus the sections of this package.

These are ``curriculum_learning``, ``batch_size_warmup``, ``model``, ``data``, ``training``, and ``scheduler`` if it is
token-wise. DeepSpeed gets the rest, as ``deepspeed_rules.py`` says. All problems of a file are reported in one
ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from seqlen_curriculum.config import checks
from seqlen_curriculum.config.data import DECOMPOSED_KEYS, DataConfig
from seqlen_curriculum.config.data_efficiency import parse_curriculum, with_one_curriculum
from seqlen_curriculum.config.deepspeed import DeepSpeedKeys, batch_shape
from seqlen_curriculum.config.deepspeed_part import read_by_deepspeed
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.plan import RunPlan
from seqlen_curriculum.config.run_file import SCHEMA_KEY, absolute_paths, folder_of, read_run_file
from seqlen_curriculum.config.training import TrainingConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Section, flat, misspelt_sections, parse_section
from seqlen_curriculum.run_folder.model_folder import lasting_keys
from seqlen_curriculum.schedule.adjusted_pacing import Rounding
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeWarmup
from seqlen_curriculum.schedule.buckets import Buckets, Listed, draw_lengths
from seqlen_curriculum.schedule.curriculum_config import AdaptiveCurriculum, CurriculumConfig, constant_curriculum
from seqlen_curriculum.schedule.global_batch import BatchGrowth, BatchGrowthKeys, GlobalBatch
from seqlen_curriculum.schedule.piecewise import ceil_div
from seqlen_curriculum.schedule.scheduler import CurriculumScheduler
from seqlen_curriculum.schedule.shortening import Shortening
from seqlen_curriculum.schedule.timeline import Timeline
from seqlen_curriculum.schedule.token_lr import TokenLRConfig, token_schedule
from seqlen_curriculum.strict_json import shown

__all__ = ["DataConfig", "RunConfig", "TrainingConfig"]

_PRECISION = ("fp16", "bf16", "torch_autocast", "data_types")
OURS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "batch_size_warmup": BatchSizeWarmup,
}


@dataclass(frozen=True)
class RunConfig:
    """A checked run. ``deepspeed`` is passed to DeepSpeed; ``keys`` are its parsed keys. A missing section is None."""

    deepspeed: dict[str, Any]
    keys: DeepSpeedKeys
    curriculum: CurriculumConfig | None = None
    scheduler: TokenLRConfig | None = None
    model: ModelConfig | None = None
    data: DataConfig | None = None
    training: TrainingConfig | None = None
    batch_size_warmup: BatchSizeWarmup | None = None
    data_ranks: int = 1
    """Number of data-parallel ranks, set by ``for_ranks``; not a key of the file."""
    buckets: Buckets | None = None
    """The pieces of decomposed training data, set by ``with_buckets``; not a key of the file."""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """DeepSpeed's keys in the file that have no effect on the run, each with the reason."""
    folder: Path | None = field(default=None, compare=False)
    """The folder of the file, in which relative paths are looked up second; None for a configuration in memory."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), require: Sequence[str] = ()) -> RunConfig:
        """Read a file, apply ``a.b=value`` overrides and check the result. Raises ConfigError.

        ``path`` is a JSON file, in which comments and trailing commas are allowed. A run's folder or its ``run.json`` gives
        the configuration of that run's newest launch.
        """
        raw = read_run_file(path, overrides)
        return replace(cls.from_dict(raw, where=str(path), require=require), folder=folder_of(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "", require: Sequence[str] = ()) -> RunConfig:
        """Check a configuration in memory; ``require`` lists sections that must be present. Raises ConfigError."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{shown(raw)} is not a configuration; give a mapping, as read from a JSON object", where)
        misspelt = misspelt_sections(raw, {*OURS, "curriculum_learning", *DeepSpeedKeys.model_fields})
        suggested = [name for name in require if any(problem.endswith(f"'{name}'?") for problem in misspelt)]
        absent = [name for name in require if raw.get(name) is None and name not in suggested]
        problems = [*(f"{name}: section required, but not given" for name in absent), *misspelt]
        raw, curriculum_path, ignored = with_one_curriculum(raw, problems)
        sections: dict[str, Any] = {}
        for name, section in OURS.items():
            if raw.get(name) is not None:
                sections[name] = parse_section(section, raw[name], name, problems)
        sections["model"] = _lengthened(sections.get("model"), raw, sections.get("data"))
        if (schedule := token_schedule(raw.get("scheduler"))) is not None:
            sections["scheduler"] = parse_section(schedule, raw["scheduler"], "scheduler", problems)
        sections["curriculum"] = parse_curriculum(raw, curriculum_path, problems)
        deepspeed = {name: value for name, value in raw.items() if value is not None and not _is_ours(name, raw)}
        deepspeed, unused = read_by_deepspeed(deepspeed, raw.get("model") is not None, problems)
        keys = parse_section(DeepSpeedKeys, deepspeed, "", problems)
        if keys is not None:
            batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
            deepspeed |= {name: getattr(keys, name) for name in batch if getattr(keys, name)}  # 32.0 is 32
            config = cls(deepspeed, keys, **sections, ignored=(*ignored, *unused))
            problems += checks.conflicts(config, complete=not problems)
        if problems or keys is None:
            raise ConfigError(problems, where)
        return config

    def for_ranks(self, world_size: int) -> RunConfig:
        """Return the same run with DeepSpeed's three batch keys filled in for ``world_size`` ranks. Raises ConfigError."""
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
        keys, data_ranks = self.keys.model_copy(update=batch), self.keys.data_ranks(world_size)
        config = replace(self, deepspeed={**self.deepspeed, **batch}, keys=keys, data_ranks=data_ranks)
        if problems := list(checks.growth_problems(config)):  # train_batch_size may be known only now
            raise ConfigError(problems)
        return config

    def with_buckets(self, buckets: Buckets | None) -> RunConfig:
        """Return the same run with the pieces of its training data; None changes nothing."""
        return self if buckets is None else replace(self, buckets=buckets)

    @property
    def global_batch(self) -> int:
        """Return the rows per optimizer step over all ranks. Raises ConfigError without ``train_batch_size``."""
        if self.keys.train_batch_size is None:
            raise ConfigError(
                "train_batch_size: required, but not given; give the rows per optimizer step over all ranks (the run is "
                "the same on any number of ranks)"
            )
        return self.keys.train_batch_size

    @property
    def rows(self) -> GlobalBatch:
        """Return the rows per step: a constant, a warmup or a growth. Raises ConfigError without ``train_batch_size``."""
        if self.decomposed:
            # Lengths are powers of two, so a step has exactly this many tokens at every length.
            return BatchGrowth(self.global_batch, self.global_batch * self.decomposed.seq_length)
        if self.batch_size_warmup:
            return self.batch_size_warmup.rows(self.global_batch)
        return self.curriculum.global_batch(self.global_batch) if self.curriculum else self.global_batch

    @property
    def adapts(self) -> bool:
        """Return whether later lengths depend on evaluations."""
        return isinstance(self.curriculum, AdaptiveCurriculum)

    @property
    def decomposed(self) -> DataConfig | None:
        """Return the data section if its rows are pieces of documents, else None."""
        return self.data if self.data and self.data.order == "decomposed" else None

    @property
    def needs_buckets(self) -> bool:
        """Return whether the lengths depend on the pieces of the corpora, which ``with_buckets`` has not set yet."""
        return self.decomposed is not None and self.curriculum is None and self.buckets is None

    @property
    def train_tokens(self) -> int | None:
        """Return the token budget; None without a ``training`` section."""
        return self.training.train_tokens if self.training else None

    def curriculum_scheduler(self) -> CurriculumScheduler:
        """Return the length scheduler, at full length without a curriculum. Raises ConfigError without ``data`` too."""
        if self.curriculum is None and self.data is None:
            raise ConfigError("data: section required, but not given")
        curriculum = self.curriculum or constant_curriculum(self.shortening.seq_length)
        bucket: Rounding = self.training.seqlen_bucket if self.training else None
        if self.decomposed:
            bucket = self.decomposed.piece_lengths
        rows = self.rows if self.keys.train_batch_size else None
        drawn = self._drawn_lengths(self.decomposed) if self.decomposed and self.curriculum is None else None
        return CurriculumScheduler(curriculum, rows, self.train_tokens, bucket, self.shortening.seq_length, drawn)

    def _drawn_lengths(self, data: DataConfig) -> Listed:
        """Return the lengths of a decomposed run without a schedule of its own. Raises ConfigError without its pieces."""
        if self.buckets is None or self.train_tokens is None:
            raise ConfigError(
                f'data.bucket_curriculum: "{data.bucket_curriculum or "uniform"}" depends on the documents of the corpora '
                "and on training.train_tokens, and they are not known here; use slw plan, inspect or train, or give "
                "curriculum_learning a schedule"
            )
        steps = ceil_div(self.train_tokens, self.global_batch * data.seq_length)
        if data.bucket_curriculum != "grow":
            return draw_lengths(self.buckets, steps)
        odds = data.bucket_odds or [2.0**power for power in reversed(range(len(data.piece_lengths)))]
        return draw_lengths(self.buckets, steps, data.bucket_cycles or 8, odds)

    @property
    def shortening(self) -> Shortening:
        """Return how a sample is shortened to a step's seqlen."""
        seq_length = self.data.seq_length if self.data else None
        return self.curriculum.shortening(seq_length) if self.curriculum else Shortening(seq_length=seq_length or 0)

    @cached_property
    def plan(self) -> RunPlan:
        """Derive the plan of the run, once. Raises ConfigError without ``train_batch_size`` or ``training.train_tokens``."""
        return RunPlan.of(self)

    def timeline(self) -> Timeline:
        """Return the length, rows and tokens of every step. Raises ConfigError as ``plan`` does."""
        return self.plan.timeline

    def settings(self) -> dict[str, Any]:
        """Return the settings that identify the run: ``{"model.num_layers": 12, ...}``, without ranks, ZeRO and paths."""
        chosen: dict[str, Any] = {}
        if self.model:
            unimportant = {"preset", "activation_checkpointing", "hf_checkpoint", "hf_config"}
            chosen["model"] = self.model.model_dump(exclude=unimportant)
            if self.model.initial:
                chosen["model"]["initial_weights"] = self.model.initial.fingerprint
            elif self.model.architecture is not None:
                keys = lasting_keys(self.model.architecture)
                # A null is a value: Mistral's sliding_window is 4096 if it is missing. A missing setting equals None.
                chosen["model"]["hf_config"] = {key: "null" if keys[key] is None else keys[key] for key in keys}
        if self.curriculum:
            # Omitted if it is off: checkpoints of versions without batch growth belong to the same run.
            off = set() if self.curriculum.batch_growth else set(BatchGrowthKeys.model_fields)
            chosen["curriculum_learning"] = self.curriculum.model_dump(exclude=off)
        if self.data and self.training:
            unused = set() if self.decomposed else set(DECOMPOSED_KEYS)  # checkpoints of older versions lack these keys
            dumped = self.data.model_dump(exclude={"train", "valid", "test", *unused})
            chosen["data"] = dumped | {"weights": self.data.weights}
            decides = {"eval_interval", "eval_rows"} if self.adapts else set()
            chosen["training"] = self.training.model_dump(include={"train_tokens", "seed", "seqlen_bucket", *decides})
            chosen["training"] |= self.training.identity()
        if self.batch_size_warmup:
            chosen["batch_size_warmup"] = self.batch_size_warmup.model_dump()
        shared = ("train_batch_size", "optimizer", "scheduler", "gradient_clipping", *_PRECISION)
        chosen |= {name: self.deepspeed[name] for name in shared if name in self.deepspeed}
        if self.scheduler:
            chosen["scheduler"] = self.scheduler.model_dump()
        return {**dict(flat(chosen)), **self.keys.model_cuts}  # a model that is split over ranks is saved in parts

    def as_file(self) -> dict[str, Any]:
        """Return the configuration as the content of a file, with defaults, overrides and absolute paths.

        Reading it gives the same run in any folder.
        """
        sections = {"curriculum_learning": self.curriculum, "scheduler": self.scheduler}
        sections |= {name: getattr(self, name) for name in OURS}
        given = {name: section for name, section in sections.items() if section is not None}
        dumped = {name: section.model_dump(mode="json", exclude_none=True) for name, section in given.items()}
        if self.data and self.data.valid is not None:
            del dumped["data"]["split"]  # not used, and an error beside ``valid``
        if self.model and self.model.hf_config is not None:
            dumped["model"]["hf_config"] = self.model.hf_config  # where null is a value: no sliding window
        return absolute_paths({**self.deepspeed, "curriculum_learning": {"enabled": False}, **dumped})

    def warnings(self) -> list[str]:
        """Return one line for each setting that is allowed but ill-advised."""
        return checks.warnings(self)


def _lengthened(model: ModelConfig | None, raw: Mapping[str, Any], data: DataConfig | None) -> ModelConfig | None:
    """Return a model with ``rope`` with positions for full-length samples, unless the file gives their number."""
    if model is None or model.rope is None or data is None or "max_position_embeddings" in raw["model"]:
        return model
    return model.model_copy(update={"max_position_embeddings": max(model.max_position_embeddings, data.seq_length)})


def _is_ours(name: str, raw: Mapping[str, Any]) -> bool:
    ours = (*OURS, "curriculum_learning", SCHEMA_KEY)
    return name in ours or (name == "scheduler" and token_schedule(raw["scheduler"]) is not None)
