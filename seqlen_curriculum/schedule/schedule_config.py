"""The ``schedule_config`` of each schedule type of DeepSpeed's ``curriculum_learning`` block."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import Field, model_validator

from seqlen_curriculum.fields import Count, ImportPath, Section, Seqlen
from seqlen_curriculum.strict_json import shown

__all__ = [
    "DURATIONS",
    "SIGNIFICANT",
    "AdaptiveSchedule",
    "CustomSchedule",
    "DiscreteSchedule",
    "LinearSchedule",
    "MixedSchedule",
    "RootSchedule",
]

SIGNIFICANT = 1.3
"""A validation perplexity above this multiple of the best so far is a significant fluctuation (the paper's Section 4)."""

DURATIONS = ("total_curriculum_step", "total_curriculum_tokens", "curriculum_fraction")
"""The keys that set the length of a ramp; a ramp has exactly one of them."""


class LinearSchedule(Section):
    """The ``schedule_config`` of ``fixed_linear``."""

    total_curriculum_step: Count | None = None
    """Steps from the minimum to the maximum (DeepSpeed's key; *T* in the paper). Exactly one of the three durations."""
    total_curriculum_tokens: Count | None = None
    """The ramp's length in consumed target tokens: the smallest T whose ramp consumes at least this many."""
    curriculum_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The ramp's length as a share of the run's steps (Composer's ``duration``, where 0.3 is recommended)."""
    difficulty_step: Count
    """Every length is a multiple of this: 8 for the tensor cores at 16 bits (the paper), 16 at 8 bits."""

    @model_validator(mode="after")
    def _one_duration(self) -> LinearSchedule:
        given = [name for name in DURATIONS if getattr(self, name) is not None]
        if len(given) != 1:
            stated = " and ".join(given) + " are given" if given else "no duration is given"
            raise ValueError(f"{stated}; give exactly one of {', '.join(DURATIONS)}")
        return self


class AdaptiveSchedule(LinearSchedule):
    """The ``schedule_config`` of ``adaptive``."""

    perplexity_ratio: float = Field(default=SIGNIFICANT, gt=1)
    """The ramp pauses for ``training.eval_interval`` steps whenever perplexity exceeds this multiple of the best so far."""


class RootSchedule(LinearSchedule):
    """The ``schedule_config`` of ``fixed_root``."""

    root_degree: float = Field(gt=0)
    """DeepSpeed's key: the exponent is ``1 / root_degree``. 1 is linear, 2 is a square root, which grows fast at first, and
    0.5 a square, which grows slowly at first."""


class DiscreteSchedule(Section):
    """The ``schedule_config`` of ``fixed_discrete``."""

    difficulty: list[Seqlen] = Field(min_length=1)
    """Lengths, one per stage."""
    max_step: list[Count]
    """Last step of each stage except the last, increasing: one entry fewer than ``difficulty``."""

    @model_validator(mode="after")
    def _stages_match(self) -> DiscreteSchedule:
        # [128, 1024] needs [20000]: 128 up to step 20,000, then 1024 until the end of the run.
        if len(self.difficulty) != len(self.max_step) + 1:
            raise ValueError(
                f"difficulty has {len(self.difficulty)} entries and max_step {len(self.max_step)}; "
                "max_step needs exactly one fewer (the last length has no end)"
            )
        if any(later <= earlier for earlier, later in pairwise(self.max_step)):
            raise ValueError(f"max_step {shown(self.max_step)} does not increase; give each stage a later last step")
        return self


class MixedSchedule(Section):
    """The ``schedule_config`` of ``fixed_mixed``."""

    difficulty: list[Seqlen] = Field(min_length=1)
    """Lengths that alternate until the end of the run."""
    steps: list[Count]
    """Steps at each length in one cycle, one entry per length."""

    @model_validator(mode="after")
    def _turns_match(self) -> MixedSchedule:
        if len(self.difficulty) != len(self.steps):
            raise ValueError(
                f"difficulty has {len(self.difficulty)} entries and steps {len(self.steps)}; give each length its steps"
            )
        if sum(self.steps) > 10**15:
            raise ValueError(f"steps add up to {sum(self.steps)}, at most 10**15 steps are planned; shorten the cycle")
        return self


class CustomSchedule(Section):
    """The ``schedule_config`` of ``custom``."""

    function: ImportPath | None = None
    """Import path ``package.module:function`` of a ``function(step) -> length``. Without it the script must call
    ``set_custom_get_difficulty``."""
    difficulty_step: Count = 1
    """The function's values are clamped to the range, then rounded down to a multiple of this."""
