"""Sequence length warmup for GPT pre-training with DeepSpeed.

Importing this package loads neither torch nor DeepSpeed: planning works on a laptop. ``initialize``, ``TokenLR``,
``pretrain`` and ``set_batch_sequence_length`` load them when first used, and need the extra ``train``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from seqlen_curriculum.extras import missing_package

if TYPE_CHECKING:
    from seqlen_curriculum.batch import set_batch_sequence_length
    from seqlen_curriculum.config.run import RunConfig
    from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError, DivergenceError, SeqlenCurriculumError
    from seqlen_curriculum.schedule.scheduler import CurriculumScheduler
    from seqlen_curriculum.schedule.timeline import Timeline
    from seqlen_curriculum.schedule.token_lr import TokenCosine, TokenRate
    from seqlen_curriculum.training.engine import initialize
    from seqlen_curriculum.training.lr_scheduler import TokenCosineLR, TokenLR
    from seqlen_curriculum.training.pretrain import pretrain

__version__ = "0.1.0"

_MODULES = {
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "CurriculumScheduler": "schedule.scheduler",
    "DataError": "errors",
    "DivergenceError": "errors",
    "RunConfig": "config",
    "SeqlenCurriculumError": "errors",
    "Timeline": "schedule.timeline",
    "TokenCosine": "schedule.token_lr",
    "TokenCosineLR": "training.lr_scheduler",
    "TokenLR": "training.lr_scheduler",
    "TokenRate": "schedule.token_lr",
    "initialize": "training.engine",
    "pretrain": "training.pretrain",
    "set_batch_sequence_length": "batch",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CurriculumScheduler",
    "DataError",
    "DivergenceError",
    "RunConfig",
    "SeqlenCurriculumError",
    "Timeline",
    "TokenCosine",
    "TokenCosineLR",
    "TokenLR",
    "TokenRate",
    "initialize",
    "pretrain",
    "set_batch_sequence_length",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module when it is first used (PEP 562). Raises ImportError for a missing extra."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if message := missing_package(error.name):
            raise ImportError(f"seqlen_curriculum.{name}: {message}") from error
        raise


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
