"""The DeepSpeed keys that affect the plan of a run, checked before any work starts.

``deepspeed_rules.py`` lists all keys and which of them DeepSpeed gets. DeepSpeed checks the values of the others.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Count, CountOrZero, Section, suggest
from seqlen_curriculum.strict_json import shown

__all__ = ["DeepSpeedKeys", "OtherScheduler", "batch_shape"]


class _Open(Section):
    """A section of a DeepSpeed configuration. Undeclared keys are kept."""

    model_config = ConfigDict(extra="allow")


class _Nested(_Open):
    """A section below the top level: an undeclared key that resembles a declared one is an error."""

    @model_validator(mode="before")
    @classmethod
    def _not_misspelt(cls, data: Any) -> Any:
        # The cutoff is high, because most of DeepSpeed's keys aren't declared here and must pass unchanged.
        undeclared = [name for name in data if name not in cls.model_fields] if isinstance(data, dict) else []
        for name in undeclared:
            meant = suggest(str(name), cls.model_fields, cutoff=0.85)
            if meant:
                raise ValueError(f"{shown(str(name))[1:-1]} is unknown; did you mean '{meant}'?")
        return data


class OptimizerParams(_Nested):
    """The optimizer's arguments. Keys that aren't listed here are passed to the optimizer unchanged."""

    lr: Annotated[float, Field(gt=0, lt=1e30)] | None = None
    """Peak learning rate. A schedule warms up to it."""

    @model_validator(mode="after")
    def _two_betas(self) -> OptimizerParams:
        betas = (self.model_extra or {}).get("betas")
        if isinstance(betas, list) and (
            len(betas) != 2 or not all(type(b) in (int, float) and 0 <= b < 1 for b in betas)
        ):
            raise ValueError(
                f"betas: {shown(betas)} is not valid: give two numbers from 0 to below 1, as in [0.9, 0.95]"
            )
        return self


class OptimizerKeys(_Nested):
    """The ``optimizer`` section."""

    type: str
    """Name of an optimizer of DeepSpeed or ``torch.optim``, such as ``Adam``."""
    params: OptimizerParams = OptimizerParams()
    """The optimizer's arguments."""


class OtherScheduler(_Nested):
    """One of DeepSpeed's learning rate schedules, such as ``WarmupDecayLR``. It is passed to DeepSpeed unchanged."""

    type: str
    """Name of a schedule of DeepSpeed or ``torch.optim.lr_scheduler``."""


class ZeroKeys(_Nested):
    """The ``zero_optimization`` section. All other keys are passed to DeepSpeed unchanged."""

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage. 0: off. 1: shard optimizer states over the data-parallel ranks. 2: gradients too. 3: weights too."""


class PipelineKeys(_Nested):
    """The ``pipeline`` section."""

    # "auto" is DeepSpeed's default. Here it means no pipeline.
    stages: Annotated[
        Count,
        BeforeValidator(lambda value: 1 if value == "auto" else value, json_schema_input_type=Count | Literal["auto"]),
    ] = 1
    """Number of stages that the layers are divided into, one rank each."""


class TensorParallelKeys(_Nested):
    """The ``tensor_parallel`` section."""

    autotp_size: CountOrZero = 0
    """Number of ranks that share each layer. 0 or 1: off."""
    partition_config: dict[str, Any] | None = None
    """Partitioning of the layers of a model other than GPT-2."""
    preset_model: str | None = None
    """Name of a model whose partitioning DeepSpeed knows."""


class DeepSpeedKeys(_Open):
    """The keys of a DeepSpeed config that this package reads."""

    train_batch_size: Count | None = None
    """Rows per optimizer step over all ranks. The run is the same on any number of ranks."""
    train_micro_batch_size_per_gpu: Count | None = None
    """Rows per micro-batch at full length."""
    gradient_accumulation_steps: Count | None = None
    """Micro-batches per step on one rank."""
    gradient_clipping: Annotated[float, Field(ge=0)] | None = None
    """Maximum norm of a step's gradient. 0: no clipping."""
    optimizer: OptimizerKeys | None = None
    """The optimizer and its arguments."""
    scheduler: OtherScheduler | None = None
    """The learning rate schedule."""
    zero_optimization: ZeroKeys | None = None
    """ZeRO: sharding of optimizer states, gradients and weights over the ranks."""
    fp16: dict[str, Any] | None = None
    """Mixed precision in fp16 with loss scaling: ``{"enabled": true}``. A run has one precision."""
    bf16: dict[str, Any] | None = None
    """Mixed precision in bf16: ``{"enabled": true}``. ``bfloat16`` is DeepSpeed's older name for it."""
    torch_autocast: dict[str, Any] | None = None
    """Mixed precision by ``torch.autocast``."""
    data_types: dict[str, Any] | None = None
    """``grad_accum_dtype``: the dtype in which gradients accumulate. In half precision with ZeRO the default is fp32."""
    communication_data_type: str | None = None
    """The dtype in which gradients are reduced over the ranks."""
    pipeline: PipelineKeys | None = None
    """Pipeline parallelism."""
    tensor_parallel: TensorParallelKeys | None = None
    """Tensor parallelism (AutoTP)."""
    sequence_parallel_size: Count | None = None
    """Number of ranks that share each sequence (Ulysses)."""

    @property
    def lr(self) -> float | None:
        """``optimizer.params.lr``."""
        return self.optimizer.params.lr if self.optimizer else None

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage; 0 if ZeRO is off."""
        return self.zero_optimization.stage if self.zero_optimization else 0

    @property
    def pipeline_stages(self) -> int:
        """Number of pipeline stages; 1 without a pipeline."""
        return self.pipeline.stages if self.pipeline else 1

    @property
    def tensor_parallel_size(self) -> int:
        """Number of ranks that share each layer (AutoTP)."""
        return max(self.tensor_parallel.autotp_size, 1) if self.tensor_parallel else 1

    @property
    def sequence_ranks(self) -> int:
        """Number of ranks that share each sequence (Ulysses)."""
        return self.sequence_parallel_size or 1

    @property
    def degrees(self) -> dict[str, int]:
        """The number of ranks that share a model or a sequence, by the key that sets it."""
        return {
            "pipeline.stages": self.pipeline_stages,
            "tensor_parallel.autotp_size": self.tensor_parallel_size,
            "sequence_parallel_size": self.sequence_ranks,
        }

    @property
    def model_cuts(self) -> dict[str, int]:
        """The ``degrees`` above 1 that split the model itself."""
        return {key: degree for key, degree in self.degrees.items() if degree > 1 and key != "sequence_parallel_size"}

    @property
    def enabled_precisions(self) -> list[str]:
        """The sections that enable a precision other than fp32."""
        sections = {"fp16": self.fp16, "bf16": self.bf16, "torch_autocast": self.torch_autocast}
        return [name for name, section in sections.items() if section and section.get("enabled")]

    @property
    def is_half(self) -> bool:
        """True if DeepSpeed computes with 16-bit weights and gradients."""
        return bool({"bf16", "fp16"} & set(self.enabled_precisions))

    @property
    def fp32_gradients(self) -> dict[str, Any]:
        """The keys that make DeepSpeed accumulate and reduce 16-bit gradients in fp32; empty if none is to be added.

        A file that sets one of these keys is left unchanged. DeepSpeed refuses fp32 accumulation at ZeRO stage 0, and its
        pipelines accumulate incorrectly with it.
        """
        # The sum of n bf16 gradients in bf16 rounds n - 1 times to 8 binary digits; in fp32 it rounds once, at the end.
        data_types = self.data_types or {}
        given = self.communication_data_type is not None or data_types.get("grad_accum_dtype") is not None
        if not self.is_half or self.zero_stage == 0 or self.pipeline_stages > 1 or given:
            return {}
        return {"data_types": {**data_types, "grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}

    @property
    def gradient_dtype(self) -> str:
        """The dtype in which gradients accumulate and reduce; ``"fp32 and bf16"`` if the file sets them differently."""
        if not self.is_half or self.fp32_gradients:
            return "fp32"
        own = self.enabled_precisions[0]
        accumulated = (self.data_types or {}).get("grad_accum_dtype") or own
        reduced = self.communication_data_type or own
        return accumulated if accumulated == reduced else f"{accumulated} and {reduced}"

    def data_ranks(self, world_size: int) -> int:
        """Return the number of data-parallel ranks: ``world_size`` / the product of ``degrees``. Raises ConfigError."""
        # 16 ranks with 4 pipeline stages: 4 ranks share a copy of the model and read the same rows, so 4 are data-parallel.
        ranks, ragged = divmod(world_size, math.prod(self.degrees.values()))
        if ragged:
            product = " x ".join(f"{name} {degree}" for name, degree in self.degrees.items() if degree > 1)
            raise ConfigError(f"{product}: doesn't divide the {world_size} ranks; start a multiple of it or lower it")
        return ranks


def batch_shape(keys: DeepSpeedKeys, world_size: int) -> tuple[int, int, int]:
    """Return (rows per rank, rows per micro-batch, micro-batches per step) for ``world_size`` ranks. Raises ConfigError.

    Ranks that share a model or a sequence count once. DeepSpeed's rule, from which missing keys are derived:
    ``train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * data-parallel ranks``.
    """
    world_size = keys.data_ranks(world_size)
    micro, accumulation = keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps
    # Without train_batch_size a missing part counts as 1.
    total = keys.train_batch_size or (micro or 1) * (accumulation or 1) * world_size
    rows, ragged = divmod(total, world_size)
    if ragged:
        raise ConfigError(
            f"train_batch_size: {total} rows don't divide over {world_size} ranks; use a multiple of {world_size}"
        )
    if micro and accumulation and micro * accumulation != rows:
        raise ConfigError(
            f"gradient_accumulation_steps: {accumulation} x train_micro_batch_size_per_gpu {micro} x {world_size} ranks is "
            f"{accumulation * micro * world_size}, not train_batch_size {total}; remove one of them"
        )
    for key, value in (("train_micro_batch_size_per_gpu", micro), ("gradient_accumulation_steps", accumulation)):
        if value and rows % value:
            raise ConfigError(
                f"{key}: {value} doesn't divide the {rows} rows of a rank (train_batch_size {total} over {world_size} "
                "ranks); give a divisor"
            )
    # 64 rows per rank: micro-batches of 8 make 8 accumulation steps; without either key one micro-batch has all rows.
    micro = micro or rows // (accumulation or 1)
    return rows, micro, rows // micro
