"""The model section: presets, what it refuses, parameter and FLOP counts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from helpers.wrong_files import SIZES, WRONG_MODELS
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from seqlen_curriculum.config.model import PRESETS, ModelConfig
from seqlen_curriculum.fields import describe_errors


def model(**keys: Any) -> ModelConfig:
    return ModelConfig.model_validate(keys)


def refusals(keys: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(keys)
    return describe_errors(caught.value, ModelConfig, "model")


def test_preset_fills_every_size() -> None:
    config = model(preset="gpt2-117m")
    assert config.model_dump() == {
        "preset": "gpt2-117m",
        "hf_checkpoint": None,
        "hf_config": None,
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "max_position_embeddings": 1024,
        "vocab_size": 50257,
        "dropout": 0.0,
        "rope": None,
        "activation_checkpointing": False,
    }


def test_written_keys_override_the_preset() -> None:
    config = model(preset="gpt2-117m", max_position_embeddings=2048, dropout=0.1)
    assert (config.max_position_embeddings, config.dropout, config.num_layers) == (2048, 0.1, 12)
    assert PRESETS["gpt2-117m"]["max_position_embeddings"] == 1024


def test_sizes_without_a_preset() -> None:
    assert model(**SIZES) == model(preset=None, **SIZES)


@pytest.mark.parametrize("missing", sorted(SIZES))
def test_every_size_is_required_without_a_preset(missing: str) -> None:
    assert refusals({key: value for key, value in SIZES.items() if key != missing}) == [
        f"model.{missing}: required, but not given"
    ]


@pytest.mark.parametrize(("keys", "message"), WRONG_MODELS)
def test_refusals_name_key_value_and_fix(keys: dict[str, Any], message: str) -> None:
    assert any(line.startswith(message) for line in refusals(keys))


@pytest.mark.parametrize(
    ("vocab_size", "padded"), [(1, 128), (127, 128), (128, 128), (129, 256), (4096, 4096), (50257, 50304)]
)
def test_vocabulary_is_padded_to_a_multiple_of_128(vocab_size: int, padded: int) -> None:
    assert model(**SIZES | {"vocab_size": vocab_size}).padded_vocab_size == padded


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("tiny-200k", 0.2),
        ("tiny-1m", 1.05),
        ("tiny-2m", 2.06),
        ("gpt2-117m", 124.5),  # the published weights have 124.4 million; the padding adds 47 rows of 768
        ("gpt2-345m", 354.9),
        ("gpt2-774m", 774.1),
        ("gpt2-1.5b", 1557.7),
        ("gpt3-125m", 125.3),
        ("gpt3-1.3b", 1315.8),
        ("llama-15m", 15.19),
        ("llama-160m", 162.42),
        ("llama-1b", 1235.8),
        ("qwen3-0.6b", 596.05),
        ("olmo2-1b", 1484.9),
        ("neox-160m", 162.3),
        ("mistral-7b", 7241.7),
    ],
)
def test_presets_have_the_size_of_their_name(preset: str, millions: float) -> None:
    assert model(preset=preset).parameter_count() / 1e6 == pytest.approx(millions, abs=0.06)


def test_all_presets_are_listed_above() -> None:
    assert len(PRESETS) == 16


def test_parameter_count_of_gpt2_by_hand() -> None:
    # words 50304*768, positions 1024*768, 12 blocks of 12*768^2 + 13*768, last layer norm 2*768
    by_hand = 38_633_472 + 786_432 + 12 * 7_087_872 + 1_536
    assert model(preset="gpt2-117m").parameter_count() == by_hand == 124_475_904


def test_flops_per_token_of_gpt2_by_hand() -> None:
    config = model(preset="gpt2-117m")
    without_positions = 6 * (124_475_904 - 786_432)
    assert config.flops_per_token(0) == without_positions
    assert config.flops_per_token(1024) == without_positions + 12 * 12 * 768 * 1024 == 855_383_040.0


def test_flops_agree_with_megatron_to_within_biases() -> None:
    # Megatron: 72 L h^2 (1 + s/6h + V/12hL) a token
    c, seqlen = model(preset="gpt2-1.5b"), 1024
    layers, width, vocab = c.num_layers, c.hidden_size, c.padded_vocab_size
    megatron = 72 * layers * width**2 * (1 + seqlen / (6 * width) + vocab / (12 * width * layers))
    assert c.flops_per_token(seqlen) == pytest.approx(megatron, rel=1e-3)


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=20))
def test_flops_take_an_array_elementwise(seqlens: list[int]) -> None:
    config = model(preset="tiny-1m")
    expected = [config.flops_per_token(seqlen) for seqlen in seqlens]
    np.testing.assert_array_equal(config.flops_per_token(np.array(seqlens)), expected)


def test_architecture_needs_no_torch() -> None:
    script = (
        "import sys; from seqlen_curriculum.config.model import ModelConfig as M; M(preset='llama-1b').flops_per_token(8);"
        "M(hf_config={'model_type': 'bloom', 'n_layer': 2, 'n_head': 2, 'hidden_size': 32, 'vocab_size': 257},"
        "max_position_embeddings=32); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
