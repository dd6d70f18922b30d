"""Check for combinations of engine, model and parallel degrees that can't train, from the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from seqlen_curriculum.config.architectures import FAMILIES
from seqlen_curriculum.config.deepspeed import DeepSpeedKeys
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.muon import trains_by_muon
from seqlen_curriculum.schedule.shortening import Method

__all__ = ["EngineChecks", "engine_problems", "length_problems"]

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def engine_problems(keys: DeepSpeedKeys, model: ModelConfig | None, compiled: bool, method: Method) -> list[str]:
    """Return one line per reason why this model can't be trained as configured; ``compiled`` is ``training.compile``."""
    checks = EngineChecks(keys, model, compiled, method)
    return [
        *checks.precision(),
        *checks.optimizer(),
        *checks.pipeline(),
        *checks.tensor_parallel(),
        *checks.sizes(),
        *checks.compilation(),
        *checks.architecture(),
    ]


def length_problems(keys: DeepSpeedKeys, lengths: Sequence[int]) -> list[str]:
    """Return one line if any of ``lengths`` is not a multiple of the number of ranks that share a sequence."""
    degree = keys.sequence_ranks
    ragged = [length for length in lengths if length % degree]
    if not ragged:
        return []
    return [
        f"sequence_parallel_size: {degree} doesn't divide the length {ragged[0]} ({len(ragged)} of this run's "
        f"{len(lengths)} lengths); make schedule_config.difficulty_step or training.seqlen_bucket a multiple of it, and "
        "max_difficulty and data.seq_length too"
    ]


@dataclass(frozen=True)
class EngineChecks:
    """The checks of one run; each method yields one line per problem."""

    keys: DeepSpeedKeys
    model: ModelConfig | None
    compiled: bool
    """``training.compile``."""
    method: Method

    @property
    def is_half_without_zero(self) -> bool:
        """True if 16-bit weights are trained without ZeRO."""
        return self.keys.zero_stage == 0 and self.keys.is_half

    def _of_config(self, key: str) -> Any:
        """Return a value of the ``config.json`` of an architecture other than GPT-2, or its default; else None."""
        config = self.model.architecture if self.model and not self.model.is_gpt2 else None
        if config is None:
            return None
        family = FAMILIES.get(config["model_type"])
        return config.get(key, family.defaults.get(key) if family else None)

    def precision(self) -> Iterator[str]:
        enabled = self.keys.enabled_precisions
        if len(enabled) > 1:
            names = " and ".join(f"{name}.enabled" for name in enabled)
            yield f"{names}: only one precision can be enabled; keep one of them"

    def optimizer(self) -> Iterator[str]:
        kind = self.keys.optimizer.type if self.keys.optimizer else ""
        if self.keys.zero_stage == 3 and trains_by_muon(kind) and self.keys.zero_optimization:
            scatter = (self.keys.zero_optimization.model_extra or {}).get("reduce_scatter", True)
            if scatter:  # DeepSpeed 0.19.8 refuses it on every rank
                yield (
                    f"zero_optimization.reduce_scatter: {scatter} doesn't work with optimizer.type {kind} at stage 3; set "
                    "it to false, or the stage to 2 or below"
                )

    def pipeline(self) -> Iterator[str]:
        stages, zero_stage = self.keys.pipeline_stages, self.keys.zero_stage
        if stages == 1:
            return
        if self.model and stages > self.model.num_layers:
            yield (
                f"pipeline.stages: {stages} is above model.num_layers {self.model.num_layers}, and every stage needs a "
                "layer; lower it"
            )
        if zero_stage >= 2:  # DeepSpeed's pipeline engine accumulates whole gradients, which ZeRO-2 and 3 divide
            yield f"zero_optimization.stage: {zero_stage} doesn't work with pipeline.stages {stages}; set it to 0 or 1"
        if self.is_half_without_zero:
            yield (
                f"zero_optimization.stage: half precision with pipeline.stages {stages} needs stage 1, whose checkpoints "
                "DeepSpeed can load; set it to 1"
            )
        sums, own = (self.keys.data_types or {}).get("grad_accum_dtype"), self.keys.enabled_precisions
        if self.keys.is_half and sums not in (None, *own):
            # In DeepSpeed 0.19.8 every stage except the last adds each bf16 gradient twice. In fp16 the gradient of the tied
            # embedding is read from where it is no longer stored.
            yield (
                f"data_types.grad_accum_dtype: {sums} accumulates {own[0]} gradients wrongly with pipeline.stages {stages}; "
                "remove it"
            )
        if self.keys.optimizer and trains_by_muon(self.keys.optimizer.type):
            # DeepSpeed 0.19.8 doesn't divide the parameters of a pipeline between Muon and Adam.
            yield f"optimizer.type: {self.keys.optimizer.type} doesn't work with pipeline.stages {stages}; use Adam"
        for name, degree in self.keys.degrees.items():
            if name != "pipeline.stages" and degree > 1:
                yield f"{name}: {degree} doesn't work together with pipeline.stages {stages}; set one of them to 1"

    def tensor_parallel(self) -> Iterator[str]:
        section, degree = self.keys.tensor_parallel, self.keys.tensor_parallel_size
        if section is None or degree == 1:
            return
        if self.is_half_without_zero:
            yield (
                f"zero_optimization.stage: half precision with tensor_parallel.autotp_size {degree} needs stage 1, because "
                "without ZeRO DeepSpeed clips by a norm that omits the weights of other ranks; set it to 1"
            )
        if self.keys.sequence_ranks > 1:
            yield (
                f"tensor_parallel.autotp_size: {degree} doesn't work together with sequence_parallel_size "
                f"{self.keys.sequence_parallel_size}; set one of them to 1"
            )
        for name in ("partition_config", "preset_model"):
            value = getattr(section, name)
            if self.model and value is not None:
                yield (
                    f"tensor_parallel.{name}: {value!r} isn't used, because the architecture of the model section has its "
                    "own partitioning; remove it"
                )

    def sizes(self) -> Iterator[str]:
        if self.model is None:
            return
        # Tensor-parallel ranks divide the heads of each layer. Ulysses ranks divide the sequence, but exchange it for
        # heads in attention: with 12 heads over 4 ranks each computes 3 heads of the whole sequence.
        heads, grouped = self.model.num_attention_heads, self._of_config("num_key_value_heads")
        inner = self._of_config("intermediate_size")
        sizes = {"the {} heads of model.num_attention_heads": heads, "the {} heads of num_key_value_heads": grouped}
        divided = {
            "tensor_parallel.autotp_size": {**sizes, "intermediate_size {}": inner},
            "sequence_parallel_size": sizes,
        }
        for name, sizes_of in divided.items():
            degree = self.keys.degrees[name]
            for what, size in sizes_of.items():
                if isinstance(size, int) and size % degree:
                    yield f"{name}: {degree} doesn't divide {what.format(size)}; set it to a divisor"

    def compilation(self) -> Iterator[str]:
        if self.compiled and self.method == "window":
            yield (
                'training.compile: true compiles one graph per length with curriculum_learning.method "window"; set it to '
                'false, or method to "segment"'
            )
        if self.compiled and self.keys.zero_stage == 3:
            yield (
                "training.compile: true doesn't work with zero_optimization.stage 3, which gathers weights inside every "
                "block and breaks it into dozens of graphs; set the stage to 2 or compile to false"
            )

    def architecture(self) -> Iterator[str]:
        if self.model is not None and self.model.is_encoder:  # see objective.py
            return
        stages, degree = self.keys.pipeline_stages, self.keys.tensor_parallel_size
        experts = next((key for key in _EXPERTS if self._of_config(key)), None)
        if degree > 1 and experts:
            yield (
                f"tensor_parallel.autotp_size: {degree} doesn't work with {experts} {self._of_config(experts)}, because "
                "AutoTP doesn't divide experts; set it to 1"
            )
        if stages > 1 and self._of_config("output_router_logits"):
            yield (
                f"pipeline.stages: {stages} doesn't work with output_router_logits true, because the auxiliary loss needs "
                "the routers of all layers; set stages to 1 or output_router_logits to false"
            )
