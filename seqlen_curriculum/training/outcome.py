"""The outcome of a step, the same on all ranks, from one reduction and one synchronization with the device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from deepspeed import comm as dist

from seqlen_curriculum.training.executor import StepResult

__all__ = ["Outcome", "share_outcome"]


class Outcome(NamedTuple):
    """The outcome of a step over all ranks."""

    loss: float
    grad_norm: float | None
    """None if DeepSpeed stores none, or on fp16 overflow."""
    stop: bool
    """True if any rank was signalled to stop."""
    is_broken: bool
    """True if the gradient norm is not finite."""


def share_outcome(result: StepResult, stop: bool = False, fp16: bool = False) -> Outcome:
    """Return the outcome of ``result`` over all ranks, with their mean loss; ``stop``: this rank was signalled to stop.

    In ``fp16`` a gradient norm that is not finite is an overflow, and DeepSpeed has skipped the step.
    """
    norm = result.grad_norm
    flag = result.loss.new_full((), stop)  # torch.tensor(stop) would copy synchronously
    values = [result.loss, flag]
    if norm is not None:
        values.append(norm.reshape(()) if isinstance(norm, torch.Tensor) else torch.full_like(flag, norm))
    shared = torch.stack(values)  # fp64
    if (ranks := dist.get_world_size()) > 1:
        # The norm is the same fp32 value on all ranks, so its sum over them in fp64 is exact. If one rank's is not finite,
        # neither is the sum.
        dist.all_reduce(shared)
    loss, stops, *norms = shared.tolist()
    grad_norm = norms[0] / ranks if norms else None
    if grad_norm is None or math.isfinite(grad_norm):
        return Outcome(loss / ranks, grad_norm, stops > 0, False)
    return Outcome(loss / ranks, None if fp16 else grad_norm, stops > 0, not fp16)
