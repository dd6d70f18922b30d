"""Learning rate by tokens: linear warmup in steps, samples or tokens, then a decay over consumed tokens to ``min_lr``.

Short steps consume few tokens, so under a sequence length warmup a step-wise decay is too fast. The paper decays over
tokens instead (Section 5.1 and Appendix A.2). The rate of step t uses the counters *including* step t, so the rate of the
first step is above zero and that of the last step is ``min_lr``. The schedules differ only in where the decay starts and
ends, and in its shape. Between the warmup and the decay the rate is constant.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, NamedTuple, TypeAlias, overload

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Count, CountOrZero, Section, suggest
from seqlen_curriculum.schedule.pacing import elementwise
from seqlen_curriculum.schedule.piecewise import IntArray
from seqlen_curriculum.schedule.timeline import Timeline

__all__ = [
    "TokenCosine",
    "TokenCosineConfig",
    "TokenCosineParams",
    "TokenLRConfig",
    "TokenLinearConfig",
    "TokenLinearParams",
    "TokenRate",
    "TokenRateParams",
    "TokenWSDConfig",
    "TokenWSDParams",
    "token_schedule",
]

Shape: TypeAlias = Literal["1-sqrt", "linear", "cosine"]
FloatArray: TypeAlias = npt.NDArray[np.float64]

SHAPES: dict[Shape, Callable[[FloatArray], FloatArray]] = {
    "1-sqrt": lambda progress: 1.0 - np.sqrt(progress),
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + elementwise(lambda x: math.cos(math.pi * x), progress)),
}
"""The remaining share of ``max_lr - min_lr``, from 1 to 0, as a function of the completed share of the decay's tokens."""


class Decay(NamedTuple):
    """A decay from ``start`` to ``end`` consumed tokens."""

    shape: Shape
    start: int
    end: int


class TokenRateParams(Section):
    """The ``scheduler.params`` that all schedules by tokens share."""

    warmup_steps: CountOrZero | None = None
    """Linear warmup over this many steps (the paper: 3000). At most one of the three warmups."""
    warmup_samples: CountOrZero | None = None
    """Linear warmup over this many samples."""
    warmup_tokens: CountOrZero | None = None
    """Linear warmup over this many target tokens (GPT-3: 375e6). Slower under a sequence length warmup."""
    min_lr: float = Field(default=0.0, ge=0)
    """The rate at the end of the decay and after it."""

    @model_validator(mode="after")
    def _one_warmup(self) -> TokenRateParams:
        warmups = ("warmup_steps", "warmup_samples", "warmup_tokens")
        given = [name for name in warmups if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; keep one")
        return self

    @abstractmethod
    def decay(self, warmup_tokens: int, train_tokens: int) -> Decay:
        """Return the decay of a run whose warmup takes ``warmup_tokens``. Raises ConfigError if it doesn't fit."""


class _DecayAfterWarmup(TokenRateParams):
    """A decay from the end of the warmup to ``decay_tokens``."""

    shape: ClassVar[Shape]

    decay_tokens: Count | None = None
    """Consumed tokens at which the rate reaches ``min_lr``; default: ``training.train_tokens``."""

    def decay(self, warmup_tokens: int, train_tokens: int) -> Decay:
        end = self.decay_tokens or train_tokens
        if warmup_tokens >= end:
            raise ConfigError(
                f"scheduler.params.decay_tokens: {end} is not above the {warmup_tokens} tokens that the learning rate "
                "warmup takes; shorten the warmup or decay over more tokens"
            )
        return Decay(self.shape, warmup_tokens, end)


class TokenCosineParams(_DecayAfterWarmup):
    """The ``scheduler.params`` of ``TokenCosineLR``: the decay starts after the warmup and is half a cosine wave."""

    shape = "cosine"


class TokenLinearParams(_DecayAfterWarmup):
    """The ``scheduler.params`` of ``TokenLinearLR``: the decay starts after the warmup and is linear."""

    shape = "linear"


class TokenWSDParams(TokenRateParams):
    """The ``scheduler.params`` of ``TokenWSDLR``: warmup, stable (the rate is ``lr``), decay."""

    decay_tokens: Count
    """Length of the decay in consumed tokens. It ends at ``training.train_tokens``, with the run."""
    decay_type: Shape = "1-sqrt"
    """Shape of the decay. ``1-sqrt`` is steepest at its start; Hägele et al. (2024) found it better than ``linear``."""

    def decay(self, warmup_tokens: int, train_tokens: int) -> Decay:
        start = train_tokens - self.decay_tokens
        if start < warmup_tokens:
            raise ConfigError(
                f"scheduler.params.decay_tokens: {self.decay_tokens} and the {warmup_tokens} tokens of the learning rate "
                f"warmup are more than training.train_tokens {train_tokens}; shorten one of them, or raise train_tokens"
            )
        return Decay(self.decay_type, start, train_tokens)


class TokenCosineConfig(Section):
    """The ``scheduler`` section with type ``TokenCosineLR``: warmup, then a cosine by tokens."""

    type: Literal["TokenCosineLR"]
    """The name that selects this schedule."""
    params: TokenCosineParams = TokenCosineParams()
    """Its settings."""


class TokenLinearConfig(Section):
    """The ``scheduler`` section with type ``TokenLinearLR``: warmup, then a straight line by tokens."""

    type: Literal["TokenLinearLR"]
    """The name that selects this schedule."""
    params: TokenLinearParams = TokenLinearParams()
    """Its settings."""


class TokenWSDConfig(Section):
    """The ``scheduler`` section with type ``TokenWSDLR``: warmup, a constant rate, then a decay by tokens."""

    type: Literal["TokenWSDLR"]
    """The name that selects this schedule."""
    params: TokenWSDParams
    """Its settings."""


TokenLRConfig: TypeAlias = TokenCosineConfig | TokenLinearConfig | TokenWSDConfig
"""The ``scheduler`` section of every schedule by tokens. DeepSpeed handles all other types."""

SCHEDULES: dict[str, type[TokenLRConfig]] = {
    "TokenCosineLR": TokenCosineConfig,
    "TokenLinearLR": TokenLinearConfig,
    "TokenWSDLR": TokenWSDConfig,
}


def token_schedule(scheduler: object) -> type[TokenLRConfig] | None:
    """Return the class of a ``scheduler`` section by tokens, even if its type is slightly misspelt; None for DeepSpeed's."""
    kind = scheduler.get("type") if isinstance(scheduler, Mapping) else None
    names = {name.lower(): section for name, section in SCHEDULES.items()}
    meant = suggest(kind.lower(), names, cutoff=0.8) if isinstance(kind, str) else None
    return names[meant] if meant else None


class TokenRate:
    """The learning rate of any step of a timeline, counted in tokens, with Megatron's warmup.

    ``max_lr`` is the optimizer's ``lr``. Raises ConfigError if warmup and decay don't fit into the run, or if ``min_lr`` is
    above ``max_lr``.
    """

    def __init__(self, timeline: Timeline, params: TokenRateParams, max_lr: float) -> None:
        self.timeline, self.params, self.max_lr = timeline, params, max_lr
        self.warmup_tokens = self._tokens_at_end_of_warmup()
        if params.min_lr > max_lr:
            raise ConfigError(
                f"scheduler.params.min_lr: {params.min_lr} is above optimizer.params.lr {max_lr}; lower it"
            )
        self.decay = params.decay(self.warmup_tokens, timeline.train_tokens)

    def _tokens_at_end_of_warmup(self) -> int:
        """Return the consumed tokens at the end of the warmup. A warmup in samples may end inside a step."""
        params, timeline = self.params, self.timeline
        # The tokens of a warmup far longer than the run (1e15 steps) don't fit 64 bits. It only matters that it ends after
        # the run, so it is cut at the end of the step after the last one.
        after_the_run = timeline.steps + 1
        if params.warmup_steps is not None:
            return timeline.consumed_tokens(min(params.warmup_steps, after_the_run))
        if params.warmup_samples:
            samples = min(params.warmup_samples, timeline.consumed_samples(after_the_run))
            # 6 samples of 8 tokens, 4 per step, end inside step 2: 64 tokens at its end minus 2 samples are 48.
            step = timeline.steps_to_samples(samples)
            sample_tokens = timeline.shortening.used_tokens_per_sample(timeline.seqlen(step))
            return timeline.consumed_tokens(step) - (timeline.consumed_samples(step) - samples) * sample_tokens
        return params.warmup_tokens or 0

    def _warmup_progress(self, steps: IntArray) -> npt.NDArray[np.float64]:
        """Return the completed fraction of the warmup at the end of each step: above 1 after it, inf without a warmup."""
        params, timeline = self.params, self.timeline
        # At most one of the three is given. 0 means no warmup.
        if params.warmup_steps:
            return np.asarray(steps / params.warmup_steps, np.float64)
        if params.warmup_samples:
            return np.asarray(timeline.consumed_samples(steps) / params.warmup_samples, np.float64)
        if params.warmup_tokens:
            return np.asarray(timeline.consumed_tokens(steps) / params.warmup_tokens, np.float64)
        return np.full(steps.shape, np.inf)

    @overload
    def __call__(self, steps: int) -> float: ...
    @overload
    def __call__(self, steps: IntArray) -> FloatArray: ...
    def __call__(self, steps: int | IntArray) -> float | FloatArray:
        """Return the rate of one step (1-based) or of an array of steps, bit-identical either way."""
        at = np.atleast_1d(np.asarray(steps, np.int64))
        warmup, (shape, start, end) = self._warmup_progress(at), self.decay
        # Both differences are exact integers, so at constant length this quotient is bit-identical to the step-wise one.
        progress = np.clip((self.timeline.consumed_tokens(at) - start) / (end - start), 0.0, 1.0)
        rate = self.params.min_lr + (self.max_lr - self.params.min_lr) * SHAPES[shape](progress)
        # Exactly, independent of rounding and of the C library's cos(pi).
        rate = np.where(progress >= 1.0, self.params.min_lr, rate)
        rate = np.where(progress <= 0.0, self.max_lr, rate)
        # The decay starts after the warmup: a step that ends exactly with the warmup has exactly max_lr.
        rate = np.where(warmup <= 1.0, self.max_lr * np.minimum(warmup, 1.0), rate)
        return float(rate[0]) if isinstance(steps, int) else rate


TokenCosine = TokenRate
"""``TokenRate``, for scripts that import it by the name of one of its shapes."""
