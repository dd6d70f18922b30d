"""The loss from hidden states: equal to plain cross entropy in every dtype, at a bounded size of logits.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqlen_curriculum.models.cross_entropy import mean_cross_entropy


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def head_problem(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), targets (N)."""
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, width, generator=g).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocab, width, generator=g)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=g)


def loss_and_gradients(loss: Tensor, *leaves: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    grads = torch.autograd.grad(loss.float() * scale, leaves)
    return loss.detach(), *(grad.double() / scale for grad in grads)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(h @ w.T, targets)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 1000])
def test_equals_plain_cross_entropy_at_any_number_of_tokens(tokens: int) -> None:
    hidden, weight, targets = head_problem(tokens, 16, 256, torch.float32)
    found = loss_and_gradients(mean_cross_entropy(hidden, weight, targets), hidden, weight)
    for ours, expected in zip(found, exact(hidden, weight, targets), strict=True):
        assert relative_error(ours, expected) < 1e-6


def test_without_gradients_too() -> None:
    hidden, weight, targets = head_problem(300, 16, 256, torch.float32)
    with torch.no_grad():
        loss = mean_cross_entropy(hidden, weight, targets)
    assert relative_error(loss, exact(hidden, weight, targets)[0]) < 1e-6


def test_where_torch_lacks_it_plain_cross_entropy_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = head_problem(300, 16, 256, torch.float32)
    monkeypatch.delattr(F, "linear_cross_entropy")
    found = loss_and_gradients(mean_cross_entropy(hidden, weight, targets), hidden, weight)
    for ours, expected in zip(found, exact(hidden, weight, targets), strict=True):
        assert relative_error(ours, expected) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_keeps_an_fp32_loss_and_scaled_gradients(dtype: torch.dtype, tolerance: float) -> None:
    # 1/N is subnormal in fp16 here: gradients must be right only once the loss scale is in
    hidden, weight, targets = head_problem(16384, 16, 512, dtype)
    loss = mean_cross_entropy(hidden, weight, targets)
    found = loss_and_gradients(loss, hidden, weight, scale=2.0**14)
    expected = exact(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert relative_error(found[0], expected[0]) < 2e-4  # each token's loss is rounded, their sum is not
    assert max(relative_error(x, y) for x, y in zip(found[1:], expected[1:], strict=True)) < tolerance


def test_logits_are_never_held_whole() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **kwargs or {})
            self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
            return out

    hidden, weight, targets = head_problem(1000, 8, 2048, torch.float32)
    with Largest() as largest:
        mean_cross_entropy(hidden, weight, targets).backward()
    assert largest.numel <= 256 * 2048  # a CPU's chunk, not 1000 * 2048


def test_certain_and_hopeless_targets_stay_finite() -> None:
    hidden = torch.tensor([[200.0], [200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = mean_cross_entropy(hidden, weight, torch.tensor([0, 1]))  # losses 0 and 400
    assert loss.item() == 200.0
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [0.0, 1.0]  # ((1, 0) - (0, 1)) . (1, -1) / 2 = 1
