"""What steps of a run cost: tokens, and floating point operations with those of its evaluations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from seqlen_curriculum.config.run import RunConfig

__all__ = ["Cost", "cost_of"]


class Cost(NamedTuple):
    """Of training, or of a part of it."""

    tokens: int = 0
    """Target tokens trained on."""
    flops: float = 0.0
    """Of training and of evaluating, whose forward is a third of training; see ``ModelConfig.flops_per_token``."""

    def __add__(self, other: object) -> Cost:
        assert isinstance(other, Cost)
        return Cost(self.tokens + other.tokens, self.flops + other.flops)


def cost_of(config: RunConfig, first_step: int, last_step: int) -> Cost:
    """Of the steps from ``first_step`` to ``last_step`` of a run with model, data and training sections."""
    assert config.model is not None
    assert config.data is not None
    assert config.training is not None
    timeline, training = config.timeline(), config.training
    last_step = min(last_step, timeline.steps)
    if first_step > last_step:
        return Cost()
    steps = np.arange(first_step, last_step + 1)
    tokens = np.diff(timeline.consumed_tokens(steps), prepend=timeline.consumed_tokens(first_step - 1))
    trained = float(np.sum(tokens * config.model.flops_per_token(timeline.seqlen(steps))))
    interval = training.eval_interval or timeline.steps + 1
    evaluations = last_step // interval - (first_step - 1) // interval
    evaluations += bool(training.eval_interval and last_step == timeline.steps and last_step % interval)
    length = config.data.seq_length
    evaluated = evaluations * training.eval_rows * length * config.model.flops_per_token(length) / 3
    return Cost(int(tokens.sum()), trained + float(evaluated))
