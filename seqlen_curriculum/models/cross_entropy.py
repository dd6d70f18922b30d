"""The loss from hidden states, by torch's own ``linear_cross_entropy`` where torch has it (2.13 does).

Shapes: ``N`` tokens, ``H`` hidden size, ``V`` padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["mean_cross_entropy"]

_CPU_CHUNK_TOKENS = 256
"""Tokens whose logits a CPU holds at once. Measured at V=50304 in fp32: torch's own choice took 8 times as long."""


def mean_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats, an fp32 scalar, of ``targets`` (N) int64 given ``hidden`` (N, H), ``weight`` (V, H).

    The logits are made and used up chunk by chunk. The losses of tokens are averaged here, in fp32: torch's own mean of
    half precision losses is a half precision sum.
    """
    if not hasattr(F, "linear_cross_entropy"):
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)
    losses = F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=_options(hidden))
    return losses.float().mean()


def _options(hidden: Tensor) -> Any:
    """How torch cuts the tokens: its own choice, measured on GPUs, except on a CPU."""
    options = torch.nn.LinearCrossEntropyOptions
    if hidden.device.type != "cpu":
        return options()
    half = hidden.dtype in (torch.float16, torch.bfloat16)
    return options(
        batch_chunk_size=_CPU_CHUNK_TOKENS,
        chunking_method=None,
        acc_policy="accurate",
        acc_dtype=torch.float32 if half else None,
    )
