"""Learning rate by tokens: linear warmup in steps, samples or tokens, then cosine decay over consumed tokens.

Short steps consume few tokens, so under a sequence length warmup a step-wise decay is too fast. The paper decays over
tokens instead (Section 5.1 and Appendix A.2). The rate of step t uses the counters *including* step t, so the rate of the
first step is above zero and that of the last step is ``min_lr``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, overload

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Count, CountOrZero, Section, suggest
from seqlen_curriculum.schedule.pacing import elementwise
from seqlen_curriculum.schedule.piecewise import IntArray
from seqlen_curriculum.schedule.timeline import Timeline

__all__ = ["TokenCosine", "TokenCosineConfig", "TokenCosineParams", "is_token_cosine"]


class TokenCosineParams(Section):
    """The ``scheduler.params`` of ``TokenCosineLR``."""

    warmup_steps: CountOrZero | None = None
    """Linear warmup over this many steps (the paper: 3000). At most one of the three warmups."""
    warmup_samples: CountOrZero | None = None
    """Linear warmup over this many samples."""
    warmup_tokens: CountOrZero | None = None
    """Linear warmup over this many target tokens (GPT-3: 375e6). Slower under a sequence length warmup."""
    decay_tokens: Count | None = None
    """Consumed tokens at which the rate reaches ``min_lr``; default: ``training.train_tokens``."""
    min_lr: float = Field(default=0.0, ge=0)
    """The rate at and after ``decay_tokens``."""

    @model_validator(mode="after")
    def _one_warmup(self) -> TokenCosineParams:
        warmups = ("warmup_steps", "warmup_samples", "warmup_tokens")
        given = [name for name in warmups if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; keep one")
        return self


class TokenCosineConfig(Section):
    """The ``scheduler`` section with type ``TokenCosineLR``. DeepSpeed handles all other types."""

    type: Literal["TokenCosineLR"]
    """The name that selects this schedule."""
    params: TokenCosineParams = TokenCosineParams()
    """Its settings."""


def is_token_cosine(scheduler: object) -> bool:
    """Return whether a ``scheduler`` section has the type ``TokenCosineLR``, even if slightly misspelt."""
    kind = scheduler.get("type") if isinstance(scheduler, Mapping) else None
    return isinstance(kind, str) and suggest(kind.lower(), ["tokencosinelr"], cutoff=0.8) is not None


class TokenCosine:
    """The learning rate of any step of a timeline: Megatron's warmup and cosine decay, counted in tokens.

    ``max_lr`` is the optimizer's ``lr``. Raises ConfigError if the warmup isn't shorter than the decay, or if ``min_lr`` is
    above ``max_lr``.
    """

    def __init__(self, timeline: Timeline, params: TokenCosineParams, max_lr: float) -> None:
        self.timeline, self.params, self.max_lr = timeline, params, max_lr
        self.decay_tokens = params.decay_tokens or timeline.train_tokens
        self.warmup_tokens = self._tokens_at_end_of_warmup()
        if params.min_lr > max_lr:
            raise ConfigError(
                f"scheduler.params.min_lr: {params.min_lr} is above optimizer.params.lr {max_lr}; lower it"
            )
        if self.warmup_tokens >= self.decay_tokens:
            raise ConfigError(
                f"scheduler.params.decay_tokens: {self.decay_tokens} is not above the {self.warmup_tokens} tokens that "
                "the learning rate warmup takes; shorten the warmup or decay over more tokens"
            )

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
    def __call__(self, steps: IntArray) -> npt.NDArray[np.float64]: ...
    def __call__(self, steps: int | IntArray) -> float | npt.NDArray[np.float64]:
        """Return the rate of one step (1-based) or of an array of steps, bit-identical either way."""
        at = np.atleast_1d(np.asarray(steps, np.int64))
        warmup = self._warmup_progress(at)
        # Both differences are exact integers, so at constant length this quotient is bit-identical to the step-wise one.
        decayed = self.timeline.consumed_tokens(at) - self.warmup_tokens
        progress = np.clip(decayed / (self.decay_tokens - self.warmup_tokens), 0.0, 1.0)
        cosine = 0.5 * (1.0 + elementwise(lambda x: math.cos(math.pi * x), progress))
        rate = self.params.min_lr + (self.max_lr - self.params.min_lr) * cosine
        rate = np.where(progress >= 1.0, self.params.min_lr, rate)  # exactly, independent of the C library's cos(pi)
        # The cosine starts after the warmup: a step that ends exactly with the warmup has exactly max_lr.
        rate = np.where(warmup <= 1.0, self.max_lr * np.minimum(warmup, 1.0), rate)
        return float(rate[0]) if isinstance(steps, int) else rate
