"""DeepSpeed's ``curriculum_learning`` block: its checks, and the pacing function of each schedule type."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError, model_validator

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Seqlen, describe_errors, load_function, nearest
from seqlen_curriculum.schedule.adjusted_pacing import Rounding, bucketed
from seqlen_curriculum.schedule.custom_pacing import Custom, shared
from seqlen_curriculum.schedule.global_batch import BatchGrowthKeys, GlobalBatch
from seqlen_curriculum.schedule.pacing import Discrete, Mixed, Pacing
from seqlen_curriculum.schedule.piecewise import ceil_div
from seqlen_curriculum.schedule.ramp_duration import Ramp, ramp_steps
from seqlen_curriculum.schedule.schedule_config import (
    AdaptiveSchedule,
    CustomSchedule,
    DiscreteSchedule,
    LinearSchedule,
    MixedSchedule,
    RootSchedule,
)
from seqlen_curriculum.schedule.shortening import MethodKey, Shortening
from seqlen_curriculum.strict_json import shown

__all__ = [
    "BLOCK",
    "AdaptiveCurriculum",
    "CurriculumConfig",
    "CustomCurriculum",
    "constant_curriculum",
    "curriculum_problems",
    "parse_curriculum",
]

BLOCK = "curriculum_learning"


class _Curriculum(BatchGrowthKeys):
    """The keys of every schedule type."""

    enabled: bool = True
    """``false`` trains at full length from the first step."""
    curriculum_type: Literal["seqlen"] = "seqlen"
    """DeepSpeed's name for a curriculum over sequence length."""
    min_difficulty: Seqlen
    """First length; the paper starts at 8 (64 for 1.5B parameters)."""
    max_difficulty: Seqlen
    """Last length, normally the data's ``seq_length``."""
    method: MethodKey = "truncate"
    """How a sample of ``seq_length`` tokens is shortened to the step's ``seqlen``. ``truncate`` keeps its first tokens, as
    in the paper. ``segment`` cuts it into ``seq_length // seqlen`` rows. ``window`` keeps whole rows and limits attention
    to aligned windows of ``seqlen`` tokens."""
    restart_positions: bool = False
    """Only with ``window``: count positions from 0 in each window instead of through the whole row."""

    @model_validator(mode="after")
    def _positions_of_windows(self) -> _Curriculum:
        if self.restart_positions and self.method != "window":
            raise ValueError(
                f'restart_positions: true needs method "window", not "{self.method}", which counts every row from 0; set it '
                "to false"
            )
        return self

    @model_validator(mode="after")
    def _range(self) -> _Curriculum:
        if self.min_difficulty > self.max_difficulty:
            raise ValueError(
                f"min_difficulty {self.min_difficulty} is above max_difficulty {self.max_difficulty}; "
                "lengths grow from the minimum to the maximum"
            )
        step = self.difficulty_step
        lowest = ceil_div(self.min_difficulty, step) * step  # 8 in steps of 2000 is 2000
        if lowest > self.max_difficulty:
            raise ValueError(
                f"schedule_config.difficulty_step {step} raises min_difficulty {self.min_difficulty} to {lowest}, above "
                f"max_difficulty {self.max_difficulty}; lower difficulty_step"
            )
        return self

    @property
    def difficulty_step(self) -> int:
        """Every length except the longest is a multiple of this; 1 if the lengths are listed."""
        return 1

    def shortening(self, seq_length: int | None = None) -> Shortening:
        """Return the method that shortens samples of ``seq_length`` tokens (default: the longest length)."""
        return Shortening(self.method, seq_length or self.max_difficulty)


class RampCurriculum(_Curriculum):
    """``fixed_linear`` and ``fixed_root``."""

    schedule_config: LinearSchedule
    """The duration of the ramp and the step between its lengths."""

    @property
    def difficulty_step(self) -> int:
        return self.schedule_config.difficulty_step

    @property
    def root_degree(self) -> float:
        """The ramp's exponent is ``1 / root_degree``; 1 is linear."""
        return 1.0

    def pacing(
        self,
        rows: GlobalBatch | None = None,
        train_tokens: int | None = None,
        bucket: Rounding = None,
        seq_length: int | None = None,
    ) -> Pacing:
        """Return the ramp with lengths rounded to ``bucket``.

        A ramp in tokens needs ``rows``, a ramp as a fraction needs ``rows`` and ``train_tokens``. Raises ConfigError.
        """
        ramp = Ramp(self.min_difficulty, self.max_difficulty, self.difficulty_step, self.root_degree, bucket)
        total_steps = ramp_steps(ramp, self.schedule_config, rows, train_tokens, self.shortening(seq_length))
        if total_steps is not None:
            return ramp.pacing(total_steps)
        raise ConfigError(
            f"{BLOCK}.schedule_config: a ramp given in tokens or as a fraction needs train_batch_size and, for a fraction, "
            "training.train_tokens; give them, or give total_curriculum_step"
        )


class LinearCurriculum(RampCurriculum):
    """Length grows linearly with the step: the paper's pacing function."""

    schedule_type: Literal["fixed_linear"]
    """``min + (max - min) * t / T`` at step *t*, rounded down to a multiple of ``difficulty_step``; ``max`` from *T* on."""


class RootCurriculum(RampCurriculum):
    """The root function of the paper's Section 4, which found no clear gain over linear."""

    schedule_type: Literal["fixed_root"]
    """``fixed_linear`` with ``(t / T) ** (1 / root_degree)`` instead of ``t / T``."""
    schedule_config: RootSchedule
    """The duration of the ramp, the step between its lengths, and the degree of the root."""

    @property
    def root_degree(self) -> float:
        return self.schedule_config.root_degree


class AdaptiveCurriculum(RampCurriculum):
    """The paper's linear function, paused while the validation perplexity fluctuates.

    Section 4 of the paper tried pacing by loss and found that it needs tuning and is not better than linear. Without a
    pause this is ``fixed_linear``. The pauses are state of a run (``RunPlan.held``).
    """

    schedule_type: Literal["adaptive"]
    """``fixed_linear`` whose ramp pauses while validation perplexity fluctuates."""
    schedule_config: AdaptiveSchedule
    """The duration of the ramp, the step between its lengths, and what counts as a fluctuation."""


class _PlainCurriculum(_Curriculum):
    """A schedule that depends only on the step, not on the rows or the token budget."""

    @abstractmethod
    def _schedule(self) -> Pacing:
        """Return the pacing before its lengths are rounded to a bucket."""

    def pacing(
        self,
        rows: GlobalBatch | None = None,  # noqa: ARG002
        train_tokens: int | None = None,  # noqa: ARG002
        bucket: Rounding = None,
        seq_length: int | None = None,  # noqa: ARG002
    ) -> Pacing:
        """Return the pacing with lengths rounded to ``bucket``. Raises ConfigError."""
        return bucketed(self._schedule(), bucket)


class LevelsCurriculum(_PlainCurriculum):
    """``fixed_discrete`` and ``fixed_mixed``."""

    schedule_config: DiscreteSchedule | MixedSchedule

    @model_validator(mode="after")
    def _inside_range(self) -> LevelsCurriculum:
        lengths = self.schedule_config.difficulty
        outside = [length for length in lengths if not self.min_difficulty <= length <= self.max_difficulty]
        if outside:
            raise ValueError(
                f"schedule_config.difficulty: {shown(outside)} are outside min_difficulty {self.min_difficulty} to "
                f"max_difficulty {self.max_difficulty}; widen the range or change the lengths"
            )
        return self


class DiscreteCurriculum(LevelsCurriculum):
    """Stages. Shortformer's two stages are ``{"difficulty": [128, 1024], "max_step": [20000]}``."""

    schedule_type: Literal["fixed_discrete"]
    """``difficulty[i]`` up to step ``max_step[i]``; the last length has no end."""
    schedule_config: DiscreteSchedule
    """The lengths of the stages and their last steps."""

    def _schedule(self) -> Discrete:
        return Discrete(tuple(self.schedule_config.difficulty), tuple(self.schedule_config.max_step))


class MixedCurriculum(LevelsCurriculum):
    """Lengths that alternate. The paper's Figure 2 is ``{"difficulty": [128, 1024], "steps": [900, 100]}``."""

    schedule_type: Literal["fixed_mixed"]
    """Cycles through the lengths: ``difficulty[i]`` for ``steps[i]`` steps each."""
    schedule_config: MixedSchedule
    """The lengths and the steps of each."""

    def _schedule(self) -> Mixed:
        return Mixed(tuple(self.schedule_config.difficulty), tuple(self.schedule_config.steps))


class CustomCurriculum(_PlainCurriculum):
    """A user-defined function, given by its import path or set on the scheduler."""

    schedule_type: Literal["custom"]
    """``function(t)``, clamped to the range and rounded down to a multiple of ``difficulty_step``."""
    schedule_config: CustomSchedule = CustomSchedule()
    """The function, and the step between its lengths."""

    @property
    def difficulty_step(self) -> int:
        return self.schedule_config.difficulty_step

    def _schedule(self) -> Custom:
        if self.schedule_config.function is None:
            raise ConfigError(
                f"{BLOCK}.schedule_config.function: required, but not given; write 'package.module:function', or call "
                "set_custom_get_difficulty before the first step"
            )
        return self._loaded

    @cached_property
    def _loaded(self) -> Custom:
        assert self.schedule_config.function is not None
        return shared(self.with_function(load_function(self.schedule_config.function)))

    def with_function(self, function: Callable[[int], float]) -> Custom:
        """Return the pacing of ``function(step)``."""
        return Custom(self.min_difficulty, self.max_difficulty, self.difficulty_step, function=function)


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
    """Return the parsed block, or None and one line for each of its problems."""
    if not isinstance(block, Mapping):
        return None, [f"{BLOCK}: {shown(block)} is not an object; write {{...}}"]
    # Looked up here instead of by a tagged union, so that the error for a misspelt type has a suggestion.
    kind = block.get("schedule_type")
    if kind is None:
        return None, [f"{BLOCK}.schedule_type: required, but not given{nearest('', _TYPES)}"]
    if not isinstance(kind, str) or kind not in _TYPES:
        return None, [f"{BLOCK}.schedule_type: {shown(kind)} is not a schedule type{nearest(str(kind)[:99], _TYPES)}"]
    try:
        return TypeAdapter(_TYPES[kind]).validate_python(dict(block)), []
    except ValidationError as error:
        return None, describe_errors(error, _TYPES[kind], BLOCK)


def parse_curriculum(block: Mapping[str, Any]) -> CurriculumConfig:
    """Parse and check DeepSpeed's block. Raises one ConfigError that lists all problems."""
    config, problems = curriculum_problems(block)
    if config is None:
        raise ConfigError(problems)
    return config


def constant_curriculum(seqlen: int) -> DiscreteCurriculum:
    """Return a curriculum with ``seqlen`` at every step, which is training without a curriculum."""
    stages = DiscreteSchedule(difficulty=[seqlen], max_step=[])
    return DiscreteCurriculum(
        min_difficulty=seqlen, max_difficulty=seqlen, schedule_type="fixed_discrete", schedule_config=stages
    )
