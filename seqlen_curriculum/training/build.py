"""From a configuration and a model to the executor that trains it, and the function that exports its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.models.causal_lm import AnyCausalLM, save_model
from seqlen_curriculum.models.gpt2 import CausalLM
from seqlen_curriculum.training.engine import engine_of
from seqlen_curriculum.training.executor import DataParallel, Executor, Pipeline, SequenceParallel, TensorParallel
from seqlen_curriculum.training.pipeline import GPT2Stages
from seqlen_curriculum.training.sequence_parallel import split_attention
from seqlen_curriculum.training.telemetry import log_rank0
from seqlen_curriculum.training.tensor_parallel import prepare, whole

__all__ = ["assemble", "write_model"]


def assemble(config: RunConfig, model: CausalLM | AnyCausalLM) -> tuple[Executor, Callable[[Path], None]]:
    """The executor that the file's degrees ask for, and what writes its weights as a Hugging Face folder, on all ranks.

    ``config`` is that of ``for_ranks``. ``model`` is changed as its engine needs it. Raises ConfigError.
    """
    keys, write = config.keys, partial(write_model, model)
    if isinstance(model, AnyCausalLM):
        return DataParallel(_engine(config, model)), write
    if keys.pipeline_stages > 1:
        stages = GPT2Stages(model, keys.pipeline_stages)
        return Pipeline(_engine(config, stages)), partial(stages.save_hf, model)
    if keys.tensor_parallel_size > 1:
        config, mpu = prepare(config, model)
        return TensorParallel(_engine(config, model, mpu)), write
    if keys.sequence_ranks > 1:
        group = split_attention(model, keys.sequence_ranks)
        # DeepSpeed is to take the ranks of a sequence for ranks with rows of their own.
        rows = config.deepspeed["train_batch_size"] * keys.sequence_ranks
        told = {key: value for key, value in config.deepspeed.items() if key != "sequence_parallel_size"}
        engine = _engine(replace(config, deepspeed={**told, "train_batch_size": rows}), model)
        return SequenceParallel(engine, group), write
    return DataParallel(_engine(config, model)), write


def _engine(config: RunConfig, model: torch.nn.Module, mpu: Any = None) -> Any:
    engine, *_ = engine_of(config, model=model, model_parameters=model.parameters(), mpu=mpu)
    if engine.zero_optimization_stage() == 0 and (engine.fp16_enabled() or engine.bfloat16_enabled()):
        log_rank0(
            "warning: half precision at ZeRO stage 0 updates weights unlike fp32; set zero_optimization.stage to 1"
        )
    return engine


def write_model(model: CausalLM | AnyCausalLM, folder: Path) -> None:
    """The weights as a Hugging Face folder, gathered one by one where ranks have parts of them."""
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weight = whole(name, parameter)
            if dist.get_rank() == 0:
                weights[name] = weight.cpu().clone()
    if dist.get_rank() == 0:
        save_model(model, folder, weights)
