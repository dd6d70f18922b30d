"""Tiny encoders: their configurations, and folders of them with or without real weights."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

V = 512
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": V}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 64}
END, MASK = 256, 511
"""Ids of the end of documents in the tests' corpus of bytes, and of a token that it doesn't use."""


def write_description(folder, architecture="BertForMaskedLM", model_type="bert", **more):
    """Write what planning reads: a ``config.json``, and weights of one number."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [architecture], "model_type": model_type, "eos_token_id": END, **SIZES, **more}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder


def write_tokenizer(path, mask="[MASK]", special=("<end>",)):
    """Write the tokenizer of single letters whose first ids are ``special``; ``mask`` follows them unless it is None."""
    names = [*special, *([mask] if mask else [])]
    vocabulary = {name: number for number, name in enumerate([*names, *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.add_special_tokens(names)
    tokenizer.save(str(path))


def configs():
    """Return the configurations of tiny encoders with different heads, by name."""
    from transformers import (
        BertConfig,
        DistilBertConfig,
        ElectraConfig,
        MobileBertConfig,
        ModernBertConfig,
        RobertaConfig,
    )

    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return {
        "bert": BertConfig(**SIZES, **quiet),
        "roberta": RobertaConfig(**{**SIZES, "max_position_embeddings": 66}, **quiet),
        "modernbert": ModernBertConfig(**SIZES, **tokens, local_attention=8, global_attn_every_n_layers=2),
        "electra": ElectraConfig(**SIZES, **quiet, embedding_size=16),
        "distilbert": DistilBertConfig(
            dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=V, max_position_embeddings=64, dropout=0.0
        ),
        "mobilebert": MobileBertConfig(
            **{**SIZES, "num_hidden_layers": 1}, embedding_size=16, intra_bottleneck_size=16
        ),
    }


def write_encoder(folder, name="bert"):
    """Save a tiny random encoder with transformers."""
    import torch
    from transformers import AutoModelForMaskedLM

    from seqlen_curriculum.models.pretrained import quiet

    torch.manual_seed(0)
    with quiet():
        model = AutoModelForMaskedLM.from_config(configs()[name])
        # Fresh biases are 0, which would hide one that is left out.
        for weight in model.parameters():
            if weight.dim() == 1:
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(folder)
    return folder
