"""Count the parameters and FLOPs of a model from its ``config.json``, by family of architectures. Needs no torch.

Symbols in comments: ``H`` hidden size, ``A`` heads of size ``d``, ``K`` key-value heads, ``I`` inner size, ``V`` rows of
the word embedding, ``E`` experts. The numbers equal those of the models that transformers builds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["COMMON_KEYS", "FAMILIES", "REQUIRED", "Counts", "Family", "count", "keys"]

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Keys that a configuration must have. A default that fits another size would be worse than none."""


def keys(names: str) -> frozenset[str]:
    """Return names that are separated by blanks."""
    return frozenset(names.split())


COMMON_KEYS = keys(
    """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act
    max_position_embeddings initializer_range use_cache pad_token_id bos_token_id eos_token_id tie_word_embeddings
    attention_dropout rope_parameters rope_theta rope_scaling architectures transformers_version dtype torch_dtype
    output_hidden_states return_dict chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type
    """
)
"""Keys of every family below."""


@dataclass(frozen=True)
class Family:
    """The keys of one architecture, and what decides which weights a block has."""

    keys: frozenset[str]
    """Its own keys, beside ``COMMON_KEYS``."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of missing keys that affect the counts. A missing ``num_key_value_heads`` is ``num_attention_heads``, a missing
    ``head_dim`` is ``hidden_size / num_attention_heads``, and other missing keys are off."""
    norms: int = 2
    """Vectors of ``H`` weights in the norms of a block."""
    final_norms: int = 1
    """Vectors of ``H`` weights in the norm after the last block."""
    qk_norm: str = ""
    """Norms of queries and keys: ``"head"`` has ``d`` weights for each, ``"width"`` one for each of their columns."""
    qkv_bias: bool = False
    """True if queries, keys and values always have biases; ``attention_bias`` adds them to all four products."""
    is_gated: bool = True
    """True for an MLP of three products without biases, False for one of two products with biases."""
    checks_width: bool = False
    """True if transformers refuses an ``H`` that isn't a multiple of ``A`` even with ``head_dim``."""


_GROUPED = "num_key_value_heads head_dim rms_norm_eps"
_SLIDING = "use_sliding_window sliding_window max_window_layers layer_types"
_ROUTER = "num_experts num_experts_per_tok output_router_logits router_aux_loss_coef"
_SPARSE = f"{_ROUTER} norm_topk_prob moe_intermediate_size decoder_sparse_step mlp_only_layers"

FAMILIES: dict[str, Family] = {
    "llama": Family(keys(f"{_GROUPED} attention_bias mlp_bias pretraining_tp"), checks_width=True),
    "mistral": Family(keys(f"{_GROUPED} sliding_window"), {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family(
        keys(f"{_GROUPED} {_SLIDING}"),
        {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        qkv_bias=True,
    ),
    "qwen3": Family(
        keys(f"{_GROUPED} {_SLIDING} attention_bias"),
        {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        qk_norm="head",
    ),
    # OLMo's norms have no weights.
    "olmo": Family(keys("num_key_value_heads head_dim attention_bias clip_qkv"), norms=0, final_norms=0),
    "olmo2": Family(keys(f"{_GROUPED} attention_bias"), qk_norm="width"),
    # GPT-NeoX's layer norms have a weight and a bias each.
    "gpt_neox": Family(
        keys(
            "hidden_dropout classifier_dropout layer_norm_eps use_parallel_residual attention_bias is_decoder rotary_pct "
            "rotary_emb_base partial_rotary_factor"
        ),
        {"attention_bias": True},
        norms=4,
        final_norms=2,
        is_gated=False,
        checks_width=True,
    ),
    "gemma": Family(
        keys(f"{_GROUPED} attention_bias use_bidirectional_attention hidden_activation"),
        {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    ),
    "mixtral": Family(
        keys(f"{_GROUPED} {_ROUTER} sliding_window num_local_experts router_jitter_noise"),
        {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": Family(
        keys(f"{_GROUPED} {_SLIDING} {_SPARSE} shared_expert_intermediate_size qkv_bias"),
        {
            "num_key_value_heads": 16,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3_moe": Family(
        keys(
            f"{_GROUPED} {_SPARSE} attention_bias use_sliding_window sliding_window max_window_layers num_local_experts"
        ),
        {
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        qk_norm="head",
    ),
    "olmoe": Family(
        keys(f"num_key_value_heads rms_norm_eps {_ROUTER} num_local_experts norm_topk_prob attention_bias clip_qkv"),
        {"num_experts": 64, "num_experts_per_tok": 8},
        qk_norm="width",
    ),
}
"""Families by ``model_type``. A missing one is trained all the same, but isn't counted."""


@dataclass(frozen=True)
class Counts:
    """The numbers of a model that a plan needs."""

    parameters: int
    """All trained parameters. A tied head counts once."""
    multiplied: int
    """Parameters that take part in the products of a token: without a word embedding that is only looked up, and of the
    experts only those that a token is routed to."""
    attention_width: int
    """``A * d``."""
    windows: Mapping[int | None, int]
    """Number of layers by attention window in tokens, None for full attention."""
    matrices: int | None = None
    """Parameters in the matrices of all blocks, without biases and norms; None where they weren't counted."""

    def flops_per_token(self, seqlen: Any) -> Any:
        """Return the training FLOPs of one token in a sequence of ``seqlen`` tokens, elementwise.

        ``6 multiplied + 12 A d sum(min(seqlen, window))`` over the layers. Attention is counted as if it were not causal.
        """
        # A query of 4 d FLOPs (a product with a key, and one with a value) for each of A heads and min(s, w) tokens;
        # backward costs twice as much: 3 * 4 = 12. s - (s - w) * (s > w) is min(s, w) for numbers and for arrays.
        tokens: Any = 0
        for window, layers in self.windows.items():
            attended = seqlen if window is None else seqlen - (seqlen - window) * (seqlen > window)
            tokens = tokens + layers * attended
        return 6.0 * self.multiplied + 12.0 * self.attention_width * tokens


def count(config: Mapping[str, Any], vocab_rows: int) -> Counts | None:
    """Return the counts of a model with ``vocab_rows`` rows in its word embedding; None if its family isn't known."""
    family = FAMILIES.get(config["model_type"])
    if family is None:
        return None
    shape = _Shape(family, {**family.defaults, **config})
    total = active = 0
    for layer in range(shape["num_hidden_layers"]):
        stored, used = shape.mlp(layer)
        shared = shape.attention() + family.norms * shape.width
        total, active = total + shared + stored, active + shared + used
    embedding, final = vocab_rows * shape.width, family.final_norms * shape.width
    head = 0 if shape["tie_word_embeddings"] else embedding
    return Counts(
        parameters=total + final + embedding + head,
        multiplied=active + final + embedding,
        attention_width=shape.heads * shape.head_size,
        windows=Counter(shape.windows()),
        matrices=shape.matrices(),
    )


class _Shape:
    """The sizes of one model."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self.family, self.config = family, config
        self.width, self.heads = self["hidden_size"], self["num_attention_heads"]
        self.head_size = self["head_dim"] or self.width // self.heads
        self.kv_heads = self["num_key_value_heads"] or self.heads

    def __getitem__(self, key: str) -> Any:
        return self.config.get(key)

    def attention(self) -> int:
        """Return the parameters of the attention of a block."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        weights = 2 * self.width * (queries + keys)  # q and o, k and v
        biases = 0
        if self["attention_bias"] or self.family.qkv_bias or self["qkv_bias"]:
            biases = queries + 2 * keys
        if self["attention_bias"]:
            biases += self.width
        norms = {"": 0, "head": 2 * self.head_size, "width": queries + keys}[self.family.qk_norm]
        return int(weights + biases + norms)

    def matrices(self) -> int | None:
        """Return the parameters in matrices; None for experts, which are in tensors of three dimensions."""
        if self._experts():
            return None
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        products = 3 if self.family.is_gated else 2
        block = 2 * (queries + keys) + products * self["intermediate_size"]
        return int(self["num_hidden_layers"] * self.width * block)

    def _experts(self) -> int:
        experts = self["num_local_experts"] if self["num_local_experts"] is not None else self["num_experts"]
        return experts or 0

    def mlp(self, layer: int) -> tuple[int, int]:
        """Return the parameters of the MLP of a block, and those that a token uses."""
        width, inner = self.width, self["intermediate_size"]
        experts = self._experts()
        if not self.family.is_gated:
            dense = 2 * width * inner + inner + width
            return dense, dense
        if not experts or not self._is_sparse(layer):
            dense = 3 * width * inner + (2 * inner + width if self["mlp_bias"] else 0)
            return dense, dense
        expert = 3 * width * (self["moe_intermediate_size"] or inner)
        shared = experts * width  # the router
        if self["shared_expert_intermediate_size"]:
            shared += 3 * width * self["shared_expert_intermediate_size"] + width  # and its gate
        return shared + experts * expert, shared + min(self["num_experts_per_tok"], experts) * expert

    def _is_sparse(self, layer: int) -> bool:
        """Return whether a block of a mixture of experts has experts; blocks of Mixtral and OLMoE always have."""
        return layer not in (self["mlp_only_layers"] or ()) and (layer + 1) % (self["decoder_sparse_step"] or 1) == 0

    def windows(self) -> list[int | None]:
        """Return the attention window of each layer in tokens, None for full attention."""
        layers, window = self["num_hidden_layers"], self["sliding_window"]
        switch = "use_sliding_window" in self.family.keys
        if not window or (switch and not self["use_sliding_window"]):
            return [None] * layers
        if "layer_types" not in self.family.keys:
            return [window] * layers
        kinds = self["layer_types"]
        if kinds is not None:
            return [window if kind == "sliding_attention" else None for kind in kinds]
        full = self["max_window_layers"]
        if (
            self["model_type"] == "qwen2_moe"
        ):  # alternate layers of the first ones slide, where Qwen 2 and 3 use the last
            return [window if layer % 2 == 0 and layer < full else None for layer in range(layers)]
        return [window if layer >= full else None for layer in range(layers)]
