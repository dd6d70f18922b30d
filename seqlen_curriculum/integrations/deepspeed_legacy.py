"""Train scripts with the legacy ``curriculum_learning`` block unmodified on a DeepSpeed that has removed it.

Importing this module suffices. It must be imported before the script, such as Megatron-DeepSpeed's ``pretrain_gpt.py``,
imports DeepSpeed. It then restores what DeepSpeed up to 0.19.6 did:

- ``deepspeed.initialize`` and ``deepspeed.zero.Init`` accept the block.
- Every training forward of an engine passes ``curriculum_seqlen`` to its model. A ``PipelineEngine`` exchanges the shapes
  of its stages in every batch, so that the script may cut its batches.
- An engine has ``curriculum_enabled_legacy()`` and ``curriculum_scheduler_legacy``.
- ``deepspeed.compression.compress`` can be imported. Its functions raise ConfigError: compression stays removed.

Lengths are those of ``seqlen_curriculum.CurriculumScheduler``, which also replaces the class of that name in DeepSpeed's
``curriculum_scheduler``. In the range that DeepSpeed's class handles they are equal. A pipeline of Megatron-DeepSpeed that
resumes reads ``args.curriculum_seqlen`` before setting it; it is set here to the full length when the engine is made.

On a DeepSpeed that still reads the block by itself, the import leaves that alone.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any, NoReturn

import deepspeed
import deepspeed.runtime.config
from deepspeed.runtime.data_pipeline import curriculum_scheduler
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.curriculum_config import BLOCK, parse_curriculum
from seqlen_curriculum.schedule.scheduler import CurriculumScheduler
from seqlen_curriculum.training.engine import begin_step, follow_steps
from seqlen_curriculum.training.pipeline_shapes import follow_shapes

__all__: list[str] = []

_KEYWORD = "curriculum_seqlen"
_build = DeepSpeedEngine.__init__


@functools.wraps(_build)
def _build_with_curriculum(engine: Any, *args: Any, **kwargs: Any) -> None:
    """Build DeepSpeed's engine, and let it follow the block of its configuration."""
    given = inspect.signature(_build).bind(engine, *args, **kwargs).arguments
    block = given["config_class"]._param_dict.get(BLOCK) or {}
    scheduler = _scheduler(block) if block.get("enabled") else None
    is_pipeline = isinstance(engine, PipelineEngine)
    if scheduler is not None and not is_pipeline:
        _check_takes_length(given["model"])
    _build(engine, *args, **kwargs)
    engine.curriculum_enabled_legacy = lambda: scheduler is not None
    engine.curriculum_scheduler_legacy = engine.curriculum_scheduler = scheduler
    if scheduler is None:
        return
    if is_pipeline:
        follow_shapes(engine, begin_step)
        _set_unset_length(given["args"], block)
    else:
        follow_steps(engine, _KEYWORD)


def _scheduler(block: dict[str, Any]) -> CurriculumScheduler:
    """Return the scheduler of the block. Raises ConfigError for what a script that truncates by itself can't do."""
    config = parse_curriculum(block)
    problems = [
        f"{BLOCK}.{key}: {block[key]!r} is not available in a script that truncates by itself; remove it"
        for key, is_new in {
            "method": config.method != "truncate",
            "batch_growth": config.batch_growth,
            "schedule_type": block.get("schedule_type") == "adaptive",
        }.items()
        if is_new
    ]
    if problems:
        raise ConfigError(problems)
    return CurriculumScheduler(config)


def _check_takes_length(model: Any) -> None:
    """Raise ConfigError if the model's forward doesn't accept the length, and so would train at full length."""
    try:
        inspect.signature(model.forward).bind_partial(**{_KEYWORD: None})
    except TypeError as error:
        raise ConfigError(
            f"{BLOCK}.enabled: true, but the forward of {type(model).__name__} takes no keyword {_KEYWORD!r}; add it and "
            "truncate there, or cut the batches and call seqlen_curriculum.initialize"
        ) from error


def _set_unset_length(args: Any, block: dict[str, Any]) -> None:
    """Set ``args.curriculum_seqlen``, which the first step of a pipeline compares with its own length, to the full one."""
    if args is not None and not hasattr(args, _KEYWORD):
        setattr(args, _KEYWORD, getattr(args, "seq_length", block["max_difficulty"]))


def _removed(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise ConfigError("compression_training: DeepSpeed has removed its compression library; remove this section")


def _restore() -> None:
    """Change DeepSpeed as the docstring of this module says, where it lacks something."""
    if importlib.util.find_spec("deepspeed.compression.compress") is None:
        compress = ModuleType("deepspeed.compression.compress")
        compress.init_compression = compress.redundancy_clean = _removed  # type: ignore[attr-defined]
        sys.modules[compress.__name__] = compress
    removed_keys = getattr(deepspeed.runtime.config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    if removed_keys.pop(BLOCK, None) is not None:
        DeepSpeedEngine.__init__ = _build_with_curriculum
        curriculum_scheduler.CurriculumScheduler = CurriculumScheduler


_restore()
