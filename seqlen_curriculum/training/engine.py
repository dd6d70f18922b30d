"""``deepspeed.initialize`` for a configuration that holds our sections."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.optim import Optimizer

from seqlen_curriculum.config.plan import RunPlan
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.errors import ConfigError, SeqlenCurriculumError
from seqlen_curriculum.launchers import launch
from seqlen_curriculum.schedule.scheduler import CurriculumScheduler
from seqlen_curriculum.schedule.token_lr import TokenCosine
from seqlen_curriculum.training.lr_scheduler import TokenCosineLR
from seqlen_curriculum.training.pipeline import follow_shapes
from seqlen_curriculum.training.start import join_ranks
from seqlen_curriculum.training.versions import check_deepspeed_version

__all__ = ["Rate", "begin_step", "build_engine", "follow_plan", "initialize", "skip_step"]

Rate: TypeAlias = Callable[[float], TokenCosine | None]
"""The rate of every step, given the largest ``lr`` of the optimizer."""
_REFUSING_PACKAGES = ("deepspeed", "pydantic", "torch")
"""Whose errors in ``deepspeed.initialize`` are about the configuration."""
_MONITORS = {"wandb": "wandb", "comet_ml": "comet"}
"""The sections of monitors that connect to a service, by their packages."""


def initialize(*args: Any, curriculum_kwarg: str | None = None, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Return (engine, optimizer, dataloader, lr_scheduler), as ``deepspeed.initialize`` does, with one argument more.

    ``config`` is a path, a dict or a ``RunConfig``; ``args.deepspeed_config`` serves when it is None. Our sections are
    taken out before DeepSpeed sees the rest. The engine gains ``curriculum_scheduler``, whose
    ``update_difficulty(engine.global_steps + 1)`` gives the length of the step to come (None in a file with neither a
    curriculum nor a data section); a ``TokenCosineLR`` follows the engine's steps by itself, counting the tokens of steps
    that fp16 skipped. Under a ``batch_size_warmup`` or a ``batch_growth`` the loop reads ``RunConfig.timeline().rows(step)``
    rows a step and hands them to ``accumulate``, so ``config`` must be a ``RunConfig``. With ``curriculum_kwarg`` each
    training forward hands the model the step's length under that keyword, for models that truncate inside; DeepSpeed up to
    0.19.7 did so as ``curriculum_seqlen``. A pipeline's ``train_batch`` and ``eval_batch`` follow shapes that change. Raises
    ConfigError, also for what DeepSpeed refuses.
    """
    given = inspect.signature(deepspeed.initialize).bind(*args, **kwargs).arguments
    named = given.pop("args", None)
    run = _run_config(named, given.pop("config", None), given.pop("config_params", None))
    if run.adapts:
        raise ConfigError(
            "curriculum_learning.schedule_type: adaptive follows the evaluations of a run, which DeepSpeed's engine doesn't "
            "do; train with slw train, or use fixed_linear"
        )
    run = run if run.keys.train_batch_size else run.for_ranks(_ranks(run, given))
    if run.scheduler is not None and given.get("lr_scheduler") is not None:
        raise ConfigError("scheduler: the file asks for TokenCosineLR and lr_scheduler= is given too; keep one")
    scheduler = run.curriculum_scheduler() if run.curriculum or run.data else None
    rate = run.plan.learning_rate if run.scheduler is not None else None
    if curriculum_kwarg is not None:
        _check_takes_length(given.get("model"), curriculum_kwarg, scheduler is not None)
    join_ranks(run.deepspeed)
    if named is not None:  # DeepSpeed refuses a config given twice, and would read our sections from the file
        values = {**vars(named), "deepspeed_config": None}
        if "local_rank" in values:  # a rank that sees one device alone is its number 0
            values["local_rank"] = int(os.environ.get("LOCAL_RANK", values["local_rank"]))
        named = argparse.Namespace(**values)
    engine, *others = build_engine(run.deepspeed, scheduler, rate, args=named, **given)
    if not isinstance(engine, PipelineEngine):
        engine.register_forward_pre_hook(_follow_steps)
        if curriculum_kwarg is not None:
            engine.register_forward_pre_hook(_hand_over_length(curriculum_kwarg), with_kwargs=True)
    optimizer, dataloader, lr_scheduler = others
    return engine, optimizer, dataloader, lr_scheduler


def build_engine(
    deepspeed_config: Mapping[str, Any],
    scheduler: CurriculumScheduler | None,
    rate: Rate | None = None,
    **given: Any,
) -> tuple[Any, Any, Any, Any]:
    """Build DeepSpeed's engine for ``scheduler`` and ``rate``; ``given`` is for ``deepspeed.initialize``.

    A pipeline follows both by itself; other engines do where ``begin_step`` is called before each step. Without ``rate``
    the learning rate is left to DeepSpeed. Returns and raises as ``initialize``.
    """
    if rate is not None:
        given["lr_scheduler"] = partial(_token_lr, rate)
    check_deepspeed_version()
    engine, *others = _deepspeed_initialize(config=dict(deepspeed_config), **given)
    _free_shared_memory(engine)
    engine.curriculum_scheduler = scheduler
    if isinstance(engine, PipelineEngine):
        follow_shapes(engine, begin_step)
    optimizer, dataloader, lr_scheduler = others
    return engine, optimizer, dataloader, lr_scheduler


def _ranks(run: RunConfig, given: Mapping[str, Any]) -> int:
    """Return the number of ranks, by the file's degrees and the user's own ``mpu`` or ``PipelineModule``."""
    model, mpu = given.get("model"), given.get("mpu")
    mpu = model.mpu() if isinstance(model, PipelineModule) else mpu
    if mpu is not None:
        return int(mpu.get_data_parallel_world_size()) * math.prod(run.keys.degrees.values())
    found = launch()
    return found.ranks if found else 1


def _token_lr(rate: Rate, optimizer: Optimizer) -> TokenCosineLR:
    """Build the scheduler of the optimizer that DeepSpeed has made, or was given."""
    token_cosine = rate(max(group["lr"] for group in optimizer.param_groups))
    assert token_cosine is not None
    return TokenCosineLR(optimizer, token_cosine)


def _deepspeed_initialize(**arguments: Any) -> tuple[Any, ...]:
    """Call ``deepspeed.initialize``, and raise ConfigError where it refuses its own keys.

    DeepSpeed and the optimizers it calls refuse a value by an assertion or a bare error. The same kinds of error raised by
    this package's code or the user's, which DeepSpeed calls back, are bugs or errors of their own and pass unchanged.
    """
    try:
        return tuple(deepspeed.initialize(**arguments))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))  # the last one raised it
        packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
        # The standard library raises for its caller: an unknown dtype fails in enum, called by DeepSpeed.
        raised_by = next(package for package in reversed(packages) if package not in sys.stdlib_module_names)
        if isinstance(error, SeqlenCurriculumError) or raised_by not in _REFUSING_PACKAGES:
            raise
        raise ConfigError(
            f"DeepSpeed refuses its part of the configuration: {type(error).__name__}: {error}"
        ) from error
    except Exception as error:
        package = type(error).__module__.partition(".")[0]  # such as wandb's, where no API key is set
        if package not in _MONITORS:
            raise
        raise ConfigError(
            f"{_MONITORS[package]}: {error}; fix it, or set {_MONITORS[package]}.enabled to false"
        ) from error


def _free_shared_memory(engine: Any) -> None:
    """Unlink the 66 MiB that each CPU rank of DeepSpeed leaves in /dev/shm: all ranks have mapped them by now."""
    name = f"deepspeed_allreduce_buffer_*_{os.environ.get('MASTER_PORT')}_{engine.global_rank}"
    for buffer in Path("/dev/shm").glob(name):
        buffer.unlink(missing_ok=True)


def _run_config(args: argparse.Namespace | None, *configs: object) -> RunConfig:
    """Return the run of the one configuration that is given. Raises ConfigError."""
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
    grows = run.curriculum is not None and run.curriculum.batch_growth
    if run.batch_size_warmup is not None or grows:  # in silence DeepSpeed's engine would keep to train_batch_size
        key = "curriculum_learning.batch_growth" if grows else "batch_size_warmup"
        raise ConfigError(
            f"{key}: DeepSpeed's engine doesn't follow it; give config=RunConfig.load(path), read its "
            "timeline().rows(step) rows in each step, and hand them to training.accumulate.accumulate"
        )
    return run


def _check_takes_length(model: Any, keyword: str, has_lengths: bool) -> None:
    """Raise ConfigError if the model takes no length, or there is none to pass."""
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


def begin_step(engine: Any, seqlen: int | None = None) -> None:
    """Put the coming step's length and rate in force, also after a step that fp16 skipped or a resume.

    ``seqlen`` is that length, where the caller knows it: a timeline finds it in a tenth of the time.
    """
    step = engine.global_steps + 1
    if engine.curriculum_scheduler is not None and seqlen is not None:
        engine.curriculum_scheduler.set_current_difficulty(seqlen)
    elif engine.curriculum_scheduler is not None:
        engine.curriculum_scheduler.update_difficulty(step)
    if isinstance(engine.lr_scheduler, TokenCosineLR):
        engine.lr_scheduler.seek(step)


def follow_plan(engine: Any, plan: RunPlan) -> None:
    """Put the lengths and rates of ``plan`` in force for the steps to come."""
    engine.curriculum_scheduler = plan.scheduler
    if isinstance(engine.lr_scheduler, TokenCosineLR):
        rate = plan.learning_rate(engine.lr_scheduler.rate.max_lr)
        assert rate is not None
        engine.lr_scheduler.rate = rate


def skip_step(engine: Any, rows: int) -> None:
    """Count the step begun, of ``rows`` rows as the engine counts them, as done: the rate advances, nothing is trained."""
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step()
    engine.global_steps += 1
    engine.global_samples += rows


def _hand_over_length(keyword: str) -> Callable[[Any, Any, dict[str, Any]], tuple[Any, dict[str, Any]]]:
    """Return the hook that adds the length set by ``_follow_steps`` to the keywords of a training forward."""

    def hook(engine: Any, inputs: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if _trains(engine):
            keywords = {**keywords, keyword: engine.curriculum_scheduler.get_current_difficulty()}
        return inputs, keywords

    return hook
