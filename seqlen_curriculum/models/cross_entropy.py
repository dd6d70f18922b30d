"""The loss from hidden states, with torch's ``linear_cross_entropy`` where torch has it (2.13 and later).

Shapes: ``N`` tokens, ``H`` hidden size, ``V`` padded vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["mean_cross_entropy"]

_CPU_CHUNK_TOKENS = 256
"""Tokens whose logits a CPU holds at once. Measured at V=50304 in fp32: torch's own choice took 8 times as long."""


def mean_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy in nats, an fp32 scalar, of ``targets`` (N) int64.

    The logits of ``hidden`` (N, H) and ``weight`` (V, H) are computed and used up chunk by chunk: N=8192 and V=50304 would
    be 8192 * 50304 * 4 bytes = 1.6 GB in fp32, and their gradient as much again.
    """
    if not hasattr(F, "linear_cross_entropy"):
        logits = F.linear(hidden, weight)  # (N, V)
        return F.cross_entropy(logits.float(), targets)
    options = torch.nn.LinearCrossEntropyOptions()  # torch's own chunks, chosen for GPUs
    if hidden.device.type == "cpu":
        half = hidden.dtype in (torch.float16, torch.bfloat16)
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=_CPU_CHUNK_TOKENS,
            chunking_method=None,
            acc_policy="accurate",
            acc_dtype=torch.float32 if half else None,
        )
    # torch's own mean of half precision losses is a half precision sum. bf16 keeps 8 binary digits: from 1024 on its
    # values are 8 apart, and adding a loss of 3 changes nothing. So the losses are averaged here, in fp32.
    losses = F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)  # (N)
    return losses.float().mean()
