"""Attention within aligned windows of full rows: the numbers of a block-diagonal mask, the cost of short rows.

Shapes: B rows, S seqlen, s window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gpt2 import Squares, batch, gradients, reference, relative_error, seeded_gradients, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.gpt2 import CausalLM, save_hf, set_window
from seqlen_curriculum.models.gpt2_pipeline_layers import WordEmbedding, hidden_loss, middle_layers, with_head

SEQLEN = 36
WINDOWS = [1, 5, 12, 18, 35, 36, 37]  # of 5 a window of 1 is left over; 35 leaves 1 too; 37 is above the row


def windowed(window: int | None, restart: bool = False, **keys: Any) -> CausalLM:
    model = tiny(**keys)
    set_window(model, window, restart)
    return model


def block_diagonal(seqlen: int, window: int) -> Tensor:
    """What Hugging Face adds to the scores, (1, 1, S, S): 0 within a window up to the diagonal, else the lowest."""
    place = torch.arange(seqlen)
    seen = (place[:, None] >= place) & (place[:, None] // window == place // window)
    return torch.zeros(1, 1, seqlen, seqlen, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_loss_and_every_gradient_equal_hugging_face_under_a_mask(window: int, restart: bool) -> None:
    model = windowed(window, restart).double()
    hf = reference(model).double()
    inputs, targets = batch(seqlen=SEQLEN)
    positions = torch.arange(SEQLEN) % (window if restart else SEQLEN)
    logits = hf(inputs, attention_mask=block_diagonal(SEQLEN, window), position_ids=positions[None]).logits
    torch.testing.assert_close(model.lm(inputs).logits, logits, rtol=0, atol=1e-6)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    loss = model(inputs, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = gradients(hf)
    assert max(relative_error(found, theirs[name]) for name, found in gradients(model).items()) < 1e-6


@settings(max_examples=40)
@given(rows=st.integers(1, 3), seqlen=st.integers(1, 64), window=st.integers(1, 70), restart=st.booleans())
def test_the_loss_is_the_mean_over_windows_as_rows_of_their_own(
    rows: int, seqlen: int, window: int, restart: bool
) -> None:
    model, (inputs, targets) = windowed(window, restart).double(), batch(rows, seqlen)
    loss = model(inputs, targets).item()
    set_window(model, None)
    total = 0.0
    for start in range(0, seqlen, window):
        cut = slice(start, start + window)
        own = model(inputs[:, cut], targets[:, cut], first_position=0 if restart else start).item()
        total += own * len(range(seqlen)[cut])
    assert loss == pytest.approx(total / seqlen, rel=1e-6)


@pytest.mark.parametrize("window", [4, 12])
def test_restarted_windows_are_segments(window: int) -> None:
    model, (inputs, targets) = windowed(window, restart=True).double(), batch(seqlen=SEQLEN)
    logits = model.lm(inputs).logits
    model(inputs, targets).backward()
    found = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    set_window(model, None)
    segments = inputs.reshape(-1, window)
    torch.testing.assert_close(logits.reshape(-1, window, 256), model.lm(segments).logits, rtol=0, atol=1e-9)
    model(segments, targets.reshape(-1, window)).backward()
    assert max(relative_error(grad, found[name]) for name, grad in gradients(model).items()) < 1e-6


def test_positions_restart_wherever_a_rank_begins() -> None:
    wpe = windowed(5, restart=True).lm.transformer.wpe
    assert torch.equal(wpe(torch.arange(8, 16)), wpe.weight[[3, 4, 0, 1, 2, 3, 4, 0]])
    wpe = windowed(5).lm.transformer.wpe
    assert torch.equal(wpe(torch.arange(8, 16)), wpe.weight[8:16])


@pytest.mark.parametrize("window", [SEQLEN, SEQLEN + 1, None])
def test_a_window_of_the_row_or_none_is_the_whole_row_to_the_last_bit(window: int | None) -> None:
    inputs, _ = batch(seqlen=SEQLEN)
    whole = tiny().lm(inputs).logits
    model = windowed(5, restart=True)
    assert not torch.equal(model.lm(inputs).logits, whole)
    set_window(model, window)
    assert torch.equal(model.lm(inputs).logits, whole)


class AttendedShapes(TorchFunctionMode):
    """(rows, seqlen) of every scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            assert kwargs["is_causal"] is True
            assert kwargs.get("attn_mask") is None
            self.seen.append((args[0].shape[0], args[0].shape[2]))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("window", "shapes"),
    [(8, [(12, 8), (3, 4)]), (12, [(9, 12)]), (1, [(108, 1)]), (35, [(3, 35), (3, 1)]), (36, [(3, 36)])],
)
def test_attends_in_rows_as_short_as_the_window(window: int, shapes: list[tuple[int, int]]) -> None:
    model = windowed(window)
    with AttendedShapes() as attended:
        model(*batch(rows=3, seqlen=SEQLEN))
    assert attended.seen == shapes * 2  # two layers


def test_no_tensor_is_seqlen_by_seqlen() -> None:
    model, (inputs, targets) = windowed(8), batch(seqlen=37)
    with Squares(37) as squares:
        model(inputs, targets).backward()
    assert squares.found == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_checkpointing_gives_the_same_gradients_as_windows_change(dropout: float) -> None:
    plain, checkpointed = (tiny(dropout=dropout, activation_checkpointing=again) for again in (False, True))
    for window in (5, 12, None):
        for model in (plain, checkpointed):
            set_window(model, window, restart_positions=True)
        expected, found = seeded_gradients(plain, seed=5), seeded_gradients(checkpointed, seed=5)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("window", [5, 12])
def test_the_layers_of_a_pipeline_attend_in_windows_too(window: int, restart: bool) -> None:
    model, (inputs, targets) = windowed(window, restart), batch(seqlen=SEQLEN)
    words = WordEmbedding(model.lm.transformer.wte.weight)
    hidden = words(inputs)
    for layer in middle_layers(model):
        hidden = layer(hidden)
    assert torch.equal(hidden_loss(with_head(words, hidden), targets), model(inputs, targets))


def test_nothing_of_it_is_saved(tmp_path: Path) -> None:
    for name, model in (("whole", tiny()), ("windowed", windowed(5, restart=True))):
        save_hf(model, tmp_path / name)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "windowed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("window", [0, -8])
def test_a_window_without_tokens_is_refused(window: int) -> None:
    with pytest.raises(ConfigError, match=f"window: {window} has no tokens; give 1 or more"):
        set_window(tiny(), window)
