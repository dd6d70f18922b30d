"""Small models and checkpoints on disk."""

import json

import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from seqlen_curriculum.config.presets import ARCHITECTURE_PRESETS
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.models.pretrained import quiet
from seqlen_curriculum.models.pretrained_tokenizer import save_tokenizer

SIZES = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16, "vocab_size": 257}
ALIKE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 257}
ALIKE |= {"intermediate_size": 48, "max_position_embeddings": 32}
CONFIGS = {
    "llama": LlamaConfig(**ALIKE),
    "neox": GPTNeoXConfig(**ALIKE),
    "qwen2": Qwen2Config(num_key_value_heads=1, tie_word_embeddings=True, **ALIKE),
    "bloom": BloomConfig(n_layer=2, n_head=2, hidden_size=32, vocab_size=257),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=257, activation_function="relu"),
    "narrow_gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=257, n_inner=48),
}

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 64, "vocab_size": 257}
SHAPES = {
    name: {key: value for key, value in {**config, **SMALL}.items() if not key.endswith("_token_id")}
    | ({"num_key_value_heads": 2} if "num_key_value_heads" in config else {})
    | ({"head_dim": 16} if "head_dim" in config else {})
    for name, config in ARCHITECTURE_PRESETS.items()
}
"""Each preset's shape, with fewer and smaller blocks."""


def complete(folder, step=1, vocab_size=257, rollbacks=()):
    """Make ``folder`` a complete checkpoint with its current files."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "complete.json"}
    manifest = {"step": step, "data_ranks": 1, "zero_stage": 0, "zero": {}, "rollbacks": list(rollbacks)}
    manifest |= {"run": {"model.vocab_size": vocab_size}, "files": sizes}
    (folder / "complete.json").write_text(json.dumps(manifest))
    return folder


def save(model, folder):
    with quiet():
        model.save_pretrained(folder)
    return folder


def make_models(root):
    """Save a tiny random model of each kind with transformers."""
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        save(AutoModelForCausalLM.from_config(config), root / name)
    save_tokenizer(build_tokenizer(TokenizerChoice(train_vocab=257), []), root / "llama")
    return root
