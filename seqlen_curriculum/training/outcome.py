"""What came of a step, the same on all ranks: one reduction over them, and one read of the device by the host."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from deepspeed import comm as dist

from seqlen_curriculum.training.executor import StepResult

__all__ = ["Outcome", "share_outcome"]


class Outcome(NamedTuple):
    """A step as all ranks have agreed on it."""

    loss: float
    grad_norm: float | None
    """None where DeepSpeed keeps none, and where fp16 overflowed."""
    stop: bool
    """Whether any rank was asked to stop."""
    is_broken: bool
    """Whether the gradient norm is not finite."""


def share_outcome(result: StepResult, stop: bool = False, fp16: bool = False) -> Outcome:
    """Return the outcome of ``result`` over all ranks, with the mean of their losses; ``stop``: this rank was asked to.

    In ``fp16`` a gradient norm that is not finite is an overflow, and DeepSpeed has skipped the step.
    """
    values, norm = result.loss.new_zeros(4), result.grad_norm  # loss, stop, broken, norm
    values[0].copy_(result.loss)
    values[1].fill_(stop)  # fills on the device; torch.tensor(stop) would be copied to it, and waited for
    if isinstance(norm, torch.Tensor):
        values[3].copy_(norm.reshape(()))
    elif norm is not None:
        values[3].fill_(norm)
    if not fp16:
        values[2].copy_(values[3].isfinite().logical_not())
    if dist.get_world_size() > 1:
        dist.all_reduce(values[:3])  # the norm is that of all ranks already
    loss, stops, breaks, own_norm = values.tolist()
    has_norm = norm is not None and (not fp16 or math.isfinite(own_norm))
    return Outcome(loss / dist.get_world_size(), own_norm if has_norm else None, stops > 0, breaks > 0)
