"""DeepSpeed's own keys that a run is planned from: checked here, so that a mistake shows before any work is done.

Every other key of DeepSpeed's is handed on as it is, and its values are DeepSpeed's to judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Count, CountOrZero, Section, suggest

__all__ = ["DeepSpeedKeys", "batch_shape", "with_bf16", "without_max_grad_norm"]


class _Open(Section):
    """A section of DeepSpeed's: keys that aren't declared are kept."""

    model_config = ConfigDict(extra="allow")


class _Nested(_Open):
    @model_validator(mode="before")
    @classmethod
    def _not_misspelt(cls, data: Any) -> Any:
        for name in data if isinstance(data, dict) else ():
            meant = suggest(str(name), cls.model_fields, cutoff=0.85)
            if meant and name not in cls.model_fields:
                raise ValueError(f"{name} is unknown; did you mean '{meant}'?")
        return data


class _OptimizerParams(_Nested):
    lr: Annotated[float, Field(gt=0, lt=1e30)] | None = None
    """The learning rate that a schedule warms up to."""


class _Optimizer(_Nested):
    type: str
    params: _OptimizerParams = _OptimizerParams()


class _Scheduler(_Nested):
    type: str


class _Zero(_Nested):
    stage: Annotated[int, Field(ge=0, le=3)] = 0


class _Pipeline(_Nested):
    stages: Annotated[Count, BeforeValidator(lambda value: 1 if value == "auto" else value)] = 1


class _TensorParallel(_Nested):
    autotp_size: CountOrZero = 0
    """Ranks that share each layer."""
    partition_config: dict[str, Any] | None = None
    preset_model: str | None = None


class DeepSpeedKeys(_Open):
    """The part of a DeepSpeed config that this package reads."""

    train_batch_size: Count | None = None
    """Rows of one optimizer step over all ranks: it fixes the run whatever the number of ranks."""
    train_micro_batch_size_per_gpu: Count | None = None
    """Rows of a micro-batch at full length."""
    gradient_accumulation_steps: Count | None = None
    """Micro-batches of a step on one rank."""
    gradient_clipping: Annotated[float, Field(ge=0)] | None = None
    optimizer: _Optimizer | None = None
    scheduler: _Scheduler | None = None
    zero_optimization: _Zero | None = None
    fp16: dict[str, Any] | None = None
    bf16: dict[str, Any] | None = None
    amp: dict[str, Any] | None = None
    torch_autocast: dict[str, Any] | None = None
    pipeline: _Pipeline | None = None
    tensor_parallel: _TensorParallel | None = None
    sequence_parallel_size: Count | None = None

    @property
    def lr(self) -> float | None:
        """``optimizer.params.lr``."""
        return self.optimizer.params.lr if self.optimizer else None

    @property
    def zero_stage(self) -> int:
        """0 where ZeRO is off."""
        return self.zero_optimization.stage if self.zero_optimization else 0

    @property
    def pipeline_stages(self) -> int:
        """Ranks that a model's layers are cut over; 1 where there is no pipeline."""
        return self.pipeline.stages if self.pipeline else 1

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share each layer (AutoTP)."""
        return max(self.tensor_parallel.autotp_size, 1) if self.tensor_parallel else 1

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share each sequence (Ulysses)."""
        return self.sequence_parallel_size or 1

    @property
    def degrees(self) -> dict[str, int]:
        """How many ranks share a model or a sequence, by the key that says so."""
        return {
            "pipeline.stages": self.pipeline_stages,
            "tensor_parallel.autotp_size": self.tensor_parallel_size,
            "sequence_parallel_size": self.sequence_ranks,
        }

    @property
    def model_cuts(self) -> dict[str, int]:
        """Those of ``degrees`` that cut the model itself into parts."""
        return {key: degree for key, degree in self.degrees.items() if degree > 1 and key != "sequence_parallel_size"}

    @property
    def enabled_precisions(self) -> list[str]:
        """The sections that switch a precision other than fp32 on."""
        sections = {"fp16": self.fp16, "bf16": self.bf16, "amp": self.amp, "torch_autocast": self.torch_autocast}
        return [name for name, section in sections.items() if section and section.get("enabled")]

    def data_ranks(self, world_size: int) -> int:
        """Ranks that read rows of their own: all of them over those that share a model or a sequence. ConfigError."""
        ranks, ragged = divmod(world_size, math.prod(self.degrees.values()))
        if ragged:
            told = " x ".join(f"{name} {degree}" for name, degree in self.degrees.items() if degree > 1)
            raise ConfigError(f"{told}: doesn't divide the {world_size} ranks; start a multiple of it or lower it")
        return ranks


def batch_shape(keys: DeepSpeedKeys, world_size: int) -> tuple[int, int, int]:
    """Rows of a rank, of a micro-batch, and micro-batches of a step, for ``world_size`` ranks. ConfigError.

    Ranks that share a model or a sequence count once.
    """
    world_size = keys.data_ranks(world_size)
    micro, accumulation = keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps
    total = keys.train_batch_size or (micro or 1) * (accumulation or 1) * world_size
    rows, ragged = divmod(total, world_size)
    if ragged:
        raise ConfigError(f"train_batch_size: {total} rows don't divide over {world_size} ranks; make it a multiple")
    if micro and accumulation and micro * accumulation != rows:
        raise ConfigError(
            f"gradient_accumulation_steps: {accumulation} x train_micro_batch_size_per_gpu {micro} x {world_size} ranks is "
            f"{accumulation * micro * world_size}, not train_batch_size {total}; leave one of them out"
        )
    for key, value in (("train_micro_batch_size_per_gpu", micro), ("gradient_accumulation_steps", accumulation)):
        if value and rows % value:
            raise ConfigError(
                f"{key}: {value} doesn't divide the {rows} rows of a rank (train_batch_size {total} over {world_size} "
                "ranks); give a divisor"
            )
    micro = micro or rows // (accumulation or 1)
    return rows, micro, rows // micro


def with_bf16(config: Mapping[str, Any], found: list[str]) -> dict[str, Any]:
    """Move ``bfloat16``, DeepSpeed's older name, to ``bf16``."""
    if "bfloat16" not in config:
        return dict(config)
    if "bf16" in config:
        found.append("bfloat16: DeepSpeed's older name of bf16, which is given too; keep the latter")
    return {**{name: value for name, value in config.items() if name != "bfloat16"}, "bf16": config["bfloat16"]}


def without_max_grad_norm(config: Mapping[str, Any], found: list[str]) -> dict[str, Any]:
    """Move ``optimizer.params.max_grad_norm``, which old files hold and DeepSpeed refuses, to ``gradient_clipping``."""
    optimizer = config.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, Mapping) else None
    if not isinstance(optimizer, Mapping) or not isinstance(params, Mapping) or "max_grad_norm" not in params:
        return dict(config)
    norm = params["max_grad_norm"]
    clipping = config.get("gradient_clipping", norm)
    if clipping != norm:
        found.append(
            f"optimizer.params.max_grad_norm: {norm} differs from gradient_clipping {clipping}; keep the latter"
        )
    rest = {name: value for name, value in params.items() if name != "max_grad_norm"}
    return {**config, "gradient_clipping": clipping, "optimizer": {**optimizer, "params": rest}}
