"""Causal attention without masks for every model that attends through transformers' ``AttentionInterface``.

Shapes: ``B`` rows, ``S`` seqlen, ``nh`` heads of size ``hs``, of which ``nk`` have keys and values; windows of ``s`` tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.document_attention import DocumentParts, attend_in_parts

__all__ = ["SDPA_CAUSAL", "Windowed", "causal_attention", "refuse_padding", "set_parts", "set_window"]

SDPA_CAUSAL = "sdpa_causal"
"""The name of ``causal_attention`` in transformers' ``AttentionInterface``."""


class Windowed(Protocol):
    """A model whose attention can be restricted to windows."""

    @property
    def attentions(self) -> Sequence[nn.Module]:
        """The modules that call ``causal_attention``. Raises ConfigError if windows don't work in this architecture."""

    def restart_positions(self, window: int | None) -> None:
        """Count positions from 0 in each ``window`` tokens of a row, or through the row."""


def set_window(model: Windowed, window: int | None, restart_positions: bool = False) -> None:
    """Restrict attention to aligned windows, tokens ``[k * window, (k + 1) * window)`` of a row; None for whole rows.

    Positions continue through the row, or with ``restart_positions`` start at 0 in each window, which makes a window
    equivalent to a separate row. Call it between steps and on every rank, because the backward pass may recompute the
    forward. Source: SkyLadder (Zhu et al. 2025), which masks short windows in full rows. Raises ConfigError if ``window``
    is below 1, or the model's architecture has no windows.
    """
    if window is not None and window < 1:
        raise ConfigError(f"window: {window} has no tokens; give 1 or more, or None for whole rows")
    for attention in model.attentions:
        attention.window = window  # type: ignore[assignment]  # a plain attribute
    model.restart_positions(window if restart_positions else None)


def set_parts(attentions: Iterable[nn.Module], parts: DocumentParts | None) -> None:
    """Restrict the attention of the next forward, and of its recomputation, to ``parts``; None for rows or windows."""
    for attention in attentions:
        attention.parts = parts  # type: ignore[assignment]  # a plain attribute


def causal_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention in unpadded rows, or in the parts of them that ``set_window`` or ``set_parts`` has set.

    Query is (B, nh, S, hs), key and value are (B, nk, S, hs), the result is (B, S, nh, hs). With ``sliding_window`` a token
    attends to that many tokens, the last of which is itself. Raises NotImplementedError for anything else that changes the
    result: masks, key-value caches, soft caps, sinks.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise NotImplementedError("masks and key-value caches: save_hf() the model and load the folder instead")
    _refuse_others(others)
    attend = partial(_attend, dropout=dropout, scaling=scaling, sliding_window=sliding_window)
    rows, heads, seqlen, _ = query.shape
    window, qkv = getattr(module, "window", None), (query, key, value)
    if (parts := getattr(module, "parts", None)) is not None:
        return attend_in_parts(attend, parts, *qkv, dropout, scaling, sliding_window), None
    if window is None or window >= seqlen:
        return attend(*qkv).transpose(1, 2), None

    # Windows become separate rows, so attention costs S * s instead of S * S and needs no mask. With S=10 and s=4,
    # tokens 0-3 and 4-7 are two rows of 4 for each row of the batch, and tokens 8-9 one row of 2.
    whole = seqlen - seqlen % window
    windows = [
        torch.unflatten(tensor[:, :, :whole], 2, (-1, window))
        .transpose(1, 2)
        .flatten(0, 1)  # (B * whole / s, nh, s, hs)
        for tensor in qkv
    ]
    out = attend(*windows).transpose(1, 2)  # (B * whole / s, s, nh, hs)
    out = out.reshape(rows, whole, heads, value.shape[3])
    if whole < seqlen:
        rest = attend(*(tensor[:, :, whole:] for tensor in qkv)).transpose(1, 2)  # (B, S - whole, nh, hs)
        out = torch.cat([out, rest], dim=1)
    return out, None


def _refuse_others(others: dict[str, Any]) -> None:
    """Raise NotImplementedError for an argument that changes the result, such as ``softcap`` or the sinks ``s_aux``."""
    for name, given in others.items():
        # Flags select outputs of the model, except is_causal.
        harmless = given is None or name in ("position_ids", "cache_position")
        if not harmless and (not isinstance(given, bool) or (name == "is_causal" and not given)):
            raise NotImplementedError(f"{name}: causal attention without a mask doesn't have it")


def _attend(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """Return causal attention (B, nh, S, hs) in whole rows."""
    seqlen, grouped = query.shape[2], query.shape[1] != key.shape[1]
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    if sliding_window is None or seqlen <= sliding_window:
        return attend(query, key, value, is_causal=True, enable_gqa=grouped)

    # Blocks of w = sliding_window tokens attend to their own block and the one before it, which costs S * 2w instead of
    # S * S. A query at place i of its block sees w of these 2w keys: those at places i + 1 to i + w. With w=3:
    #   query 0:  . x x | x . .
    #   query 1:  . . x | x x .
    #   query 2:  . . . | x x x
    # The first block has no block before it. The last one is padded at its end, which no other token sees.
    if grouped:  # with a mask, few kernels have grouped heads
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    place = torch.arange(2 * sliding_window, device=query.device)
    own = place[:sliding_window, None]
    band = (place > own) & (place <= own + sliding_window)  # (w, 2w)
    blocks = -(-seqlen // sliding_window)
    q, k, v = (
        F.pad(tensor, (0, 0, 0, blocks * sliding_window - seqlen))
        .reshape(*tensor.shape[:2], blocks, sliding_window, tensor.shape[3])
        .transpose(1, 2)  # (B, S / w, nh, w, hs)
        for tensor in (query, key, value)
    )
    first = attend(q[:, 0], k[:, 0], v[:, 0], is_causal=True)  # (B, nh, w, hs)
    pairs = [torch.cat([tensor[:, :-1], tensor[:, 1:]], dim=3) for tensor in (k, v)]  # (B, S / w - 1, nh, 2w, hs)
    rest, keys, values = (tensor.flatten(0, 1) for tensor in (q[:, 1:], *pairs))
    later = attend(rest, keys, values, attn_mask=band)  # (B * (S / w - 1), nh, w, hs)
    later = later.reshape(len(query), blocks - 1, *first.shape[1:]).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, later], dim=2)[:, :, :seqlen]


def refuse_padding(lm: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Raise an error for padded rows; ``causal_attention`` gets no mask, so padding would silently be read as text."""
    mask = signature(lm.forward).bind_partial(*inputs, **keywords).arguments.get("attention_mask")
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise NotImplementedError("padding and masks: save_hf() the model and load the folder instead")


# transformers' "sdpa" synchronizes the device in every forward, to detect packed rows by their position ids. Under
# torch.compile it can't and builds the S x S mask. An attention registered under another name gets no mask.
AttentionInterface.register(SDPA_CAUSAL, causal_attention)
