"""The loss from hidden states: equal to plain cross entropy in every dtype, at a bounded size of logits.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.fx.experimental._config
from helpers.largest_tensor import LargestTensor
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqlen_curriculum.models import cross_entropy
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
    hidden, weight, targets = head_problem(1000, 8, 2048, torch.float32)
    with LargestTensor() as largest:
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


@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 300])
def test_gpu_chunks_equal_plain_cross_entropy(chunks: int) -> None:
    hidden, weight, targets = head_problem(300, 16, 256, torch.float32)
    loss = cross_entropy._chunked_cross_entropy(hidden, weight, targets, chunks)
    for ours, expected in zip(loss_and_gradients(loss, hidden, weight), exact(hidden, weight, targets), strict=True):
        assert relative_error(ours, expected) < 1e-6
    with torch.no_grad():
        evaluated = cross_entropy._chunked_cross_entropy(hidden, weight, targets, chunks)
    assert relative_error(evaluated, loss.detach()) < 1e-6


@pytest.fixture
def any_size() -> Iterator[None]:
    """Compile for any size, as compile_model does. After pytest's monkeypatch the setting would not exist."""
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        yield


@pytest.mark.needs("compiler")
@pytest.mark.usefixtures("any_size")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # from tracing
def test_the_compiled_loss_equals_the_uncompiled_one_with_one_graph_for_all_lengths() -> None:
    compiled = cross_entropy._compiled_loss()
    torch._dynamo.utils.counters.clear()
    for tokens in (24, 64, 256, 300):  # 64 equals the width, 256 the vocabulary
        for chunks in (1, 3):
            hidden, weight, targets = head_problem(tokens, 64, 256, torch.bfloat16)
            found, expected = (
                loss_and_gradients(
                    cross_entropy._chunked_cross_entropy(hidden, weight, targets, chunks, loss_of), hidden, weight
                )
                for loss_of in (compiled, cross_entropy._loss_of)
            )
            for ours, theirs in zip(found, expected, strict=True):
                assert relative_error(ours, theirs) < 1e-3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_many_tokens_of_one_target_do_not_overflow_a_chunk_in_fp16() -> None:
    hidden = torch.full((21344, 8), 8.0, dtype=torch.float16).requires_grad_()  # a chunk sums up 10672 * 8 > 65504
    weight = torch.zeros(512, 8, dtype=torch.float16).requires_grad_()
    loss = cross_entropy._chunked_cross_entropy(hidden, weight, torch.zeros(21344, dtype=torch.int64), 2)
    (gradient,) = torch.autograd.grad(loss, [weight])
    assert gradient[0].tolist() == pytest.approx([8 * (1 / 512 - 1)] * 8, rel=1e-3)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**16)])
@pytest.mark.parametrize("chunks", [2, 16])
def test_gpu_chunks_err_at_most_twice_as_much_as_whole_logits(dtype: torch.dtype, scale: float, chunks: int) -> None:
    hidden, weight, targets = head_problem(1024, 32, 2048, dtype)
    _, *expected = exact(hidden, weight, targets)
    errors = []
    for number in (1, chunks):
        loss = cross_entropy._chunked_cross_entropy(hidden, weight, targets, number)
        assert loss.dtype == torch.float32
        _, *found = loss_and_gradients(loss, hidden, weight, scale=scale)
        errors.append([relative_error(ours, theirs) for ours, theirs in zip(found, expected, strict=True)])
    for whole, chunked in zip(*errors, strict=True):
        assert 0 < chunked < 2 * whole < 0.01


class Traffic(TorchDispatchMode):
    """Counts the kernels of what runs under it, and the bytes that they read and write."""

    FREE = ("t", "view", "detach", "slice", "split", "transpose", "expand", "empty_like")
    """Operations without a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.moved = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in self.FREE:
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if name.startswith("nll_loss"):  # picks one of each row's V numbers, or writes it among zeros
                read = [x for x in read if x.dim() < 2]
            elif name.startswith(("zeros", "ones")):
                read = []
            written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.kernels += 1
            self.moved += sum(x.numel() * x.element_size() for x in [*read, *written])
            self.largest = max([self.largest, *(x.numel() for x in written)])
        return out


def gpu_traffic(tokens: int, width: int, vocab: int) -> Traffic:
    """That of forward and backward in bf16, on tensors without data, which take the way of a GPU's."""
    hidden = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(vocab, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    with Traffic() as traffic:
        mean_cross_entropy(hidden, weight, targets).backward()
    return traffic


def test_a_gpu_computes_logits_that_fit_in_one_piece() -> None:
    traffic = gpu_traffic(4096, 768, 50304)
    assert traffic.kernels <= 12
    assert traffic.moved < 44 * 4096 * 50304  # bytes for each logit


@pytest.mark.parametrize(
    ("tokens", "width", "most"), [(16384, 768, 1.05), (16384, 2048, 1.1), (65536, 2048, 1.1), (65536, 4096, 1.2)]
)
def test_gpu_chunks_move_little_more_than_whole_logits(
    tokens: int, width: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked = gpu_traffic(tokens, width, 50304)
    assert chunked.largest <= cross_entropy._MOST_LOGITS
    assert chunked.kernels < 100
    monkeypatch.setattr(cross_entropy, "_MOST_LOGITS", tokens * 50304)
    whole = gpu_traffic(tokens, width, 50304)
    assert 1 < chunked.moved / whole.moved < most
