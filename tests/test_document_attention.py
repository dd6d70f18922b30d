"""Attention and positions that stop at document ends: losses and gradients of each document alone, without masks.

Shapes: B rows, S seqlen.
"""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers.architectures import ours, tokens
from helpers.gpt2 import Squares, batch, gradients, relative_error, tiny
from numpy.typing import NDArray
from torch import Tensor

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models import document_attention
from seqlen_curriculum.models.document_attention import DocumentParts
from seqlen_curriculum.training import abilities
from seqlen_curriculum.training.documents import DocumentBatches

ROWS, SEQLEN = 3, 37


def random_starts(seed: int, share: float = 0.12) -> NDArray[np.bool_]:
    starts: NDArray[np.bool_] = np.random.default_rng(seed).random((ROWS, SEQLEN)) < share
    starts[:, 0] = True
    return starts


def model_and_rows(name: str, **keys: Any) -> tuple[Any, Tensor, Tensor]:
    model = tiny(**keys) if name == "gpt2" else ours(name)
    return model, *(batch(ROWS, SEQLEN) if name == "gpt2" else tokens(ROWS, SEQLEN))


def parts_alone(starts: NDArray[np.bool_]) -> list[tuple[int, slice]]:
    """Return (row, columns) of each part."""
    bounds = [[*np.flatnonzero(row).tolist(), SEQLEN] for row in starts]
    return [(row, slice(a, b)) for row, own in enumerate(bounds) for a, b in pairwise(own)]


@pytest.mark.parametrize("share", [0.05, 0.6])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])  # grouped heads, sliding windows of 8
def test_loss_and_gradients_are_those_of_each_document_alone(name: str, share: float) -> None:
    model, inputs, targets = model_and_rows(name)
    starts = random_starts(5, share)
    model.double()
    loss = model(inputs, targets, 0, DocumentParts.of(starts))
    loss.backward()
    found = {key: grad.clone() for key, grad in gradients(model).items()}
    model.zero_grad()
    total = 0.0
    for row, columns in parts_alone(starts):
        own = inputs[row, columns][None], targets[row, columns][None]
        alone = model(*own) * own[0].numel() / inputs.numel()
        alone.backward()
        total += alone.item()
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert max(relative_error(grad, found[key]) for key, grad in gradients(model).items()) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_loss_in_fp32_is_that_of_each_document_alone(name: str) -> None:
    model, inputs, targets = model_and_rows(name)
    starts = random_starts(6)
    with torch.no_grad():
        loss = model(inputs, targets, 0, DocumentParts.of(starts)).item()
        alone = [
            model(inputs[r, c][None], targets[r, c][None]).item() * (c.stop - c.start) for r, c in parts_alone(starts)
        ]
    assert loss == pytest.approx(sum(alone) / inputs.numel(), rel=1e-6)


@pytest.mark.parametrize("restart", [False, True])
def test_windows_cut_the_parts_further(restart: bool) -> None:
    model, inputs, targets = model_and_rows("gpt2")
    model.double()
    starts, window = random_starts(7), 10
    loss = model(inputs, targets, 0, DocumentParts.of(starts, window, restart)).item()
    total = 0.0
    for row, columns in parts_alone(starts):
        cuts = [columns.start, *(c for c in range(0, SEQLEN, window) if columns.start < c < columns.stop), columns.stop]
        for first, end in pairwise(cuts):
            position = 0 if restart else first - columns.start
            own = slice(first, end)
            total += model(inputs[row, own][None], targets[row, own][None], position).item() * (end - first)
    assert loss == pytest.approx(total / inputs.numel(), rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_targets_that_are_not_kept_have_no_gradient(name: str) -> None:
    model, inputs, targets = model_and_rows(name)
    starts = random_starts(5)
    model.double()
    found = []
    for wrong in (targets, torch.where(torch.from_numpy(starts), (targets + 1) % 90, targets)):
        model.zero_grad()
        loss = model(inputs, wrong, 0, DocumentParts.of(starts).keeping(~starts, 100.0))
        loss.backward()
        found.append([loss.item(), *(grad.sum().item() for grad in gradients(model).values())])
    assert found[0] == found[1]
    with torch.no_grad():
        whole = [
            model(inputs[r, c][None], targets[r, c][None]).item() * (c.stop - c.start) for r, c in parts_alone(starts)
        ]
        firsts = [model(inputs[r, c][None, :1], targets[r, c][None, :1]).item() for r, c in parts_alone(starts)]
    assert found[0][0] == pytest.approx((sum(whole) - sum(firsts)) / 100, rel=1e-6)


def test_whole_rows_are_bit_identical_to_attention_without_parts() -> None:
    model, inputs, targets = model_and_rows("gpt2")
    plain = model(inputs, targets)
    whole = random_starts(0, share=0.0)
    assert torch.equal(model(inputs, targets, 0, DocumentParts.of(whole)), plain)
    assert not torch.equal(model(inputs, targets, 0, DocumentParts.of(random_starts(0))), plain)
    assert torch.equal(model(inputs, targets), plain)  # nothing is left of the parts


def test_no_tensor_is_seqlen_by_seqlen() -> None:
    model, inputs, targets = model_and_rows("gpt2")
    with Squares(SEQLEN) as squares:
        model(inputs, targets, 0, DocumentParts.of(random_starts(8))).backward()
    assert squares.found == []


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for again in (False, True):
        model, inputs, targets = model_and_rows("gpt2", activation_checkpointing=again)
        for seed in (1, 2):  # the second micro-batch has other parts
            model(inputs, targets, 0, DocumentParts.of(random_starts(seed))).backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_parts_are_padded_by_a_quarter_at_most() -> None:
    for length in range(1, 3000, 7):
        starts = np.zeros((1, 3001), dtype=bool)
        starts[0, [0, length]] = True
        parts = DocumentParts.of(starts)
        for (_, padded), own in zip(parts.groups, sorted([length, 3001 - length]), strict=False):
            assert own <= padded <= max(own * 1.25, own + 7)
        assert len(parts.padding) == len(parts.taken) - 3001
        assert parts.taken[parts.places].tolist() == list(range(3001))


@pytest.mark.parametrize("masked", [False, True])
def test_the_parts_that_are_tried_first_are_padded_by_most_of_a_quarter(masked: bool) -> None:
    for seqlen in (256, 1024, 2048):
        parts = DocumentBatches(masked).largest(2, seqlen, torch.device("cpu"))
        assert len(parts.taken) >= 2 * seqlen * 1.15
        kept = 2 * seqlen if parts.kept is None else len(parts.kept)
        assert kept == 2 * (seqlen - 4 * masked)
        assert parts.weight == 1.0


def test_parts_are_compared_by_their_values() -> None:
    parts = DocumentParts.of(random_starts(3))
    assert pickle.loads(pickle.dumps(parts)) == parts
    assert parts != DocumentParts.of(random_starts(4))
    assert parts != parts.keeping(random_starts(3), 1.0)


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_varlen_attention_gets_the_parts(monkeypatch: pytest.MonkeyPatch, sliding_window: int | None) -> None:
    """On a CPU torch's kernel is missing, so a function with its documented meaning stands in for it."""
    calls: list[int] = []

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: Any, window_size: Any, enable_gqa: bool
    ) -> Tensor:
        bounds, _, longest, _ = rest
        calls.append(longest)
        place = torch.arange(len(q))
        part = torch.searchsorted(bounds, place, right=True)
        seen = (part[:, None] == part) & (place[:, None] >= place)
        if window_size[0] >= 0:
            seen &= place[:, None] - place <= window_size[0]
        assert window_size[1] == 0
        heads = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        return out[0].transpose(0, 1).contiguous()

    name, keys = ("llama", {}) if sliding_window is None else ("mistral", {"sliding_window": sliding_window})
    model = ours(name, **keys).double()
    inputs, targets = tokens(ROWS, SEQLEN)
    parts = DocumentParts.of(random_starts(9))
    expected = model(inputs, targets, 0, parts).item()
    monkeypatch.setattr(document_attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(document_attention, "_has_varlen", lambda *_: True)
    assert model(inputs, targets, 0, parts).item() == pytest.approx(expected, rel=1e-9)
    assert calls == [max(c.stop - c.start for _, c in parts_alone(random_starts(9)))] * 2


@pytest.mark.needs("gpu")
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_bf16_on_a_gpu_is_close_to_fp32_on_a_cpu(name: str) -> None:
    found = {}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model, inputs, targets = model_and_rows(name)
        model.to(device, dtype)
        parts = DocumentParts.of(random_starts(10)).to(torch.device(device))
        loss = model(inputs.to(device), targets.to(device), 0, parts)
        loss.backward()
        found[device] = {"loss": loss.detach().cpu(), **{key: grad.cpu() for key, grad in gradients(model).items()}}
    assert max(relative_error(grad, found["cpu"][key]) for key, grad in found["cuda"].items()) < 0.05


def test_an_architecture_with_its_own_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abilities, "log_rank0", print)
    with pytest.raises(ConfigError, match=r'data.attention: "document" doesn\'t work with a bloom'):
        abilities.check_abilities(ours("bloom"), "truncate", None, stops_at_documents=True)
    with pytest.raises(ConfigError, match=r'data.attention: "document" doesn\'t work with a bloom'):
        ours("bloom")(*tokens(1, 4), 0, DocumentParts.of(np.ones((1, 4), dtype=bool)))
