"""The cost of steps of a run: tokens, and floating point operations including evaluations."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from seqlen_curriculum.config.run import RunConfig

__all__ = ["Cost", "cost_of"]


class Cost(NamedTuple):
    """The cost of training, or of a part of it."""

    tokens: int = 0
    """Target tokens trained on."""
    flops: float = 0.0
    """FLOPs of training and evaluation, NaN if unknown. A forward pass is a third of training; see
    ``ModelConfig.flops_per_token``."""

    def __add__(self, other: object) -> Cost:
        assert isinstance(other, Cost)
        return Cost(self.tokens + other.tokens, self.flops + other.flops)


def cost_of(config: RunConfig, first_step: int, last_step: int) -> Cost:
    """Return the cost of steps ``first_step`` to ``last_step`` of a run with model, data and training sections."""
    assert config.model is not None
    assert config.data is not None
    assert config.training is not None
    timeline, training = config.timeline(), config.training
    last_step = min(last_step, timeline.steps)
    if first_step > last_step:
        return Cost()
    steps = np.arange(first_step, last_step + 1)
    tokens = np.diff(timeline.consumed_tokens(steps), prepend=timeline.consumed_tokens(first_step - 1))
    if config.model.uncounted:
        return Cost(int(tokens.sum()), math.nan)
    flops = float(np.sum(tokens * config.model.flops_per_token(timeline.seqlen(steps))))

    evaluations = 0
    if training.eval_interval:
        # With an interval of 3, steps 3 to 7 include evaluations after 3 and 6: 7 // 3 - 2 // 3 = 2. A run of 46 steps is
        # also evaluated after step 46, although it is not a multiple of 3.
        evaluations = last_step // training.eval_interval - (first_step - 1) // training.eval_interval
        evaluations += last_step == timeline.steps and last_step % training.eval_interval > 0
    seqlen = config.data.seq_length
    flops += float(evaluations * training.eval_rows * seqlen * config.model.flops_per_token(seqlen) / 3)
    return Cost(int(tokens.sum()), flops)
