"""Tiny configurations of transformers' causal language models, and models with the attention and head of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from seqlen_curriculum.models.causal_lm import AnyCausalLM

VOCAB = 97
_ROTARY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GROUPED = _ROTARY | {"num_key_value_heads": 2}
_SLIDING = _GROUPED | {"sliding_window": 8}
_EXPERTS = _GROUPED | {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.02}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
_GPT |= dict.fromkeys(("bos_token_id", "eos_token_id"), 0) | dict.fromkeys(
    ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0
)
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen2-sliding": ("qwen2", _SLIDING | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", _GROUPED | {"head_dim": 16}),
    "mistral": ("mistral", _SLIDING),
    "olmo2": ("olmo2", _GROUPED),
    "olmo3": ("olmo3", _SLIDING),
    "neox": ("gpt_neox", _ROTARY),
    "gemma2": ("gemma2", _SLIDING | _MIXED),  # soft caps of logits and of attention
    "gemma2-uncapped": ("gemma2", _SLIDING | _MIXED | {"attn_logit_softcapping": None}),
    "gemma3": ("gemma3_text", _SLIDING | _MIXED),
    "cohere": ("cohere", _GROUPED | {"logit_scale": 0.25}),
    "granite": ("granite", _GROUPED | {"logits_scaling": 6.0}),
    "phi": ("phi", _ROTARY),  # a head with a bias
    "phi3": ("phi3", _SLIDING),
    "stablelm": ("stablelm", _GROUPED),
    "starcoder2": ("starcoder2", _SLIDING),
    "opt": (
        "opt",
        _ROTARY | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),  # learned positions with an offset
    "gptj": ("gptj", _GPT | {"rotary_dim": 4}),  # a head with a bias
    "gpt2": ("gpt2", _GPT | {"activation_function": "relu"}),
    "gpt_bigcode": ("gpt_bigcode", _GPT),  # one key-value head
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "vocab_size": VOCAB}),
    "mixtral": ("mixtral", _EXPERTS | {"num_local_experts": 4}),
    "olmoe": ("olmoe", _EXPERTS | {"num_experts": 4}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 24}),
    "llama4": ("llama4_text", _GROUPED | {"head_dim": 8, "attention_chunk_size": 8, "num_local_experts": 2}),
    "gpt_oss": ("gpt_oss", _EXPERTS | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8}),
}
"""Name: (model type, keys)."""


def transformers_model(name: str, **keys: Any) -> Any:
    """Build transformers' own model, with its eager attention and larger weights than it starts from."""
    kind, given = CONFIGS[name]
    config = AutoConfig.for_model(kind, **(given | keys))
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():  # fresh weights give logits so small that a soft cap changes nothing
        for name_of, weight in lm.named_parameters():
            weight += 0.05 * torch.randn_like(weight) * ("norm" not in name_of)
    return lm


def ours(name: str, **keys: Any) -> AnyCausalLM:
    """Return our model with the weights of ``transformers_model``."""
    return AnyCausalLM(transformers_model(name, **keys))


def tokens(rows: int = 2, seqlen: int = 33) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, S)."""
    drawn = torch.randint(0, VOCAB, (rows, seqlen + 1), generator=torch.Generator().manual_seed(1))
    return drawn[:, :-1], drawn[:, 1:]
