"""The range of DeepSpeed versions that this package is tested with."""

from __future__ import annotations

import warnings

import deepspeed

__all__ = ["TESTED", "check_deepspeed_version"]

TESTED = "deepspeed>=0.19,<0.20"


def check_deepspeed_version() -> None:
    """Warn where the installed DeepSpeed is outside the tested range."""
    if tuple(int(part) for part in deepspeed.__version__.split(".")[:2]) != (0, 19):
        warnings.warn(f"DeepSpeed {deepspeed.__version__} is outside the tested range ({TESTED})", stacklevel=2)
