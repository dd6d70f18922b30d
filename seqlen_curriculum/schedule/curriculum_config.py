"""DeepSpeed's ``curriculum_learning`` block as users have it on disk, checked, and the pacing function it names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError, model_validator

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Section, Seqlen, describe_errors, load_function, nearest
from seqlen_curriculum.schedule.adjusted_pacing import bucketed
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp
from seqlen_curriculum.schedule.pacing import Custom, Discrete, Mixed, Pacing, Root
from seqlen_curriculum.schedule.schedule_config import (
    AdaptiveSchedule,
    CustomSchedule,
    DiscreteSchedule,
    LinearSchedule,
    MixedSchedule,
    RootSchedule,
)
from seqlen_curriculum.schedule.shortening import Method, Shortening
from seqlen_curriculum.schedule.timeline import ramp_steps_for_fraction, ramp_steps_for_tokens

__all__ = [
    "AdaptiveCurriculum",
    "CurriculumConfig",
    "CustomCurriculum",
    "constant_curriculum",
    "curriculum_problems",
    "parse_curriculum",
]

BLOCK = "curriculum_learning"


class _Curriculum(Section):
    """What every schedule type shares."""

    enabled: bool = True
    """``false`` trains at full length from the first step."""
    curriculum_type: Literal["seqlen"] = "seqlen"
    """DeepSpeed's name for a curriculum over sequence length."""
    min_difficulty: Seqlen
    """First length; the paper starts at 8 (64 for 1.5B parameters)."""
    max_difficulty: Seqlen
    """Last length, normally the data's ``seq_length``."""
    method: Method = "truncate"
    """What becomes of a sample of ``seq_length`` tokens: ``truncate`` to its first tokens, as in the paper; ``segment``: cut
    into ``seq_length // seqlen`` rows; ``window``: whole rows that attend within aligned windows of today's length."""
    restart_positions: bool = False
    """With ``window``: positions are counted from 0 in each window. Without, they run on through the row."""

    @model_validator(mode="after")
    def _positions_of_windows(self) -> _Curriculum:
        if self.restart_positions and self.method != "window":
            raise ValueError(
                f'restart_positions: true goes with method "window"; "{self.method}" counts every row\'s positions from 0'
            )
        return self

    @model_validator(mode="after")
    def _range(self) -> _Curriculum:
        if self.min_difficulty > self.max_difficulty:
            raise ValueError(
                f"min_difficulty {self.min_difficulty} is above max_difficulty {self.max_difficulty}; "
                "lengths grow from the minimum to the maximum"
            )
        step = getattr(getattr(self, "schedule_config", None), "difficulty_step", 1)
        lowest = -(-self.min_difficulty // step) * step
        if lowest > self.max_difficulty:
            raise ValueError(
                f"schedule_config.difficulty_step {step} lifts min_difficulty {self.min_difficulty} to {lowest}, above "
                f"max_difficulty {self.max_difficulty}; lower difficulty_step"
            )
        return self

    def shortening(self, seq_length: int | None = None) -> Shortening:
        """What becomes of a sample of ``seq_length`` tokens (default: of the longest length)."""
        return Shortening(self.method, seq_length or self.max_difficulty)

    def _range_of(self, schedule: LinearSchedule | CustomSchedule) -> tuple[int, int, int]:
        return self.min_difficulty, self.max_difficulty, schedule.difficulty_step


class RampCurriculum(_Curriculum):
    """``fixed_linear`` and ``fixed_root``."""

    schedule_config: LinearSchedule

    def pacing(
        self,
        rows: int | BatchSizeRamp | None = None,
        train_tokens: int | None = None,
        bucket: int | None = None,
        seq_length: int | None = None,
    ) -> Pacing:
        """The ramp in multiples of ``bucket``. The rest, of the run, is needed unless the ramp is given in steps."""
        schedule = self.schedule_config
        bounds = self._range_of(schedule)
        degree, shortening = getattr(schedule, "root_degree", 1.0), self.shortening(seq_length)

        def ramp(total_steps: int) -> Pacing:
            return bucketed(Root(*bounds, total_steps=total_steps, root_degree=degree), bucket)

        if schedule.total_curriculum_step is not None:
            return ramp(schedule.total_curriculum_step)
        if rows is not None and schedule.total_curriculum_tokens is not None:
            return ramp(ramp_steps_for_tokens(ramp, rows, schedule.total_curriculum_tokens, shortening))
        if rows is not None and train_tokens is not None and schedule.curriculum_fraction is not None:
            return ramp(ramp_steps_for_fraction(ramp, rows, train_tokens, schedule.curriculum_fraction, shortening))
        raise ConfigError(
            f"{BLOCK}.schedule_config: a ramp given in tokens or as a fraction needs train_batch_size and, for a fraction, "
            "training.train_tokens; give them, or give total_curriculum_step"
        )


class LinearCurriculum(RampCurriculum):
    """The paper's pacing function."""

    schedule_type: Literal["fixed_linear"]


class RootCurriculum(RampCurriculum):
    """Section 4's root function; no clear gain over linear in the paper."""

    schedule_type: Literal["fixed_root"]
    schedule_config: RootSchedule


class AdaptiveCurriculum(RampCurriculum):
    """The paper's linear function by a clock that stands still while the validation perplexity fluctuates.

    Section 4 tried pacing by losses, found it no better than linear, and in need of tuning. Where no evaluation is held
    this is ``fixed_linear``; what was held is state of a run (``RunConfig.held``).
    """

    schedule_type: Literal["adaptive"]
    schedule_config: AdaptiveSchedule


class _PlainCurriculum(_Curriculum):
    """What depends on the step alone, not on the run."""

    @abstractmethod
    def _schedule(self) -> Pacing: ...

    def pacing(
        self,
        rows: int | BatchSizeRamp | None = None,  # noqa: ARG002
        train_tokens: int | None = None,  # noqa: ARG002
        bucket: int | None = None,
        seq_length: int | None = None,  # noqa: ARG002
    ) -> Pacing:
        """The length of each step, in multiples of ``bucket``."""
        return bucketed(self._schedule(), bucket)


class LevelsCurriculum(_PlainCurriculum):
    """``fixed_discrete`` and ``fixed_mixed``."""

    schedule_config: DiscreteSchedule | MixedSchedule

    @model_validator(mode="after")
    def _inside_range(self) -> LevelsCurriculum:
        outside = [d for d in self.schedule_config.difficulty if not self.min_difficulty <= d <= self.max_difficulty]
        if outside:
            raise ValueError(
                f"schedule_config.difficulty: {outside} lie outside min_difficulty {self.min_difficulty} to "
                f"max_difficulty {self.max_difficulty}; widen the range or change the lengths"
            )
        return self


class DiscreteCurriculum(LevelsCurriculum):
    """Stages; Shortformer's two are ``{"difficulty": [128, 1024], "max_step": [20000]}``."""

    schedule_type: Literal["fixed_discrete"]
    schedule_config: DiscreteSchedule

    def _schedule(self) -> Discrete:
        return Discrete(tuple(self.schedule_config.difficulty), tuple(self.schedule_config.max_step))


class MixedCurriculum(LevelsCurriculum):
    """Lengths that take turns; the paper's Figure 2 is ``{"difficulty": [128, 1024], "steps": [900, 100]}``."""

    schedule_type: Literal["fixed_mixed"]
    schedule_config: MixedSchedule

    def _schedule(self) -> Mixed:
        return Mixed(tuple(self.schedule_config.difficulty), tuple(self.schedule_config.steps))


class CustomCurriculum(_PlainCurriculum):
    """A function of the user's, by import path or set on the scheduler."""

    schedule_type: Literal["custom"]
    schedule_config: CustomSchedule = CustomSchedule()

    def _schedule(self) -> Custom:
        if self.schedule_config.function is None:
            raise ConfigError(
                f"{BLOCK}.schedule_config.function: not given; name a 'package.module:function', or call "
                "set_custom_get_difficulty before the first step"
            )
        return self.with_function(load_function(self.schedule_config.function))

    def with_function(self, function: Callable[[int], float]) -> Custom:
        """The pacing of ``function(step)``."""
        return Custom(*self._range_of(self.schedule_config), function=function)


CurriculumConfig: TypeAlias = (
    LinearCurriculum | RootCurriculum | AdaptiveCurriculum | DiscreteCurriculum | MixedCurriculum | CustomCurriculum
)
_TYPES: dict[str, type[CurriculumConfig]] = {
    "fixed_linear": LinearCurriculum,
    "fixed_root": RootCurriculum,
    "adaptive": AdaptiveCurriculum,
    "fixed_discrete": DiscreteCurriculum,
    "fixed_mixed": MixedCurriculum,
    "custom": CustomCurriculum,
}


def curriculum_problems(block: object) -> tuple[CurriculumConfig | None, list[str]]:
    """The parsed block, or None and one line for each of its problems."""
    if not isinstance(block, Mapping):
        return None, [f"{BLOCK}: {block!r} is not an object; write {{...}}"]
    kind = block.get("schedule_type")
    if kind is None:
        return None, [f"{BLOCK}.schedule_type: required, but not given{nearest('', _TYPES)}"]
    if not isinstance(kind, str) or kind not in _TYPES:
        return None, [f"{BLOCK}.schedule_type: {kind!r} is not a schedule type{nearest(str(kind), _TYPES)}"]
    try:
        return TypeAdapter(_TYPES[kind]).validate_python(dict(block)), []
    except ValidationError as error:
        return None, describe_errors(error, _TYPES[kind], BLOCK)


def parse_curriculum(block: Mapping[str, Any]) -> CurriculumConfig:
    """DeepSpeed's block as a checked object; a ConfigError lists all its problems."""
    config, found = curriculum_problems(block)
    if config is None:
        raise ConfigError(found)
    return config


def constant_curriculum(seqlen: int) -> DiscreteCurriculum:
    """One stage of ``seqlen`` that never ends: no curriculum."""
    stages = DiscreteSchedule(difficulty=[seqlen], max_step=[])
    return DiscreteCurriculum(
        min_difficulty=seqlen, max_difficulty=seqlen, schedule_type="fixed_discrete", schedule_config=stages
    )
