"""Report errors of ``deepspeed.initialize`` about the configuration as ConfigError."""

from __future__ import annotations

import linecache
import sys
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from pydantic import ValidationError

from seqlen_curriculum.config.deepspeed_rules import MONITORS
from seqlen_curriculum.config.muon import trains_by_muon
from seqlen_curriculum.errors import ConfigError, SeqlenCurriculumError
from seqlen_curriculum.strict_json import shown
from seqlen_curriculum.training.machine import on_cpu
from seqlen_curriculum.training.muon import embeddings_by_adam, run_uncompiled
from seqlen_curriculum.training.progress import log_rank0

__all__ = ["initialize_deepspeed"]

_REFUSING_PACKAGES = ("deepspeed", "pydantic", "torch")
"""Packages whose errors in ``deepspeed.initialize`` are about the configuration."""
_REFUSALS = (
    AssertionError,
    AttributeError,
    ImportError,
    KeyError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    DeepSpeedConfigError,
    ZeRORuntimeException,
)
"""Exceptions by which DeepSpeed, and the optimizers it calls, reject a value."""


def initialize_deepspeed(**arguments: Any) -> tuple[Any, ...]:
    """Call ``deepspeed.initialize`` and raise ConfigError, with a message of one line, if it rejects its own keys.

    The same exceptions raised in callbacks, by code of this package or the user's, are not about the configuration and pass
    unchanged.
    """
    optimizer = (arguments.get("config") or {}).get("optimizer") or {}
    if on_cpu() and trains_by_muon(str(optimizer.get("type"))):
        run_uncompiled()
    # torch 2.13 would warn of calls of DeepSpeed's, several times in each step under ZeRO-3.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        with embeddings_by_adam() as divided:
            initialized = tuple(deepspeed.initialize(**arguments))
    except Exception as error:
        section = {package: name for name, package in MONITORS.items()}.get(type(error).__module__.partition(".")[0])
        if section is not None:  # such as wandb's, where no API key is set
            raise ConfigError(f"{section}: {_one_line(error)}; fix it, or set {section}.enabled to false") from error
        if isinstance(error, SeqlenCurriculumError) or not _is_refusal(error):
            raise
        if isinstance(error, ValidationError):
            raise ConfigError(_invalid_values(error, arguments.get("config"))) from error
        kind = type(error).__name__
        raise ConfigError(f"DeepSpeed refuses its part of the configuration: {kind}: {_one_line(error)}") from error
    for groups in divided:
        log_rank0(f"optimizer: {groups.describe()}")
    return initialized


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_refusal(error: Exception) -> bool:
    """Return whether DeepSpeed, or a package that it calls, raised ``error`` to reject a value."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]  # the last one raised it
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
    # The standard library raises for its caller: an unknown dtype fails in enum, called by DeepSpeed.
    raised_by = next(package for package in reversed(packages) if package not in sys.stdlib_module_names)
    if type(error) is RuntimeError:  # torch's errors of devices and memory have the same type
        frame, line = frames[-1]
        statement = linecache.getline(frame.f_code.co_filename, line).strip()
        return raised_by == "deepspeed" and statement.startswith("raise ")
    return isinstance(error, _REFUSALS) and raised_by in _REFUSING_PACKAGES


def _invalid_values(error: ValidationError, config: object) -> list[str]:
    """Return one line per value that DeepSpeed's pydantic models reject, with the section that has the key."""
    lines = []
    for detail in error.errors(include_url=False):
        path, value, message = [str(key) for key in detail["loc"]], detail["input"], detail["msg"]
        sections = config.items() if isinstance(config, Mapping) else ()
        names = [name for name, section in sections if path and isinstance(section, Mapping) and path[0] in section]
        key = ".".join([*(names[:1] or [error.title]), *path])
        lines.append(f"{key}: {shown(value)} is not valid in DeepSpeed: {' '.join(message.split())}")
    return lines
