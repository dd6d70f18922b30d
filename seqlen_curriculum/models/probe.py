"""Find out by forwards of 4 tokens what a causal language model of transformers does, instead of by its name.

Shapes: ``B`` rows, ``S`` seqlen, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from seqlen_curriculum.models.attention import SDPA_CAUSAL, causal_attention, refuse_padding, set_parts
from seqlen_curriculum.models.document_attention import DocumentParts
from seqlen_curriculum.models.loss_head import LossHead

__all__ = ["Abilities", "Ability", "backbone_of", "balance_loss", "probe"]

Ability = Literal["loss", "attention", "windows"]

_PROBE = "sdpa_causal_probe"
_LONG_ROW = 2**20
"""Tokens of the row whose mask is examined: more than any model's sliding window."""


class _DifferenceError(Exception):
    """The model doesn't do what ours does; the message says how."""


@dataclass
class Abilities:
    """The abilities of a model."""

    head_name: str = ""
    """Name of the ``LossHead`` in the model; "" if the loss can't be computed from hidden states."""
    routes: bool = False
    """True if the loss has transformers' auxiliary loss of a mixture of experts."""
    attentions: list[nn.Module] = field(default_factory=list)
    """The modules that attend by ``causal_attention``."""
    refused: dict[Ability, str] = field(default_factory=dict)
    """The reason for each ability that the model lacks."""


@torch.no_grad()
def probe(lm: Any) -> Abilities:
    """Give transformers' ``lm`` our head and attention where they compute what its own do; return what works.

    "loss": the loss from hidden states, by a ``LossHead`` in place of the output layer. "attention": ``causal_attention`` in
    all of its layers, registered as ``sdpa_causal``. "windows": attention within windows, with positions that continue or
    restart, as ``set_window`` and Ulysses need. The model is in fp32 on the CPU, and keeps its mode.
    """
    found, was_training = Abilities(), lm.training
    tokens = torch.arange(4).remainder(lm.get_input_embeddings().num_embeddings).unsqueeze(0)  # (1, S)
    lm.eval()
    questions: dict[Ability, Callable[[Any, Tensor, Abilities], None]] = {
        "loss": _ask_loss,
        "attention": _ask_attention,
        "windows": _ask_windows,
    }
    for ability, question in questions.items():
        try:
            question(lm, tokens, found)
        except Exception as error:  # architectures raise their own types, for example for an unknown argument
            kind = "" if isinstance(error, _DifferenceError) else f"{type(error).__name__}: "
            found.refused[ability] = f"{kind}{error}"
    lm.train(was_training)
    return found


def backbone_of(lm: Any) -> Any:
    """Return transformers' model without its output layer: (B, S) token ids to hidden states."""
    return lm.base_model if lm.base_model is not lm else lm.model  # Llama 4's class names another attribute


def _hidden(lm: Any, tokens: Tensor, **keywords: Any) -> Tensor:
    """Return the backbone's last hidden states (B, S, H)."""
    hidden: Tensor = backbone_of(lm)(input_ids=tokens, use_cache=False, **keywords).last_hidden_state
    return hidden


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal to rounding in fp32."""
    if found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def _ask_loss(lm: Any, tokens: Tensor, found: Abilities) -> None:
    """Replace the output layer by a ``LossHead`` if that gives the loss that transformers computes from labels."""
    linear = lm.get_output_embeddings()
    if type(linear) is not nn.Linear:
        raise _DifferenceError(f"its output layer is a {type(linear).__name__}")
    routes = bool(getattr(lm.config, "output_router_logits", False))
    outputs = backbone_of(lm)(input_ids=tokens, use_cache=False, **({"output_router_logits": True} if routes else {}))
    scale, cap = _logits_of_products(lm, linear, tokens, outputs.last_hidden_state)
    head = LossHead(*_parameters(linear), scale, cap)
    loss = head(outputs.last_hidden_state[:, :-1], tokens[:, 1:])
    if routes:
        loss = loss + balance_loss(lm, outputs.router_logits)
    if not _equal(loss, lm(input_ids=tokens, labels=tokens, use_cache=False).loss.float()):
        raise _DifferenceError("its loss isn't the mean cross entropy of its logits")
    found.head_name = next(name for name, module in lm.named_modules() if module is linear)
    lm.set_submodule(found.head_name, head)
    found.routes = routes


def _parameters(linear: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return the weight and the bias; torch's annotations call both a Tensor."""
    return linear.weight, linear.bias


def _logits_of_products(lm: Any, linear: nn.Linear, tokens: Tensor, hidden: Tensor) -> tuple[float, float | None]:
    """Return (scale, cap) of the logits ``cap * tanh(scale * product / cap)`` of the output layer's products.

    The layer's products are replaced by known numbers, so that the answer doesn't depend on the weights: logits near 0, as
    fresh weights give, are the same with and without a cap.
    """
    products = torch.linspace(-64, 64, linear.out_features).expand(*tokens.shape, -1).clone()  # (1, S, V)
    products[:, -1] = 2.0**30  # its cap is the logit
    inputs: list[Tensor] = []

    def replace(_linear: nn.Module, given: tuple[Tensor, ...], _out: Tensor) -> Tensor:
        inputs.append(given[0])
        return products.clone()

    hook = linear.register_forward_hook(replace)
    try:
        logits = lm(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    if len(inputs) != 1 or not _equal(inputs[0], hidden):
        raise _DifferenceError("its output layer isn't applied to the last hidden states of its backbone")
    largest, scale, cap = float(logits[0, -1, -1]), float(logits[0, 0, -1]) / 64, None
    if 0 < largest < 2.0**20:
        # 30 * tanh(64 / 30) = 29.17: the scale is 30 * atanh(29.17 / 30) / 64 = 1. Near 0 it is read more precisely.
        cap, middle = largest, linear.out_features * 33 // 64  # a product of about 2
        near = float(logits[0, 0, middle]) / cap
        scale = cap * math.atanh(near) / float(products[0, 0, middle])
        scale = 1.0 if abs(scale - 1) < 1e-5 else scale
    expected = products * scale if cap is None else cap * torch.tanh(products * scale / cap)
    if not _equal(logits[:, 0], expected[:, 0]):
        raise _DifferenceError("its logits are another function of its output layer than a scale and a soft cap")
    return scale, cap


def balance_loss(lm: Any, router_logits: Any) -> Tensor:
    """Return what transformers adds to the loss of a mixture of experts for unbalanced routers, an fp32 scalar."""
    function = getattr(sys.modules[type(lm).__module__], "load_balancing_loss_func", None)
    if function is None:
        raise _DifferenceError("its auxiliary loss isn't transformers' load_balancing_loss_func")
    loss: Tensor = lm.router_aux_loss_coef * function(router_logits, lm.num_experts, lm.num_experts_per_tok, None)
    return loss


_seen: list[nn.Module] = []


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """Attend by ``causal_attention`` if it has the pattern of the model's own mask, and record the module."""
    if module not in _seen:
        _seen.append(module)
    if attention_mask is None:
        raise _DifferenceError("its masks aren't those of transformers.masking_utils")
    visible = min(keywords.get("sliding_window") or _LONG_ROW, _LONG_ROW)
    if int(attention_mask.flatten()[0]) != visible:
        raise _DifferenceError("its masks aren't those of whole rows or of sliding windows")
    return causal_attention(module, query, key, value, None, **keywords)


def _visible_tokens(mask_function: Callable[..., Tensor], **_: Any) -> Tensor:
    """Return, in the place of a mask (1, 1, 1, 1), how many tokens each token of a long row attends to, at most; else -1.

    It is -1 if they aren't the last tokens up to that one.
    """
    first, places = torch.tensor(0), torch.arange(_LONG_ROW)
    visible = int(mask_function(first, first, places[-1], places).sum())
    for query in places[[-1, _LONG_ROW // 2 + 1, _LONG_ROW // 3, 5]]:
        expected = (places <= query) & (places > query - visible)
        if not torch.equal(mask_function(first, first, query, places).broadcast_to(places.shape), expected):
            visible = -1
    return torch.tensor(visible).view(1, 1, 1, 1)


AttentionInterface.register(_PROBE, _attend)
AttentionMaskInterface.register(_PROBE, _visible_tokens)


def _ask_attention(lm: Any, tokens: Tensor, found: Abilities) -> None:
    """Let ``lm`` attend by ``causal_attention`` if its hidden states stay the same."""
    own, hidden = lm.config._attn_implementation, _hidden(lm, tokens)
    try:
        lm.config._attn_implementation = _PROBE
        probed = _hidden(lm, tokens)
        if not _seen:
            raise _DifferenceError("it doesn't attend through transformers' AttentionInterface")
        if not _equal(probed, hidden):
            raise _DifferenceError("its hidden states differ from those with causal attention without masks")
        found.attentions, own = list(_seen), SDPA_CAUSAL
    finally:
        _seen.clear()
        lm.config._attn_implementation = own
    lm.register_forward_pre_hook(refuse_padding, with_kwargs=True)


def _ask_windows(lm: Any, tokens: Tensor, found: Abilities) -> None:
    """Raise ``_DifferenceError`` if windows or other parts of rows aren't equal to separate rows with the same positions."""
    if not found.attentions:
        raise _DifferenceError(found.refused["attention"])
    if "position_ids" not in signature(backbone_of(lm).forward).parameters:
        raise _DifferenceError("it takes no position_ids")
    hidden, whole = _hidden(lm, tokens), torch.arange(4).unsqueeze(0)
    rows = _hidden(lm, tokens.view(2, 2), position_ids=whole[:, :2])  # (2, 2, H)
    end = _hidden(lm, tokens[:, 2:], position_ids=whole[:, 2:])  # (1, 2, H)
    explicit = _hidden(lm, tokens, position_ids=whole)
    for attention in found.attentions:
        attention.window = 2  # type: ignore[assignment]  # a plain attribute
    restarted = _hidden(lm, tokens, position_ids=whole % 2)
    continued = _hidden(lm, tokens, position_ids=whole)
    for attention in found.attentions:
        attention.window = None  # type: ignore[assignment]
    # Two rows with other parts, of 2 + 2 and of 4 tokens, so that their positions differ.
    parts = DocumentParts.of(np.array([[True, False, True, False], [True, False, False, False]]))
    set_parts(found.attentions, parts)
    cut = _hidden(lm, tokens.expand(2, 4), position_ids=parts.positions)  # (2, 4, H)
    set_parts(found.attentions, None)
    answers = [(explicit, hidden), (restarted.view(rows.shape), rows), (continued[:, 2:], end)]
    answers += [(cut[:1], restarted), (cut[1:], hidden)]
    if not all(_equal(answer, expected) for answer, expected in answers):
        raise _DifferenceError("a part of a row isn't equal to a separate row with the same positions")
