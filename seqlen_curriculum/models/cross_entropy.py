"""Mean cross entropy over the vocabulary with bounded memory for logits.

Shapes: ``N`` tokens, ``H`` hidden size, ``V`` padded vocabulary.

On a GPU the logits are computed at once if they fit, otherwise in equal chunks of tokens whose gradients are computed in
the forward pass. torch's ``linear_cross_entropy``, used on CPUs, would use chunks of 32 tokens there: 4,486 kernels for 4096
tokens. Forward and backward for V=50304 in bf16 on an H200 (torch 2.11, medians; memory beyond the operands):

============ ======== ================== ==================
N x H        chunks   uncompiled         compiled
============ ======== ================== ==================
512 x 768    1        0.65 ms, 0.3 GiB   0.91 ms, 0.1 GiB
4096 x 768   1        4.1 ms, 2.3 GiB    2.0 ms, 0.8 GiB
16384 x 768  2        16.4 ms, 6.4 GiB   8.4 ms, 2.5 GiB
65536 x 768  7        64.3 ms, 7.3 GiB   34.3 ms, 2.9 GiB
16384 x 2048 2        24.7 ms, 6.7 GiB   17.7 ms, 2.9 GiB
65536 x 4096 7        158.2 ms, 8.6 GiB  135.6 ms, 4.2 GiB
============ ======== ================== ==================

Without chunks, ``F.cross_entropy`` of fp32 logits takes 15.6 ms and 9.2 GiB for 16384 x 768. The relative error of the
weight's gradient is 1.7e-3 in one chunk and 2.4e-3 in two, compiled or not.

Every chunk reads the head's weights and adds to their gradient, about 16 V H bytes, in addition to 44 V bytes per token
(counted with meta tensors in tests/test_cross_entropy.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["mean_cross_entropy"]

LossOf = Callable[[Tensor, Tensor], Tensor]

_CPU_CHUNK_TOKENS = 256
"""Maximum tokens with logits in memory on a CPU. At V=50304 in fp32, torch's own choice took 8 times as long."""
_MOST_LOGITS = 2**29
"""Maximum logits in memory on a GPU: 10,672 tokens at V=50304. In bf16 a logit and its gradient take up to 12 bytes, 6.4 GB
in all. Smaller chunks would increase the share of the weights, which every chunk reads, in the traffic."""


def mean_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    compiled: bool = False,
    bias: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Return the mean cross entropy in nats, an fp32 scalar, of ``targets`` (N) int64.

    The logits are ``hidden @ weight.T + bias``; with ``cap`` they are then ``cap * tanh(logits / cap)``, as in Gemma 2.
    On a GPU, ``compiled`` computes the loss of the logits by compiled kernels, which write no fp32 copy of them.

    Memory for the logits of ``hidden`` (N, H) and ``weight`` (V, H) is bounded. At N=65536 and V=50304 they would take
    65536 * 50304 * 4 bytes = 13 GB in fp32, and their gradient the same. With chunks, second derivatives aren't available.
    """
    if hidden.device.type == "cpu" and hasattr(F, "linear_cross_entropy"):
        if cap is None:
            return _cpu_cross_entropy(hidden, weight, targets, bias)
        chunks = -(-len(targets) // _CPU_CHUNK_TOKENS)
    else:
        # A capped logit takes about twice the memory, because the backward pass needs its fp32 tanh.
        most = _MOST_LOGITS if cap is None else _MOST_LOGITS // 2
        chunks = -(-len(targets) * len(weight) // most)
    loss_of = _compiled_loss(cap) if compiled else partial(_loss_of, cap=cap)
    return _chunked_cross_entropy(hidden, weight, targets, chunks, loss_of, bias)


def _cpu_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """Return the mean cross entropy by torch's ``linear_cross_entropy`` (2.13 and later)."""
    half = hidden.dtype in (torch.float16, torch.bfloat16)
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=_CPU_CHUNK_TOKENS,
        chunking_method=None,
        acc_policy="accurate",
        acc_dtype=torch.float32 if half else None,
    )
    # torch averages half precision losses by a half precision sum. bf16 has 8 significant bits: from 1024 on its values
    # are 8 apart, so adding a loss of 3 changes nothing. Therefore the losses are averaged here in fp32.
    losses = F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="none", options=options)  # (N)
    return losses.float().mean()


def _chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunks: int,
    loss_of: LossOf | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the mean cross entropy, computed from the logits of one chunk of tokens at a time."""
    loss_of = loss_of or _loss_of
    total: Tensor
    if chunks <= 1:
        total = loss_of(F.linear(hidden, weight, bias), targets)
    elif torch.is_grad_enabled():
        total = _ChunkedSum.apply(hidden, weight, bias, targets, chunks, loss_of)  # type: ignore[no-untyped-call]
    else:
        pairs = zip(hidden.chunk(chunks), targets.chunk(chunks), strict=True)
        total = torch.stack([loss_of(F.linear(rows, weight, bias), wanted) for rows, wanted in pairs]).sum()
    return total / len(targets)


def _loss_of(logits: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """Return the summed cross entropy of ``targets`` (n) by ``logits`` (n, V), with an fp32 softmax in half precision."""
    if cap is not None:
        logits = cap * torch.tanh(logits.float() / cap)
    loss: Tensor = F.nll_loss(F.log_softmax(logits, dim=-1, dtype=torch.float32), targets, reduction="sum")
    return loss


@functools.cache
def _compiled_loss(cap: float | None = None) -> LossOf:
    """Return ``_loss_of`` as compiled kernels for any number of tokens."""
    return torch.compile(_loss_of if cap is None else partial(_loss_of, cap=cap), dynamic=True)


class _ChunkedSum(torch.autograd.Function):
    """Summed cross entropy by chunks, with gradients computed in the forward pass: no logits are stored or recomputed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunks: int, loss_of: LossOf
    ) -> Tensor:
        # The losses are summed, not averaged, because in fp16 a gradient divided by N=16384 would be 0 or subnormal. The
        # weight's gradient is accumulated in fp32, because in bf16 each addition would round it by 0.2 %.
        weight_grad: Tensor | None = None  # (V, H)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)  # (V)
        # The maximum of fp16 is 65504. 10,000 tokens with the same target and hidden states of 8 sum to 80,000, but to 5,000
        # after division by 16. The loss scale is applied too late to help.
        divisor = 16.0 if hidden.dtype == torch.float16 else 1.0
        hidden_grads, total = [], torch.zeros((), device=hidden.device)
        for rows, wanted in zip(hidden.chunk(chunks), targets.chunk(chunks), strict=True):
            logits = F.linear(rows, weight, bias).requires_grad_()  # (n, V)
            with torch.enable_grad():
                loss = loss_of(logits, wanted)
            (logits_grad,) = torch.autograd.grad(loss, logits)
            total += loss.detach()
            hidden_grads.append(logits_grad @ weight)
            smaller = rows if divisor == 1 else rows / divisor
            product = logits_grad.t() @ smaller
            weight_grad = product.float() if weight_grad is None else weight_grad.add_(product)
            if bias_grad is not None:
                bias_grad += logits_grad.sum(0, dtype=torch.float32)
        ctx.save_for_backward(torch.cat(hidden_grads), weight_grad, bias_grad)
        ctx.weight_scale = divisor
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        # Rounded to the weight's dtype in the kernel that writes it.
        scaled = torch.empty_like(weight_grad, dtype=ctx.weight_dtype)
        torch.mul(weight_grad, grad * ctx.weight_scale, out=scaled)
        bias_scaled = None if bias_grad is None else (bias_grad * grad).to(ctx.weight_dtype)
        return hidden_grad * grad, scaled, bias_scaled, None, None, None
