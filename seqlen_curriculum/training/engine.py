"""``deepspeed.initialize`` for a configuration that holds our sections."""

from __future__ import annotations

import argparse
import inspect
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.optim import Optimizer

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.training.lr_scheduler import TokenCosineLR
from seqlen_curriculum.training.pipeline import follow_shapes

__all__ = ["begin_step", "engine_of", "initialize", "skip_step"]


def initialize(*args: Any, curriculum_kwarg: str | None = None, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Same arguments but one, same return as ``deepspeed.initialize``: (engine, optimizer, dataloader, lr_scheduler).

    ``config`` is a path, a dict or a ``RunConfig``; ``args.deepspeed_config`` serves when it is None. Our sections are
    taken out before DeepSpeed sees the rest. The engine gains ``curriculum_scheduler``, whose
    ``update_difficulty(engine.global_steps + 1)`` gives the length of the step to come (None in a file with neither a
    curriculum nor a data section); a ``TokenCosineLR`` follows the engine's steps by itself, counting the tokens of steps
    that fp16 skipped. Under a ``batch_size_warmup`` the loop reads ``RunConfig.timeline().rows(step)`` rows a step and
    hands them to ``accumulate``, so ``config`` must be a ``RunConfig``. With ``curriculum_kwarg`` each training forward
    hands the model today's length under that keyword, for models that truncate inside; DeepSpeed up to 0.19.7 did so as
    ``curriculum_seqlen``. A pipeline's ``train_batch`` and ``eval_batch`` follow shapes that change. Raises ConfigError,
    also for what DeepSpeed refuses.
    """
    given = inspect.signature(deepspeed.initialize).bind(*args, **kwargs).arguments
    named = given.pop("args", None)
    run = _run_config(named, given.pop("config", None), given.pop("config_params", None))
    if run.adapts:
        raise ConfigError(
            "curriculum_learning.schedule_type: adaptive goes by the evaluations of a run, which DeepSpeed's engine doesn't "
            "know of; train with scripts/train_gpt2.py, or use fixed_linear"
        )
    return engine_of(run, curriculum_kwarg, args=_without_config(named), **given)


def engine_of(run: RunConfig, curriculum_kwarg: str | None = None, **given: Any) -> tuple[Any, Any, Any, Any]:
    """``initialize`` for a loop that does all that ``run`` asks for; ``given`` is for ``deepspeed.initialize``.

    Returns and raises as ``initialize``.
    """
    run = run if run.keys.train_batch_size else run.for_ranks(_ranks(run, given))
    if run.scheduler is not None:
        if given.get("lr_scheduler") is not None:
            raise ConfigError("scheduler: the file asks for TokenCosineLR and lr_scheduler= is given too; keep one")
        given["lr_scheduler"] = _lr_scheduler(run)
    scheduler = run.curriculum_scheduler() if run.curriculum or run.data else None
    if curriculum_kwarg is not None:
        _check_takes_length(given.get("model"), curriculum_kwarg, scheduler is not None)
    engine, *others = _deepspeed_initialize(config=dict(run.deepspeed), **given)
    _free_shared_memory(engine)
    engine.curriculum_scheduler = scheduler
    if isinstance(engine, PipelineEngine):
        follow_shapes(engine, begin_step)
    else:
        engine.register_forward_pre_hook(_follow_steps)
        if curriculum_kwarg is not None:
            engine.register_forward_pre_hook(_hand_over_length(curriculum_kwarg), with_kwargs=True)
    optimizer, dataloader, lr_scheduler = others
    return engine, optimizer, dataloader, lr_scheduler


def _ranks(run: RunConfig, given: Mapping[str, Any]) -> int:
    """The ranks of the launch, as far as the file's degrees and the user's own ``mpu`` or ``PipelineModule`` tell."""
    model, mpu = given.get("model"), given.get("mpu")
    mpu = model.mpu() if isinstance(model, PipelineModule) else mpu
    if mpu is not None:
        return int(mpu.get_data_parallel_world_size()) * math.prod(run.keys.degrees.values())
    return int(os.environ.get("WORLD_SIZE", "1"))


def _deepspeed_initialize(**arguments: Any) -> tuple[Any, ...]:
    """DeepSpeed judges its own keys with assertions and bare errors; tell whose words they are."""
    try:
        return tuple(deepspeed.initialize(**arguments))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"DeepSpeed refuses its part of the configuration: {type(error).__name__}: {error}"
        ) from error


def _free_shared_memory(engine: Any) -> None:
    """Unlink the 66 MiB that each CPU rank of DeepSpeed leaves in /dev/shm; by now all ranks have mapped them."""
    name = f"deepspeed_allreduce_buffer_*_{os.environ.get('MASTER_PORT')}_{engine.global_rank}"
    for buffer in Path("/dev/shm").glob(name):
        buffer.unlink(missing_ok=True)


def _run_config(args: argparse.Namespace | None, *configs: object) -> RunConfig:
    given = [config for config in (*configs, getattr(args, "deepspeed_config", None)) if config is not None]
    if len(given) > 1:
        raise ConfigError(
            "config: given more than once, of config=, config_params= and args.deepspeed_config; keep one"
        )
    config = given[0] if given else None
    if isinstance(config, RunConfig):
        return config
    if not isinstance(config, (Mapping, str, Path)):
        raise ConfigError(f"config: {config!r} is neither a path, a dict nor a RunConfig; give one of them")
    run = RunConfig.from_dict(config) if isinstance(config, Mapping) else RunConfig.load(config)
    if run.batch_size_warmup is not None:  # in silence DeepSpeed's engine would keep to train_batch_size
        raise ConfigError(
            "batch_size_warmup: DeepSpeed's engine doesn't follow it; give config=RunConfig.load(path), read its "
            "timeline().rows(step) rows in each step, and hand them to training.accumulate.accumulate"
        )
    return run


def _without_config(args: argparse.Namespace | None) -> argparse.Namespace | None:
    """DeepSpeed refuses a config given twice, and would read our sections from the file."""
    return argparse.Namespace(**{**vars(args), "deepspeed_config": None}) if args is not None else None


def _lr_scheduler(run: RunConfig) -> Any:
    """What DeepSpeed calls with the optimizer it has made, or was given."""
    timeline = run.timeline()

    def build(optimizer: Optimizer) -> TokenCosineLR:
        rate = run.learning_rate(timeline, max_lr=max(group["lr"] for group in optimizer.param_groups))
        assert rate is not None
        return TokenCosineLR(optimizer, rate)

    return build


def _check_takes_length(model: Any, keyword: str, has_lengths: bool) -> None:
    """ConfigError if the model can't be told today's length, or there is none to tell."""
    if not has_lengths:
        raise ConfigError(
            f"curriculum_kwarg: {keyword!r} asks for the step's length, but no section gives it; add curriculum_learning "
            "or data, or leave curriculum_kwarg out"
        )
    try:
        inspect.signature(model.forward).bind_partial(**{keyword: None})
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"curriculum_kwarg: the forward of {type(model).__name__} takes no keyword {keyword!r}; add it to forward's "
            "parameters and truncate there, or leave curriculum_kwarg out and cut the batch"
        ) from error


def _trains(engine: Any) -> bool:
    return torch.is_grad_enabled() and bool(engine.module.training)


def _follow_steps(engine: Any, _inputs: Any) -> None:
    if _trains(engine):
        begin_step(engine)


def begin_step(engine: Any) -> None:
    """Put the coming step's length and rate in force, also after a step that fp16 skipped or a resume."""
    step = engine.global_steps + 1
    if engine.curriculum_scheduler is not None:
        engine.curriculum_scheduler.update_difficulty(step)
    if isinstance(engine.lr_scheduler, TokenCosineLR):
        engine.lr_scheduler.seek(step)


def skip_step(engine: Any, rows: int) -> None:
    """Count the step begun, of ``rows`` rows as the engine counts them, as done: rates move on, nothing is trained."""
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step()
    engine.global_steps += 1
    engine.global_samples += rows


def _hand_over_length(keyword: str) -> Callable[[Any, Any, dict[str, Any]], tuple[Any, dict[str, Any]]]:
    """The hook that adds today's length, which ``_follow_steps`` has set, to the keywords of a training forward."""

    def hook(engine: Any, inputs: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        today = {keyword: engine.curriculum_scheduler.get_current_difficulty()} if _trains(engine) else {}
        return inputs, {**keywords, **today}

    return hook
