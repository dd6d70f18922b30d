"""GPT-2 as Hugging Face has it, trained without ever holding the logits of a batch or an S x S mask.

Shapes: ``B`` rows, ``S`` seqlen, ``H`` hidden size, ``V`` padded vocabulary, ``nh`` heads of size ``hs``, windows of ``s``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.cross_entropy import mean_cross_entropy
from seqlen_curriculum.models.pretrained import quiet

__all__ = [
    "CausalLM",
    "LossHead",
    "build_gpt2",
    "causal_attention",
    "checkpoint_activations",
    "save_config",
    "save_hf",
    "set_window",
]


def build_gpt2(config: ModelConfig, bos_token_id: int | None = None, eos_token_id: int | None = None) -> CausalLM:
    """A freshly initialised GPT-2 on the CPU in fp32 (GPT-2's init: normal 0.02, residual projections / sqrt(2 layers)).

    Weights follow from torch's global seed alone: seed every rank alike. The token ids only go into the saved config.
    """
    lm = GPT2LMHeadModel(_hf_config(config, bos_token_id, eos_token_id))
    if config.activation_checkpointing:
        checkpoint_activations(lm)
    return CausalLM(lm)


def checkpoint_activations(lm: Any) -> None:
    """Make a transformers model keep only each block's input."""
    # The first is the name since 5.23 of transformers, where the second warns.
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _hf_config(config: ModelConfig, bos_token_id: int | None, eos_token_id: int | None) -> Any:
    return GPT2Config(
        vocab_size=config.padded_vocab_size,
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_attention_heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new as one fused kernel
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        use_cache=False,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        attn_implementation="sdpa_causal",
    )


class CausalLM(nn.Module):
    """Tokens and their next tokens in, mean loss out; ``lm`` is the Hugging Face model that owns every parameter.

    ``lm`` gives logits too (``model.lm(inputs).logits``), without padding and without a key-value cache; to generate,
    ``save_hf`` it and load the folder.
    """

    lm: Any

    def __init__(self, lm: Any) -> None:
        super().__init__()
        lm.lm_head = LossHead(lm.transformer.wte.weight)
        lm.register_forward_pre_hook(_refuse_padding, with_kwargs=True)
        lm.transformer.wpe.register_forward_pre_hook(_restart_positions)
        self.lm = lm
        set_window(self, None)

    def forward(self, inputs: Tensor, targets: Tensor, first_position: int = 0) -> Tensor:
        """Mean cross entropy in nats, an fp32 scalar, of ``targets`` (B, S) given ``inputs`` (B, S), both int64.

        ``targets`` are already shifted: ``targets[:, i]`` follows ``inputs[:, i]``, which stands at ``first_position + i``.
        ConfigError if a position is at or above ``max_position_embeddings``.
        """
        end, positions = first_position + inputs.shape[1], self.lm.config.n_positions
        if end > positions:
            raise ConfigError(
                f"model.max_position_embeddings: {positions} is below the seqlen {end} of this batch; "
                "raise it, or lower data.seq_length and the curriculum's max_difficulty"
            )
        assert inputs.shape == targets.shape
        position_ids = torch.arange(first_position, end, device=inputs.device).unsqueeze(0)
        hidden = self.lm.transformer(inputs, position_ids=position_ids).last_hidden_state  # (B, S, H)
        loss: Tensor = self.lm.lm_head(hidden, targets)
        return loss


def set_window(model: CausalLM, window: int | None, restart_positions: bool = False) -> None:
    """From now on each token attends within its aligned window alone: tokens ``[k * window, (k + 1) * window)`` of its row.

    None for whole rows. Positions run on through the row, or with ``restart_positions`` begin at 0 in each window, which
    then is as good as a row of its own. Set it between steps, on every rank: backward may compute the forward again.
    Source: SkyLadder (Zhu et al. 2025), which masks short windows in full rows. ConfigError if ``window`` is below 1.
    """
    if window is not None and window < 1:
        raise ConfigError(f"window: {window} has no tokens; give 1 or more, or None for whole rows")
    for block in model.lm.transformer.h:
        block.attn.window = window
    model.lm.transformer.wpe.window = window if restart_positions else None


def _restart_positions(wpe: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return inputs if wpe.window is None else (inputs[0] % wpe.window,)


class LossHead(nn.Module):
    """The tied head. Its forward is the only place outside the embedding that touches the shared weight.

    That is what ZeRO-3 needs: a module's parameters are whole only inside its own forward.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight  # (V, H)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (..., V) of ``hidden`` (..., H); given ``targets`` (...), their mean cross entropy instead."""
        if targets is None:
            return F.linear(hidden, self.weight)
        return mean_cross_entropy(hidden.flatten(0, -2), self.weight, targets.flatten())


def _refuse_padding(_lm: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Attention never sees the mask, so padding would be taken for text in silence."""
    mask = keywords.get("attention_mask", inputs[2] if len(inputs) > 2 else None)
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise NotImplementedError("padding and masks: save_hf() the model and load the folder instead")


def causal_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of whole, unpadded rows, or in each ``module.window`` tokens of them (``set_window``).

    Query, key and value (B, nh, S, hs), result (B, S, nh, hs).
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise NotImplementedError("masks and key-value caches: save_hf() the model and load the folder instead")
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, is_causal=True, scale=scaling)
    return _attend(attend, module.window, query, key, value), None


def _attend(attend: Callable[..., Tensor], window: int | None, *qkv: Tensor) -> Tensor:
    """Windows as rows of their own, at the cost of short rows. Each of ``qkv`` (B, nh, S, hs), result (B, S, nh, hs)."""
    rows, heads, seqlen, head_size = qkv[0].shape
    if window is None or window >= seqlen:
        return attend(*qkv).transpose(1, 2)
    rest = seqlen % window
    if rest:
        parts = zip(*(torch.split(tensor, [seqlen - rest, rest], dim=2) for tensor in qkv), strict=True)
        return torch.cat([_attend(attend, window, *part) for part in parts], dim=1)
    windows = (torch.unflatten(tensor, 2, (-1, window)).transpose(1, 2).flatten(0, 1) for tensor in qkv)
    out = attend(*windows).transpose(1, 2)  # (B * S / s, s, nh, hs)
    return out.reshape(rows, seqlen, heads, head_size)


# transformers' own "sdpa" waits for the device on every forward, to see from the position ids whether rows are packed,
# and under torch.compile, where it can't see, builds the S x S mask. An attention of our own name gets no mask at all.
AttentionInterface.register("sdpa_causal", causal_attention)


def save_hf(model: CausalLM, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` for ``AutoModelForCausalLM.from_pretrained(folder)``.

    ``state_dict`` has the keys of ``model.state_dict()`` or of ``model.lm.state_dict()``: give it where ``model``
    itself doesn't hold whole parameters (ZeRO-3). The embedding keeps its padding rows, so logits are
    ``padded_vocab_size`` wide.
    """
    whole = model.state_dict() if state_dict is None else state_dict
    tensors = {key.removeprefix("lm."): tensor.detach().cpu().contiguous() for key, tensor in whole.items()}
    tensors.pop("lm_head.weight", None)  # tied; loading ties it again
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_config(model, folder, tensors["transformer.wte.weight"].dtype)
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def save_config(model: CausalLM, folder: str | Path, dtype: torch.dtype) -> None:
    """Write ``config.json`` beside weights of ``dtype``."""
    config = copy.deepcopy(model.lm.config)
    config.architectures = ["GPT2LMHeadModel"]
    config.dtype = dtype
    config.use_cache = True  # whoever loads it generates
    with quiet():
        config.save_pretrained(folder)
