"""Attention without masks: transformers' own at every length, in windows and in sliding windows.

Shapes: B rows, S seqlen, nh heads of size hs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.architectures import CONFIGS, ours, tokens, transformers_model
from helpers.gpt2 import Squares
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.attention import causal_attention, set_window

WITH_INTERFACE = [name for name in CONFIGS if name not in ("gemma2", "gpt_oss", "llama4", "gptj", "bloom", "mpt")]


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", WITH_INTERFACE)
def test_logits_equal_those_of_transformers_at_every_length(name: str) -> None:
    model, theirs = ours(name).eval(), transformers_model(name).eval()
    assert theirs.config._attn_implementation == "eager"
    with torch.no_grad():
        for seqlen in (1, 7, 8, 33, 64):
            inputs, _ = tokens(seqlen=seqlen)
            assert close(model.lm(inputs).logits, theirs(inputs).logits)


@pytest.mark.parametrize("name", WITH_INTERFACE)
def test_restarted_windows_equal_separate_rows(name: str) -> None:
    model, (inputs, targets) = ours(name).eval(), tokens(seqlen=48)
    with torch.no_grad():
        for window in (1, 6, 12, 48):
            rows = model(inputs.reshape(-1, window), targets.reshape(-1, window))
            set_window(model, window, restart_positions=True)
            assert close(model(inputs, targets), rows)
            set_window(model, None)


@pytest.mark.parametrize("name", WITH_INTERFACE)
def test_windows_equal_rows_that_begin_at_a_later_position(name: str) -> None:
    model, (inputs, targets) = ours(name).eval(), tokens(seqlen=33)
    with torch.no_grad():
        for window in (5, 11):
            set_window(model, window)
            loss = model(inputs, targets)
            set_window(model, None)
            starts = range(0, 33, window)
            parts = [inputs[:, start : start + window] for start in starts]
            losses = [
                model(part, targets[:, start : start + window], first_position=start) * part.shape[1]
                for start, part in zip(starts, parts, strict=True)
            ]
            assert close(loss, torch.stack(losses).sum() / 33)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_tokens_is_refused(window: int) -> None:
    with pytest.raises(ConfigError, match=f"window: {window} has no tokens"):
        set_window(ours("llama"), window)


def test_an_architecture_without_windows_is_refused() -> None:
    with pytest.raises(ConfigError, match='method: "window" doesn\'t work with a gptj'):
        set_window(ours("gptj"), 8)


def qkv(rows: int, seqlen: int, groups: int = 1, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, 4, S, 8), key (B, 4 / groups, S, 8), value (B, 4 / groups, S, width)."""
    draw = torch.Generator().manual_seed(seqlen)
    shapes = [(4, 8), (4 // groups, 8), (4 // groups, width)]
    q, k, v = (torch.randn(rows, heads, seqlen, size, generator=draw) for heads, size in shapes)
    return q, k, v


def reference(q: Tensor, k: Tensor, v: Tensor, sliding: int | None, window: int | None) -> Tensor:
    """Attention (B, S, nh, hs) by a mask of all pairs of tokens."""
    place = torch.arange(q.shape[2])
    seen = place[:, None] >= place
    if sliding is not None:
        seen &= place[:, None] - place < sliding
    if window is not None:
        seen &= place[:, None] // window == place // window
    k, v = (x.repeat_interleave(4 // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * 0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@settings(max_examples=80)
@given(
    rows=st.integers(1, 3),
    seqlen=st.integers(1, 40),
    groups=st.sampled_from([1, 2, 4]),
    sliding=st.none() | st.integers(1, 45),
    window=st.none() | st.integers(1, 45),
    width=st.sampled_from([8, 6]),
)
def test_any_combination_of_groups_and_windows_equals_a_mask(
    rows: int, seqlen: int, groups: int, sliding: int | None, window: int | None, width: int
) -> None:
    q, k, v = qkv(rows, seqlen, groups, width)
    out, _ = causal_attention(SimpleNamespace(window=window), q, k, v, None, scaling=0.5, sliding_window=sliding)
    torch.testing.assert_close(out, reference(q, k, v, sliding, window), rtol=0, atol=1e-5)


def test_sliding_windows_have_the_gradients_of_a_mask_and_no_mask_of_all_pairs() -> None:
    leaves = [tensor.requires_grad_() for tensor in qkv(2, 37, groups=2)]
    with Squares(37) as squares:
        out, _ = causal_attention(SimpleNamespace(), *leaves, None, scaling=0.5, sliding_window=8)
        found = torch.autograd.grad(out.square().sum(), leaves)
    assert squares.found == []
    expected = torch.autograd.grad(reference(*leaves, 8, None).square().sum(), leaves)
    for ours_, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=0, atol=1e-4)


def test_grouped_heads_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, attend = [], F.scaled_dot_product_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        heads.append((q.shape[1], k.shape[1], v.shape[1]))
        return attend(q, k, v, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    ours("llama")(*tokens())
    assert set(heads) == {(4, 2, 2)}


def test_dropout_reaches_attention_in_training_only() -> None:
    model, (inputs, targets) = ours("llama", attention_dropout=0.5), tokens()
    torch.manual_seed(0)
    dropped = model.train()(inputs, targets).item()
    evaluated = model.eval()(inputs, targets).item()
    assert dropped != evaluated
    assert model(inputs, targets).item() == evaluated


@pytest.mark.parametrize(
    "given_", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, {"is_causal": False}]
)
def test_arguments_that_change_the_result_are_refused_by_name(given_: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(given_))):
        causal_attention(SimpleNamespace(), *qkv(1, 4), None, **given_)


def test_padding_is_refused() -> None:
    model, (inputs, _) = ours("llama"), tokens()
    padded = torch.ones_like(inputs)
    padded[0, -3:] = 0
    with pytest.raises(NotImplementedError, match="padding and masks"):
        model.lm(input_ids=inputs, attention_mask=padded)
    with pytest.raises(NotImplementedError, match="padding and masks"):
        model.lm(inputs, padded)
    assert torch.equal(model.lm(inputs, attention_mask=torch.ones_like(inputs)).logits, model.lm(inputs).logits)
