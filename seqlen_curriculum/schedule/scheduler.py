"""DeepSpeed's class ``CurriculumScheduler`` with the same methods, except that lengths depend only on the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Section
from seqlen_curriculum.schedule.adjusted_pacing import Paused, Rounding, bucketed
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp
from seqlen_curriculum.schedule.curriculum_config import BLOCK, CurriculumConfig, CustomCurriculum, parse_curriculum
from seqlen_curriculum.schedule.global_batch import BatchGrowth, BatchGrowthKeys, GlobalBatch
from seqlen_curriculum.schedule.pacing import Pacing
from seqlen_curriculum.strict_json import shown

__all__ = ["CurriculumScheduler"]


_LONGEST = 2**24


def _check_count(name: str, value: object, most: int = 10**15) -> None:
    """Raise ConfigError unless ``value`` is a whole number from 1 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= most:
        raise ConfigError(f"{name}: {shown(value)} is not valid; give a whole number from 1 to {most}")


class CurriculumScheduler:
    """DeepSpeed's class of this name, except that the length of a step depends only on the step.

    ``config`` is the ``curriculum_learning`` block (a mapping, as in DeepSpeed) or a parsed one. ``rows`` (the global
    batch, its warmup or its growth) and ``train_tokens`` are needed only if the ramp is given in tokens or as a fraction.
    ``bucket`` rounds every length down to a multiple of it, or to one of a tuple of lengths. ``seq_length`` is the length
    of the data's samples (default: the longest length). ``pacing`` replaces the lengths of the block. Raises ConfigError.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | CurriculumConfig,
        rows: GlobalBatch | None = None,
        train_tokens: int | None = None,
        bucket: Rounding = None,
        seq_length: int | None = None,
        pacing: Pacing | None = None,
    ) -> None:
        self.config = config if isinstance(config, Section) else parse_curriculum(config)
        for name, value in {"train_tokens": train_tokens, "bucket": bucket, "seq_length": seq_length}.items():
            if value is not None and not isinstance(value, tuple):
                _check_count(name, value)
        if rows is not None and not isinstance(rows, (BatchSizeRamp, BatchGrowth)):
            _check_count("rows", rows)
        self._bucket = bucket
        # The function of a custom schedule may be set later, by set_custom_get_difficulty.
        waits = isinstance(self.config, CustomCurriculum) and self.config.schedule_config.function is None
        self._pacing: Pacing | None = pacing
        if pacing is None and not waits:
            self._pacing = self.config.pacing(rows, train_tokens, bucket, seq_length)
        self.current_difficulty: int = self.config.min_difficulty if waits else self.get_difficulty(1)

    @property
    def pacing(self) -> Pacing:
        """The function from step to length. Raises ConfigError while a custom schedule has no function."""
        return self._pacing if self._pacing is not None else self.config.pacing()

    def hold(self, steps: Sequence[int], interval: int) -> None:
        """Pause the ramp for ``interval`` steps after each of ``steps``; this replaces all earlier pauses.

        ``steps`` (1-based, ascending, at least ``interval`` apart) are evaluations of an ``adaptive`` schedule.
        """
        # Unwrapped first, because wrapping a paused pacing would apply its pauses twice.
        inner = self._pacing.inner if isinstance(self._pacing, Paused) else self.pacing
        self._pacing = Paused(inner, tuple(steps), interval) if steps else inner

    def get_difficulty(self, global_steps: int) -> int:
        """Return the length of step ``global_steps`` (1-based), independent of the current step."""
        return self.pacing(global_steps)

    def update_difficulty(self, global_steps: int) -> int:
        """Make step ``global_steps`` the current one and return its length."""
        self.current_difficulty = self.get_difficulty(global_steps)
        return self.current_difficulty

    def get_current_difficulty(self) -> int:
        """Return the length last set by ``update_difficulty`` or ``set_current_difficulty``."""
        return self.current_difficulty

    def set_current_difficulty(self, difficulty: int) -> None:
        """Override the current length until the next ``update_difficulty``. ConfigError if it isn't one."""
        _check_count("difficulty", difficulty, _LONGEST)
        self.current_difficulty = difficulty

    def set_custom_get_difficulty(self, schedule_function: Callable[[int], float]) -> None:
        """Set the function of a ``custom`` schedule; its values are clamped and rounded. Raises ConfigError."""
        if not isinstance(self.config, CustomCurriculum):
            raise ConfigError(
                f"{BLOCK}.schedule_type: {self.config.schedule_type!r} doesn't use a function; set it to 'custom'"
            )
        if not callable(schedule_function):
            raise ConfigError(f"{BLOCK}: {schedule_function!r} is not a function; give a function(step) -> length")
        self._pacing = bucketed(self.config.with_function(schedule_function), self._bucket)

    def get_state(self) -> dict[str, Any]:
        """Return DeepSpeed's state: the block's settings and ``current_difficulty``."""
        not_deepspeeds = {"enabled", "curriculum_type", "method", "restart_positions", *BatchGrowthKeys.model_fields}
        settings = self.config.model_dump(exclude_none=True, exclude=not_deepspeeds)
        return {**settings, "current_difficulty": self.current_difficulty}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by ``get_state``. ConfigError if it belongs to another schedule."""
        if not isinstance(state, Mapping) or not isinstance(state.get("current_difficulty"), int):
            raise ConfigError(f"{BLOCK}: {shown(state)} is not a state of this scheduler; give the result of get_state")
        _check_count("current_difficulty", state["current_difficulty"], _LONGEST)
        settings = self.get_state()
        del settings["current_difficulty"]
        # Only keys that both have must agree: other versions of DeepSpeed have other keys.
        changed = [name for name in settings if name in state and state[name] != settings[name]]
        if changed:
            details = "; ".join(f"{name} is {state[name]!r} in the state, {settings[name]!r} here" for name in changed)
            raise ConfigError(f"{BLOCK}: the saved state belongs to another schedule ({details}); load this schedule's")
        self.current_difficulty = state["current_difficulty"]

    def state_dict(self) -> dict[str, Any]:
        """Return ``get_state()``, under torch's name."""
        return self.get_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Call ``set_state``, under torch's name."""
        self.set_state(state)
