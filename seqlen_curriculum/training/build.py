"""Build the executor that trains a model, and the function that exports its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

from seqlen_curriculum.config.deepspeed import DeepSpeedKeys
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.causal_lm import AnyCausalLM, save_model
from seqlen_curriculum.models.gpt2 import CausalLM
from seqlen_curriculum.models.masked_lm import MaskedLM
from seqlen_curriculum.models.probe import Ability
from seqlen_curriculum.schedule.scheduler import CurriculumScheduler
from seqlen_curriculum.training.checkpoint_files import ModelWriter, nothing_to_write
from seqlen_curriculum.training.engine import Rate, build_engine
from seqlen_curriculum.training.executor import DataParallel, Executor, Pipeline, SequenceParallel, TensorParallel
from seqlen_curriculum.training.pipeline import pipeline_of
from seqlen_curriculum.training.sequence_parallel import split_attention
from seqlen_curriculum.training.telemetry import log_rank0
from seqlen_curriculum.training.tensor_parallel import gather_parameter, prepare

__all__ = ["build_executor", "model_writer"]


def build_executor(
    keys: DeepSpeedKeys,
    deepspeed_config: Mapping[str, Any],
    model: CausalLM | AnyCausalLM | MaskedLM,
    scheduler: CurriculumScheduler,
    rate: Rate | None = None,
) -> tuple[Executor, ModelWriter]:
    """Return the executor for the parallel degrees in ``keys``, and the writer of its weights as a Hugging Face folder.

    ``deepspeed_config`` is DeepSpeed's part of the file, with its batch keys for these ranks. ``rate`` is as in
    ``build_engine``. 16-bit gradients accumulate and reduce in fp32 unless the file gives their types. ``model`` is changed
    in place for its engine. Raises ConfigError.
    """
    write = partial(model_writer, model)
    if keys.fp32_gradients:
        log_rank0("gradients accumulate and reduce in fp32: data_types.grad_accum_dtype and communication_data_type")
        deepspeed_config = {**deepspeed_config, **keys.fp32_gradients}
    if isinstance(model, MaskedLM):
        return DataParallel(_engine(deepspeed_config, model, scheduler, rate)), write
    if isinstance(model, AnyCausalLM):
        _check_divisible(keys, model)
    if keys.pipeline_stages > 1:
        stages = pipeline_of(model, keys.pipeline_stages)
        return Pipeline(_engine(deepspeed_config, stages, scheduler, rate)), partial(stages.hf_writer, model)
    if keys.tensor_parallel_size > 1:
        partitioned, mpu = prepare(deepspeed_config, keys.tensor_parallel_size, model)
        return TensorParallel(_engine(partitioned, model, scheduler, rate, mpu)), write
    if keys.sequence_ranks > 1:
        group = split_attention(model, keys.sequence_ranks)
        # DeepSpeed must count the ranks of a sequence as ranks with their own rows: 8 rows on 4 ranks with 2 ranks per
        # sequence are 4 rows per rank, which DeepSpeed treats as 16 rows on 4 ranks.
        rows = deepspeed_config["train_batch_size"] * keys.sequence_ranks
        rest = {key: value for key, value in deepspeed_config.items() if key != "sequence_parallel_size"}
        return SequenceParallel(_engine({**rest, "train_batch_size": rows}, model, scheduler, rate), group), write
    return DataParallel(_engine(deepspeed_config, model, scheduler, rate)), write


def _check_divisible(keys: DeepSpeedKeys, model: AnyCausalLM) -> None:
    """Raise ConfigError if an architecture can't be divided as ``keys`` want, which the configuration alone doesn't show."""
    needs: dict[str, Ability] = {"tensor_parallel.autotp_size": "attention", "sequence_parallel_size": "windows"}
    for name, ability in needs.items():
        degree = keys.degrees[name]
        if degree == 1:
            continue
        model.require(ability, f"{name}: {degree}")
        # Defaults of transformers, which a configuration file may leave out.
        for size in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(model.lm.config, size, None)
            if isinstance(heads, int) and heads % degree:
                raise ConfigError(f"{name}: {degree} doesn't divide the {heads} heads of {size}; set it to a divisor")


def _engine(
    deepspeed_config: Mapping[str, Any],
    model: torch.nn.Module,
    scheduler: CurriculumScheduler,
    rate: Rate | None,
    mpu: Any = None,
) -> Any:
    # DeepSpeed's throughput timer synchronizes the device twice per micro-batch. The run log has tokens/s without it.
    timers = deepspeed_config.get("timers", {})
    if isinstance(timers, Mapping):  # else DeepSpeed refuses it
        deepspeed_config = {**deepspeed_config, "timers": {"throughput": {"enabled": False}, **timers}}
    weights = model.parameters()
    engine, *_ = build_engine(deepspeed_config, scheduler, rate, model=model, model_parameters=weights, mpu=mpu)
    if engine.zero_optimization_stage() == 0 and (engine.fp16_enabled() or engine.bfloat16_enabled()):
        log_rank0(
            "warning: half precision at ZeRO stage 0 updates weights unlike fp32; set zero_optimization.stage to 1"
        )
    return engine


def model_writer(model: CausalLM | AnyCausalLM | MaskedLM) -> Callable[[Path], None]:
    """Gather the weights on rank 0, one by one if they are sharded; return a function that writes them there.

    Call it on all ranks.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weight = gather_parameter(parameter)
            if dist.get_rank() == 0:
                weights[name] = weight.cpu().clone()
    return partial(save_model, model, weights=weights) if dist.get_rank() == 0 else nothing_to_write
