"""What engines can't do together, and degrees that don't divide: told from the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from seqlen_curriculum.config.deepspeed import DeepSpeedKeys
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.schedule.shortening import Method

__all__ = ["engine_problems", "length_problems"]


def engine_problems(keys: DeepSpeedKeys, model: ModelConfig | None, compiled: bool, method: Method) -> list[str]:
    """One line for each reason why this model could not be trained so; ``compiled`` is ``training.compile``."""
    return [
        *_precision(keys),
        *_pipeline(keys, model),
        *_tensor(keys, model),
        *_heads(keys, model),
        *(_compiled(keys, method) if compiled else ()),
        *_other_than_gpt2(keys, model, compiled, method),
    ]


def length_problems(keys: DeepSpeedKeys, lengths: Sequence[int]) -> list[str]:
    """Of the lengths that a run trains and evaluates at: those that can't be cut over the ranks of a sequence."""
    degree = keys.sequence_ranks
    ragged = [length for length in lengths if length % degree]
    if not ragged:
        return []
    return [
        f"sequence_parallel_size: {degree} doesn't divide the length {ragged[0]} ({len(ragged)} of this run's "
        f"{len(lengths)} lengths); make schedule_config.difficulty_step or training.seqlen_bucket a multiple of it, and "
        "max_difficulty and data.seq_length too"
    ]


def _precision(keys: DeepSpeedKeys) -> Iterator[str]:
    enabled = keys.enabled_precisions
    if len(enabled) > 1:
        told = " and ".join(f"{name}.enabled" for name in enabled)
        yield f"{told}: a run has one precision; keep one of them"


def _pipeline(keys: DeepSpeedKeys, model: ModelConfig | None) -> Iterator[str]:
    stages = keys.pipeline_stages
    if stages == 1:
        return
    if model and stages > model.num_layers:
        yield f"pipeline.stages: {stages} is above model.num_layers {model.num_layers}; every stage needs a layer, lower it"
    if keys.zero_stage >= 2:
        yield f"zero_optimization.stage: {keys.zero_stage} doesn't work in a pipeline (pipeline.stages {stages}); set 0 or 1"
    if keys.zero_stage == 0 and set(keys.enabled_precisions) & {"bf16", "fp16"}:
        yield "zero_optimization.stage: half precision in a pipeline needs stage 1, whose checkpoints DeepSpeed can load"
    for name, degree in keys.degrees.items():
        if name != "pipeline.stages" and degree > 1:
            yield f"{name}: {degree} doesn't work together with pipeline.stages {stages}; set one of them to 1"


def _tensor(keys: DeepSpeedKeys, model: ModelConfig | None) -> Iterator[str]:
    section, degree = keys.tensor_parallel, keys.tensor_parallel_size
    if section is None or degree == 1:
        return
    if keys.zero_stage == 0 and set(keys.enabled_precisions) & {"bf16", "fp16"}:
        yield (
            f"zero_optimization.stage: half precision with tensor_parallel.autotp_size {degree} needs stage 1; without ZeRO "
            "DeepSpeed clips by a norm that leaves out the other ranks' weights"
        )
    if keys.sequence_ranks > 1:
        yield (
            f"tensor_parallel.autotp_size: {degree} doesn't work together with sequence_parallel_size "
            f"{keys.sequence_parallel_size}; set one of them to 1"
        )
    for name in ("partition_config", "preset_model"):
        if model and getattr(section, name) is not None:
            yield f"tensor_parallel.{name}: the model section's GPT-2 is cut in a way of its own; leave it out"


def _heads(keys: DeepSpeedKeys, model: ModelConfig | None) -> Iterator[str]:
    for name, degree in keys.degrees.items():
        if model and name != "pipeline.stages" and model.num_attention_heads % degree:
            heads = model.num_attention_heads
            yield f"{name}: {degree} doesn't divide the {heads} heads of model.num_attention_heads; give a divisor"


def _compiled(keys: DeepSpeedKeys, method: Method) -> Iterator[str]:
    if method == "window":
        yield (
            'training.compile: each length of curriculum_learning.method "window" would be a graph of its own; set compile '
            'to false, or method to "segment"'
        )
    if keys.zero_stage == 3:
        yield (
            "training.compile: ZeRO-3 gathers weights inside every block, which breaks it into dozens of graphs; set "
            "zero_optimization.stage to 2 or compile to false"
        )


def _other_than_gpt2(keys: DeepSpeedKeys, model: ModelConfig | None, compiled: bool, method: Method) -> Iterator[str]:
    if model is None or model.initial is None or model.is_gpt2:
        return
    told = f"a {model.initial.model_type} (model.hf_checkpoint), only a GPT-2"
    for name, degree in keys.degrees.items():
        if degree > 1:
            yield f"{name}: {degree} can't cut {told}; set it to 1: ZeRO 0 to 3 and offload train every model"
    if compiled:
        yield f"training.compile: can't compile {told}; set it to false"
    if method == "window":
        yield f'curriculum_learning.method: "window" can\'t be put into {told}; set it to "truncate" or "segment"'
