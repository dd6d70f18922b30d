"""``deepspeed.initialize`` for a configuration that holds our sections."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch

from seqlen_curriculum.config import RunConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.training.lr_scheduler import TokenCosineLR

__all__ = ["initialize"]


def initialize(
    args: argparse.Namespace | None = None,
    *,
    config: str | Path | Mapping[str, Any] | RunConfig | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """Same arguments, same return as ``deepspeed.initialize``: (engine, optimizer, dataloader, lr_scheduler).

    ``config`` is a path, a dict or a ``RunConfig``; ``args.deepspeed_config`` serves when it is None. Our sections are
    taken out before DeepSpeed sees the rest. The engine gains ``curriculum_scheduler``, whose
    ``update_difficulty(engine.global_steps + 1)`` gives the length of the step to come (None in a file with neither a
    curriculum nor a data section); a ``TokenCosineLR`` follows the engine's steps by itself,
    counting the tokens of steps that fp16 skipped. Raises ConfigError.
    """
    run = _run_config(args, config)
    scheduler = run.curriculum_scheduler() if run.curriculum or run.data else None
    if run.scheduler is not None:
        kwargs["lr_scheduler"] = _lr_scheduler(run, kwargs.get("lr_scheduler"))
    engine, optimizer, dataloader, lr_scheduler = deepspeed.initialize(
        args=_without_config(args), config=dict(run.deepspeed), **kwargs
    )
    engine.curriculum_scheduler = scheduler
    engine.register_forward_pre_hook(_follow_steps)
    return engine, optimizer, dataloader, lr_scheduler


def _run_config(args: argparse.Namespace | None, config: object) -> RunConfig:
    named = getattr(args, "deepspeed_config", None)
    if config is not None and named is not None and config is not named:
        raise ConfigError(f"config: given both as config= and as args.deepspeed_config ({named}); keep one")
    config = named if config is None else config
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, Mapping):
        return RunConfig.from_dict(config)
    if isinstance(config, (str, Path)):
        return RunConfig.load(config)
    raise ConfigError(f"config: {config!r} is neither a path, a dict nor a RunConfig; give one of them")


def _without_config(args: argparse.Namespace | None) -> argparse.Namespace | None:
    """DeepSpeed refuses a config given twice, and would read our sections from the file."""
    return argparse.Namespace(**{**vars(args), "deepspeed_config": None}) if args is not None else None


def _lr_scheduler(run: RunConfig, given: object) -> Any:
    if given is not None:
        raise ConfigError("scheduler: the file asks for TokenCosineLR and lr_scheduler= is given too; keep one")
    rate = run.learning_rate(run.timeline())
    assert rate is not None
    return partial(TokenCosineLR, rate=rate)


def _follow_steps(engine: Any, _inputs: Any) -> None:
    """Before each training forward: today's length and rate, also after a step that fp16 skipped or a resume."""
    if not torch.is_grad_enabled() or not engine.module.training:
        return
    step = engine.global_steps + 1
    if engine.curriculum_scheduler is not None:
        engine.curriculum_scheduler.update_difficulty(step)
    if isinstance(engine.lr_scheduler, TokenCosineLR):
        engine.lr_scheduler.seek(step)
