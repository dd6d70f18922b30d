"""Parameters and FLOPs of encoders with a head for masked tokens, from their ``config.json``. Needs no torch.

Shapes: ``H`` hidden size, ``I`` inner size of the MLP, ``V`` rows of the word embedding, ``P`` positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from seqlen_curriculum.config.architectures import REQUIRED, Counts

__all__ = ["count_encoder"]


def count_encoder(config: Mapping[str, Any], vocab_rows: int) -> Counts | None:
    """Return the counts of BERT, RoBERTa and its relatives, or ModernBERT with V ``vocab_rows``; None for another encoder.

    The FLOPs count the head for every token.
    """
    counted = _COUNTED.get(config["model_type"])
    config = {**_DEFAULTS, **config}
    sizes = [config.get(key) for key in (*REQUIRED, "max_position_embeddings", *_DEFAULTS)]
    kinds = config.get("layer_types")
    if (
        counted is None
        or not all(type(size) is int and size > 0 for size in sizes)
        or not isinstance(kinds, list | None)
    ):
        return None  # the training says what is wrong with them
    looked_up, multiplied, windows = counted(config)
    width = config["hidden_size"]
    words = vocab_rows * width
    untied = 0 if config.get("tie_word_embeddings", True) else words
    return Counts(
        parameters=looked_up + multiplied + vocab_rows + words + untied,  # V biases of the head
        multiplied=multiplied + vocab_rows + words,
        attention_width=width,
        windows=Counter(windows),
    )


_DEFAULTS = {"type_vocab_size": 2, "global_attn_every_n_layers": 3, "local_attention": 128}
"""Values of keys that a configuration may leave out."""
_Parts = tuple[int, int, list[int | None]]
"""Weights that are looked up, weights of products without the word embedding, and the window of each layer."""


def _bert(config: Mapping[str, Any]) -> _Parts:
    width, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    # Query, key, value and output 4H^2 + 4H, two layer norms 4H, MLP 2HI + I + H. With H = 768 and I = 3072 that is
    # 7,087,872; BERT base has 12 of them, and 109,514,298 parameters.
    block = 4 * width**2 + 9 * width + 2 * width * inner + inner
    looked_up = (config["max_position_embeddings"] + config["type_vocab_size"]) * width
    # The layer norm of the embeddings, and the head's dense layer H^2 + H with its layer norm.
    return looked_up, layers * block + 2 * width + width**2 + 3 * width, [None] * layers


def _modernbert(config: Mapping[str, Any]) -> _Parts:
    width, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    # Query, key, value and output 4H^2, gated MLP 3HI.
    block = 4 * width**2 + 3 * width * inner
    block += 4 * width if config.get("attention_bias") else 0
    block += 2 * inner + width if config.get("mlp_bias") else 0
    # Two norms per block, but one in the first, that of the embeddings, the last one and that of the head.
    norms = (2 * layers + 2) * width * (2 if config.get("norm_bias") else 1)
    head = width**2 + (width if config.get("classifier_bias") else 0)
    kinds = config.get("layer_types")
    every, window = config["global_attn_every_n_layers"], config["local_attention"]
    if kinds is None:
        kinds = ["sliding_attention" if layer % every else "full_attention" for layer in range(layers)]
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    return 0, layers * block + norms + head, windows


_COUNTED = {
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
    "camembert": _bert,
    "modernbert": _modernbert,
}
