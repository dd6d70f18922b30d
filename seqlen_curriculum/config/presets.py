"""Sizes and configurations of models by name."""

from __future__ import annotations

from typing import Any

from seqlen_curriculum.run_folder.model_folder import sizes_in

__all__ = ["ARCHITECTURE_PRESETS", "GPT2_PRESETS", "PRESETS"]


def _shape(
    num_layers: int, hidden_size: int, num_attention_heads: int, max_position_embeddings: int, vocab_size: int = 50257
) -> dict[str, int]:
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "max_position_embeddings": max_position_embeddings,
        "vocab_size": vocab_size,
    }


GPT2_PRESETS: dict[str, dict[str, int]] = {
    # For a CPU and for tests; heads of 16, 32 and 32.
    "tiny-200k": _shape(2, 64, 4, 1024, 512),  # 198,400 parameters, half of them embeddings
    "tiny-1m": _shape(2, 128, 4, 1024, 4096),  # 1,052,160
    "tiny-2m": _shape(4, 160, 5, 1024, 4096),  # 2,056,640
    # GPT-2 (Radford et al. 2019, table 2). The smallest was published as 117M; it has 124M.
    "gpt2-117m": _shape(12, 768, 12, 1024),  # the paper's first model
    "gpt2-345m": _shape(24, 1024, 16, 1024),
    "gpt2-774m": _shape(36, 1280, 20, 1024),
    "gpt2-1.5b": _shape(48, 1600, 25, 1024),  # the paper's second model
    # GPT-3 (Brown et al. 2020, table 2.1): twice the context.
    "gpt3-125m": _shape(12, 768, 12, 2048),  # the paper's third model
    "gpt3-1.3b": _shape(24, 2048, 16, 2048),  # 16 heads of 128; the GPT-3 paper's 24 don't divide 2048
}
"""Sizes by name. The parameter counts include the padding of the vocabulary."""

ARCHITECTURE_PRESETS: dict[str, dict[str, Any]] = {
    # stories15M of llama2.c: 15,191,712 parameters, of which the tied embedding is 61 %. For tests and CPUs.
    "llama-15m": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    # JackFram/llama-160m (SpecInfer, Miao et al. 2023): 162,417,408 parameters.
    "llama-160m": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    # meta-llama/Llama-3.2-1B: 1,235,814,400 parameters, four queries to a key.
    "llama-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": True,
    },
    # Qwen/Qwen3-0.6B: 596,049,920 parameters; 16 heads of 128 are twice as wide as the hidden size.
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": True,
    },
    # allenai/OLMo-2-0425-1B: 1,484,916,736 parameters.
    "olmo2-1b": {
        "model_type": "olmo2",
        "vocab_size": 100352,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "pad_token_id": 100277,
        "eos_token_id": 100257,
        "tie_word_embeddings": False,
    },
    # EleutherAI/pythia-160m (Biderman et al. 2023, table 1): 162,322,944 parameters; a quarter of each head rotates.
    "neox-160m": {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    },
    # mistralai/Mistral-7B-v0.1 (Jiang et al. 2023, table 1): 7,241,732,096 parameters; every layer sees 4,096 tokens.
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}
"""The ``config.json`` of other architectures by name, with the number of parameters of the published model."""

PRESETS: dict[str, dict[str, int]] = {
    **GPT2_PRESETS,
    **{name: sizes_in(config) for name, config in ARCHITECTURE_PRESETS.items()},
}
"""The five sizes of every preset."""
