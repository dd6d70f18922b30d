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
    norm = result.grad_norm
    flag = result.loss.new_full(
        (), stop
    )  # fills on the device; torch.tensor(stop) would be copied to it, and waited for
    values = [result.loss, flag]
    if norm is not None:
        values.append(norm.reshape(()) if isinstance(norm, torch.Tensor) else torch.full_like(flag, norm))
    shared = torch.stack(values)  # fp64
    if (ranks := dist.get_world_size()) > 1:
        # The norm is the same on all ranks, in fp32, so that its sum over them in fp64 is exact. Where one rank's is not
        # finite, the sum isn't either.
        dist.all_reduce(shared)
    loss, stops, *norms = shared.tolist()
    grad_norm = norms[0] / ranks if norms else None
    if grad_norm is None or math.isfinite(grad_norm):
        return Outcome(loss / ranks, grad_norm, stops > 0, False)
    return Outcome(loss / ranks, None if fp16 else grad_norm, stops > 0, not fp16)
