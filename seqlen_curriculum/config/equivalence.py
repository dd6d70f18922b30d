"""Compare two runs up to a step: if they are identical, a checkpoint of one run can continue the other.

Training is a function of the step, so two runs are identical until their schedules differ. Two ramps from the same length
share their first steps, until the steeper one reaches the next length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from seqlen_curriculum.config.data import DECOMPOSED_KEYS
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import flat
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["ScheduledValues", "count_identical_steps", "trains_identically"]

_FUNCTION = "curriculum_learning.schedule_config.function"
_MOST_STEPS = 10**7
"""The most steps that are compared. Six arrays of 8 bytes each are 480 MB."""
_SCHEDULES = ("curriculum_learning", "batch_size_warmup", "scheduler")


class ScheduledValues(NamedTuple):
    """Values set by a run's schedules, of shape (steps,); ``rate`` is None if DeepSpeed schedules it."""

    seqlen: IntArray
    samples: IntArray
    method: str
    rate: Any

    @classmethod
    def of(cls, config: RunConfig, last_step: int) -> ScheduledValues:
        """Return the values of steps 1 to ``last_step``. Raises ConfigError as ``RunConfig.plan`` does."""
        timeline, rate, steps = config.plan.timeline, config.plan.learning_rate(), np.arange(1, last_step + 1)
        method = config.shortening.method
        return cls(timeline.seqlen(steps), timeline.samples(steps), method, rate(steps) if rate else None)


def count_identical_steps(one: RunConfig, other: RunConfig, last_step: int) -> int:
    """Return how many leading steps, at most ``last_step``, are identical in two runs that differ only in their schedules.

    Return 0 if a schedule is ``adaptive``, or if DeepSpeed schedules different learning rates. Raises ConfigError for a run
    without ``train_batch_size`` or ``training.train_tokens``.
    """
    if one.adapts or other.adapts or one.deepspeed.get("scheduler") != other.deepspeed.get("scheduler"):
        return 0
    first, second = ScheduledValues.of(one, last_step), ScheduledValues.of(other, last_step)
    if first.method != second.method or (first.rate is None) != (second.rate is None):
        return 0
    differs = (first.seqlen != second.seqlen) | (first.samples != second.samples)
    if first.rate is not None:
        differs |= first.rate != second.rate
    return int(np.argmax(differs)) if differs.any() else last_step


def trains_identically(saved: Mapping[str, Any], ours: Mapping[str, Any], step: int) -> bool:
    """Return whether two runs (``RunConfig.settings``) differ only in their schedules, and only after ``step``."""
    # A checkpoint may nest its settings, and so hide the function from the comparison.
    saved, ours = dict(flat(saved)), dict(flat(ours))
    changed = [name for name in {*saved, *ours} if saved.get(name) != ours.get(name)]
    # Building another run's custom schedule would import its function: code that this run's file doesn't name.
    if _FUNCTION in changed or not all(_is_scheduled(name) for name in changed):
        return False
    try:
        return _identical(_from_settings(saved), _from_settings(ours), step)
    except ConfigError:  # settings of another version
        return False


def _identical(one: RunConfig, other: RunConfig, steps: int) -> bool:
    """Return whether the first ``steps`` are identical. A checkpoint can't be of a step after the end of its run."""
    return steps <= min(_MOST_STEPS, one.timeline().steps) and count_identical_steps(one, other, steps) == steps


def _is_scheduled(setting: str) -> bool:
    """Return whether a setting affects only lengths, rows and rates, all of which are compared."""
    if setting in ("training.train_tokens", "training.seqlen_bucket"):
        return True
    return setting.partition(".")[0] in _SCHEDULES and setting != "curriculum_learning.restart_positions"


def _from_settings(settings: Mapping[str, Any]) -> RunConfig:
    """Rebuild the schedules of a run from its settings."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *parents, key = name.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{name}: {parent} has a value, so it can't have keys")
        section[key] = value
    kept = {name: tree[name] for name in ("train_batch_size", "optimizer", *_SCHEDULES) if name in tree}
    # Lengths that depend on the pieces of a corpus can't be planned from settings: ``plan`` raises ConfigError for them.
    pieces = {key: settings.get(f"data.{key}") for key in DECOMPOSED_KEYS if settings.get(f"data.{key}") is not None}
    data = {"train": ["-"], "seq_length": settings.get("data.seq_length"), **pieces}
    return RunConfig.from_dict({**kept, "data": data, "training": tree.get("training")})
