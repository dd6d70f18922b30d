"""Report errors of ``deepspeed.initialize`` about the configuration as ConfigError."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import deepspeed

from seqlen_curriculum.errors import ConfigError, SeqlenCurriculumError

__all__ = ["initialize_deepspeed"]

_REFUSING_PACKAGES = ("deepspeed", "pydantic", "torch")
"""Packages whose errors in ``deepspeed.initialize`` are about the configuration."""
_MONITORS = {"wandb": "wandb", "comet_ml": "comet"}
"""The sections of monitors that connect to a service, by package."""


def initialize_deepspeed(**arguments: Any) -> tuple[Any, ...]:
    """Call ``deepspeed.initialize`` and raise ConfigError if it rejects its own keys.

    DeepSpeed and the optimizers it calls reject a value with an assertion or a built-in exception. The same exceptions
    raised in callbacks, by code of this package or the user's, are not about the configuration and pass unchanged.
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
