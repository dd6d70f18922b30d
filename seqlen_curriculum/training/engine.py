"""``deepspeed.initialize`` for a configuration with the sections of this package."""

from __future__ import annotations

import argparse
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from seqlen_curriculum.config.plan import RunPlan
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.launchers import DEFAULT_PORT, launch
from seqlen_curriculum.schedule.scheduler import CurriculumScheduler
from seqlen_curriculum.schedule.token_lr import TokenRate
from seqlen_curriculum.training.lr_scheduler import TokenLR
from seqlen_curriculum.training.pipeline_shapes import follow_shapes
from seqlen_curriculum.training.refusals import initialize_deepspeed
from seqlen_curriculum.training.start import join_ranks
from seqlen_curriculum.training.versions import check_deepspeed_version

__all__ = ["Rate", "begin_step", "build_engine", "follow_plan", "follow_steps", "initialize", "skip_step"]

Rate: TypeAlias = Callable[[float], TokenRate | None]
"""Returns the learning rate schedule, given the largest ``lr`` of the optimizer."""


def initialize(
    args: argparse.Namespace | None = None,
    model: torch.nn.Module | None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    model_parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
    distributed_port: int = DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    mesh_param: tuple[int, int] | None = None,
    config_params: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    curriculum_kwarg: str | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Return (engine, optimizer, dataloader, lr_scheduler), as ``deepspeed.initialize`` does for the same arguments.

    The sections of this package are removed from the configuration, and the rest is passed to DeepSpeed.

    - The engine gains ``curriculum_scheduler``. Its ``update_difficulty(engine.global_steps + 1)`` returns the length of the
      next step in tokens. It is None if the configuration has neither a curriculum nor a data section.
    - A token-wise ``scheduler`` advances with the engine's steps, and counts the tokens of steps that fp16 skips.
    - ``train_batch`` and ``eval_batch`` of a pipeline accept batches whose length changes.

    Without a launcher, as in a notebook, the process is rank 0 of 1.

    Args:
        args: Its ``deepspeed_config`` is the path of the configuration if ``config`` is None.
        model: The module to train, or a ``PipelineModule``. Required.
        optimizer: An optimizer, or a function of ``model_parameters`` that returns one. It replaces the configuration's.
        model_parameters: The parameters to train, or groups of them as for ``torch.optim``.
        training_data: A dataset. The third return value is a dataloader for it, with rows of full length.
        lr_scheduler: A scheduler, or a function of the optimizer that returns one. It replaces the configuration's, and is
            an error with a token-wise ``scheduler`` in the file.
        distributed_port: Port of rank 0 if neither the launcher nor MASTER_PORT sets it.
        mpu: Megatron's model parallel unit, with ``get_data_parallel_world_size()`` and the like.
        dist_init_required: Passed to DeepSpeed. torch.distributed is initialized if it isn't yet.
        collate_fn: Makes a batch from a list of samples of ``training_data``.
        config: A path, a dict or a ``RunConfig``. The path may be a run's folder, for the configuration of that run.
        mesh_param: (data-parallel ranks, sequence-parallel ranks).
        config_params: DeepSpeed's older name of ``config``.
        curriculum_kwarg: Keyword with which the step's length is passed to the model in each training forward, for a model
            that truncates inside. DeepSpeed up to 0.19.7 passed it as ``curriculum_seqlen``.

    Raises:
        ConfigError: The configuration or an argument is wrong, also where DeepSpeed refuses it. Under ``batch_size_warmup``
            or ``batch_growth``, ``config`` must be a ``RunConfig``: the loop reads ``RunConfig.timeline().rows(step)`` rows
            in each step and passes them to ``training.accumulate.accumulate``.
    """
    # Arguments that aren't given are left out: another version of DeepSpeed may not have them.
    possible = {
        "model": model,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "mesh_param": mesh_param,
    }
    given = {name: value for name, value in possible.items() if value is not None}
    run = _run_config(args, config, config_params)
    if run.adapts:
        raise ConfigError(
            "curriculum_learning.schedule_type: adaptive depends on evaluations, which DeepSpeed's engine doesn't run; "
            "train with slw train, or use fixed_linear"
        )
    if run.decomposed:
        raise ConfigError(
            'data.order: "decomposed" sets the rows of each step, which an own training loop doesn\'t read; train with slw '
            'train, or set it to "packed"'
        )
    if run.stops_at_documents:
        raise ConfigError(
            'data.attention: "document" needs the parts of documents in each batch, which an own training loop doesn\'t '
            'read; train with slw train, or set it to "row"'
        )
    run = run if run.keys.train_batch_size else run.for_ranks(_ranks(run, given))
    if run.scheduler is not None and lr_scheduler is not None:
        raise ConfigError(f"scheduler: the file sets {run.scheduler.type} and lr_scheduler= is given too; keep one")
    if model is None:
        raise ConfigError("model: required, but not given; give the module to train")
    scheduler = run.curriculum_scheduler() if run.curriculum or run.data else None
    rate = run.plan.learning_rate if run.scheduler is not None else None
    if curriculum_kwarg is not None:
        _check_takes_length(model, curriculum_kwarg, scheduler is not None)
    join_ranks(run.deepspeed, distributed_port)
    if args is not None:  # DeepSpeed refuses a config given twice, and would read our sections from the file
        given["args"] = _without_config(args)
    engine, *others = build_engine(run.deepspeed, scheduler, rate, **given)
    if not isinstance(engine, PipelineEngine):
        follow_steps(engine, curriculum_kwarg)
    optimizer, dataloader, lr_scheduler = others
    return engine, optimizer, dataloader, lr_scheduler


def _without_config(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags without ``deepspeed_config``, with this process's device number as ``local_rank``."""
    values = {**vars(args), "deepspeed_config": None}
    if "local_rank" in values:  # a rank that sees only one device has number 0
        values["local_rank"] = int(os.environ.get("LOCAL_RANK", values["local_rank"]))
    return argparse.Namespace(**values)


def build_engine(
    deepspeed_config: Mapping[str, Any],
    scheduler: CurriculumScheduler | None,
    rate: Rate | None = None,
    **given: Any,
) -> tuple[Any, Any, Any, Any]:
    """Build DeepSpeed's engine with ``scheduler`` and ``rate``; ``given`` is passed to ``deepspeed.initialize``.

    A pipeline applies both by itself. For other engines call ``begin_step`` before each step. Without ``rate`` DeepSpeed
    sets the learning rate. Returns and raises as ``initialize`` does.
    """
    if rate is not None:
        given["lr_scheduler"] = partial(_token_lr, rate)
    check_deepspeed_version()
    engine, *others = initialize_deepspeed(config=dict(deepspeed_config), **given)
    _free_shared_memory(engine)
    engine.curriculum_scheduler = scheduler
    if isinstance(engine, PipelineEngine):
        follow_shapes(engine, begin_step)
    optimizer, dataloader, lr_scheduler = others
    return engine, optimizer, dataloader, lr_scheduler


def _ranks(run: RunConfig, given: Mapping[str, Any]) -> int:
    """Return the number of ranks, from the user's ``mpu`` or ``PipelineModule`` or from the launcher."""
    model, mpu = given.get("model"), given.get("mpu")
    mpu = model.mpu() if isinstance(model, PipelineModule) else mpu
    if mpu is not None:
        return int(mpu.get_data_parallel_world_size()) * math.prod(run.keys.degrees.values())
    found = launch()
    return found.ranks if found else 1


def _token_lr(rate: Rate, optimizer: Optimizer) -> TokenLR:
    """Build the learning rate scheduler of DeepSpeed's optimizer."""
    token_rate = rate(max(group["lr"] for group in optimizer.param_groups))
    assert token_rate is not None
    return TokenLR(optimizer, token_rate)


def _free_shared_memory(engine: Any) -> None:
    """Unlink the 66 MiB that each CPU rank of DeepSpeed leaves in /dev/shm: all ranks have mapped them by now."""
    name = f"deepspeed_allreduce_buffer_*_{os.environ.get('MASTER_PORT')}_{engine.global_rank}"
    for buffer in Path("/dev/shm").glob(name):
        buffer.unlink(missing_ok=True)


def _run_config(args: argparse.Namespace | None, *configs: object) -> RunConfig:
    """Return the run of the one configuration that is given. Raises ConfigError if there is none or more than one."""
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
    if run.batch_size_warmup is not None or grows:  # DeepSpeed's engine would silently use train_batch_size
        key = "curriculum_learning.batch_growth" if grows else "batch_size_warmup"
        raise ConfigError(
            f"{key}: DeepSpeed's engine doesn't support it; give config=RunConfig.load(path), read its "
            "timeline().rows(step) rows in each step, and pass them to training.accumulate.accumulate"
        )
    return run


def _check_takes_length(model: Any, keyword: str, has_lengths: bool) -> None:
    """Raise ConfigError if the model's forward doesn't accept ``keyword``, or if there is no length to pass."""
    if not has_lengths:
        raise ConfigError(
            f"curriculum_kwarg: {keyword!r} needs the step's length, but no section sets it; add curriculum_learning "
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


def follow_steps(engine: Any, curriculum_kwarg: str | None = None) -> None:
    """Call ``begin_step`` before each training forward, and pass the length to the model under ``curriculum_kwarg``."""
    engine.register_forward_pre_hook(_follow_steps)
    if curriculum_kwarg is not None:
        engine.register_forward_pre_hook(_hand_over_length(curriculum_kwarg), with_kwargs=True)


def _follow_steps(engine: Any, _inputs: Any) -> None:
    if _trains(engine):
        begin_step(engine)


def begin_step(engine: Any, seqlen: int | None = None) -> None:
    """Set the length and learning rate of the next step, also after a resume or a step that fp16 skipped.

    Pass ``seqlen`` if that length is known: a timeline computes it in a tenth of the time.
    """
    step = engine.global_steps + 1
    if engine.curriculum_scheduler is not None and seqlen is not None:
        engine.curriculum_scheduler.set_current_difficulty(seqlen)
    elif engine.curriculum_scheduler is not None:
        engine.curriculum_scheduler.update_difficulty(step)
    if isinstance(engine.lr_scheduler, TokenLR):
        engine.lr_scheduler.seek(step)


def follow_plan(engine: Any, plan: RunPlan) -> None:
    """Set the lengths and learning rates of ``plan`` for the following steps."""
    engine.curriculum_scheduler = plan.scheduler
    if isinstance(engine.lr_scheduler, TokenLR):
        rate = plan.learning_rate(engine.lr_scheduler.rate.max_lr)
        assert rate is not None
        engine.lr_scheduler.rate = rate


def skip_step(engine: Any, rows: int) -> None:
    """Count the current step as done without training, with ``rows`` rows by the engine's count; the rate advances."""
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.step()
    engine.global_steps += 1
    engine.global_samples += rows


def _hand_over_length(keyword: str) -> Callable[[Any, Any, dict[str, Any]], tuple[Any, dict[str, Any]]]:
    """Return the hook that adds the length set by ``_follow_steps`` to the keyword arguments of a training forward."""

    def hook(engine: Any, inputs: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if _trains(engine):
            keywords = {**keywords, keyword: engine.curriculum_scheduler.get_current_difficulty()}
        return inputs, keywords

    return hook
