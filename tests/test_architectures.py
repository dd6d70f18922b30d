"""Parameters and FLOPs of each family, counted without torch, against the models that transformers builds."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from seqlen_curriculum.config.architectures import COMMON_KEYS, FAMILIES, count
from seqlen_curriculum.config.hf_config import causal_types, config_problems
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.presets import ARCHITECTURE_PRESETS
from seqlen_curriculum.models.pretrained import quiet

TINY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"max_position_embeddings": 64}


def built(config):
    """The model on the meta device, which has shapes and no memory."""
    with quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))


def parameters(model):
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURE_PRESETS)
def test_presets_have_the_parameters_of_the_model(name):
    assert ModelConfig(preset=name).parameter_count() == parameters(built(ARCHITECTURE_PRESETS[name]))


@st.composite
def configs(draw, name):
    """A small configuration, in which each key that changes the weights may be there."""
    heads = draw(st.sampled_from([2, 4, 8]))
    config = {
        "model_type": name,
        "vocab_size": draw(st.integers(8, 300)),
        "hidden_size": heads * draw(st.sampled_from([4, 6, 8])),
        "intermediate_size": draw(st.integers(8, 64)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "max_position_embeddings": 64,
        "num_key_value_heads": draw(st.sampled_from([1, 2, heads, None])),
    }
    layers = st.lists(st.integers(0, 3), max_size=2)
    optional = {
        "head_dim": st.sampled_from([4, 8, 10]),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "qkv_bias": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "num_experts_per_tok": st.integers(1, 2),
        "moe_intermediate_size": st.integers(4, 40),
        "shared_expert_intermediate_size": st.integers(4, 40),
        "decoder_sparse_step": st.integers(1, 2),
        "mlp_only_layers": layers,
    }
    keys = FAMILIES[name].keys | COMMON_KEYS
    config |= {key: draw(value) for key, value in optional.items() if key in keys and draw(st.booleans())}
    config |= {key: draw(st.integers(2, 5)) for key in ("num_experts", "num_local_experts") if key in keys}
    if "num_experts" in config and "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]  # two names of one number
    if name in ("gemma", "mistral", "mixtral", "qwen2_moe", "qwen3_moe") and config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads  # transformers reads no null of theirs
    return {key: value for key, value in config.items() if key in keys}


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(max_examples=20)
@given(data=st.data())
def test_random_configurations_have_the_parameters_of_the_model(name, data):
    config = data.draw(configs(name))
    if problems := list(config_problems(config)):
        assert all("head_dim: " in problem or "num_key_value_heads" in problem for problem in problems), problems
        return
    model = built(config)
    counts = count(config, config["vocab_size"])
    assert counts.parameters == parameters(model)
    # Of each expert product, a token uses num_experts_per_tok of the experts.
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
    unused = sum(weight.numel() * max(0, 1 - routed(config) / len(weight)) for weight in experts)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    looked_up = 0 if tied else config["vocab_size"] * config["hidden_size"]
    assert counts.multiplied == pytest.approx(parameters(model) - unused - looked_up, abs=0.01)


def routed(config):
    return CONFIG_MAPPING[config["model_type"]](**config).num_experts_per_tok


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_keys_of_a_family_are_those_of_transformers(name):
    config = CONFIG_MAPPING[name]
    theirs = {field.name for field in dataclasses.fields(config)} | {*config.attribute_map}
    ours = FAMILIES[name].keys | COMMON_KEYS
    assert theirs <= ours
    # Keys that are read from older files or only if they are there.
    older = {"torch_dtype", "rope_theta", "rope_scaling", "head_dim", "rotary_pct", "rotary_emb_base", "model_type"}
    older |= {"partial_rotary_factor", "hidden_activation", "layer_types", "max_window_layers", "num_local_experts"}
    assert ours - theirs <= older


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_windows_are_the_models(name):
    """A layer's window, counted and as its attention has it."""
    config = {"model_type": name, **TINY, "num_hidden_layers": 5, "num_key_value_heads": 2, "num_experts": 2}
    config |= {"num_local_experts": 2, "sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}
    keys = FAMILIES[name].keys | COMMON_KEYS
    model = built({key: value for key, value in config.items() if key in keys})
    layers = model.base_model.layers
    attentions = [getattr(layer, "self_attn", None) or layer.attention for layer in layers]
    windows = [getattr(attention, "sliding_window", None) for attention in attentions]
    if name in ("mistral", "mixtral"):  # which hand the configuration's to every layer
        windows = [model.config.sliding_window] * 5
    counts = count({key: value for key, value in config.items() if key in keys}, 128)
    assert sorted(counts.windows.items(), key=str) == sorted(
        {window: windows.count(window) for window in windows}.items(), key=str
    )


def test_flops_of_llama_by_hand():
    config = {"model_type": "llama", **TINY, "num_key_value_heads": 2, "tie_word_embeddings": True}
    # A block: q and o 2*32*32, k and v 2*32*16, MLP 3*32*48, two norms; one embedding, one norm.
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 128 * 32 + 32
    assert count(config, 128).parameters == weights
    assert count(config, 128).flops_per_token(10) == 6 * weights + 12 * 32 * 2 * 10
    untied = count({**config, "tie_word_embeddings": False}, 128)
    assert untied.parameters == weights + 128 * 32
    assert untied.flops_per_token(10) == 6 * weights + 12 * 32 * 2 * 10  # the embedding is looked up


def test_a_window_limits_the_flops_of_attention():
    config = {"model_type": "mistral", **TINY, "num_key_value_heads": 2, "sliding_window": 16}
    counts = count(config, 128)
    attention = [counts.flops_per_token(seqlen) - 6 * counts.multiplied for seqlen in (1, 8, 16, 17, 64)]
    assert attention == [12 * 32 * 2 * tokens for tokens in (1, 8, 16, 16, 16)]
    np.testing.assert_array_equal(
        counts.flops_per_token(np.array([1, 8, 16, 17, 64])) - 6 * counts.multiplied, attention
    )
    full = count({**config, "sliding_window": None}, 128)
    assert full.flops_per_token(64) == 6 * full.multiplied + 12 * 32 * 2 * 64


def test_heads_may_be_wider_than_the_hidden_size():
    config = {"model_type": "qwen3", **TINY, "num_key_value_heads": 2, "head_dim": 16}
    counts = count(config, 128)
    assert counts.flops_per_token(10) - counts.flops_per_token(0) == 12 * (4 * 16) * 2 * 10


def test_a_token_uses_some_experts():
    config = {
        "model_type": "mixtral",
        **TINY,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    counts = count(config, 128)
    unused_experts, expert = 2 * (8 - 2), 3 * 32 * 48
    assert counts.parameters - counts.multiplied == unused_experts * expert + 128 * 32


def test_the_architectures_of_transformers_are_read_from_its_source():
    assert causal_types() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert causal_types() >= set(FAMILIES)
