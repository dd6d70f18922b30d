"""How architectures are cut into pipeline stages and sharded over tensor-parallel ranks, and which are refused."""

import contextlib
import re

import pytest
import torch
from helpers.architectures import CONFIGS, ours, tokens
from helpers.settings import LINEAR
from transformers import AutoConfig, AutoModelForCausalLM

from seqlen_curriculum import CurriculumScheduler
from seqlen_curriculum.config.deepspeed import DeepSpeedKeys
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.attention import set_window
from seqlen_curriculum.models.causal_lm import AnyCausalLM
from seqlen_curriculum.models.causal_lm_stages import stages_of
from seqlen_curriculum.training.build import build_executor
from seqlen_curriculum.training.tensor_parallel import partition_specs

CUT = (
    "llama",
    "qwen2",
    "qwen2-sliding",
    "qwen3",
    "mistral",
    "olmo2",
    "olmo3",
    "neox",
    "gemma3",
    "cohere",
    "phi",
    "phi3",
)
NOT_CUT = {
    "bloom": "pipeline.stages: 2 doesn't work with a bloom",
    "opt": "pipeline.stages: 2 doesn't work with a opt",
    "mixtral": "pipeline.stages: 2 doesn't work with a mixtral, whose auxiliary loss needs the routers of all layers",
}
SHARDED = {
    "llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    "olmo2": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    "neox": {"query_key_value", "dense_h_to_4h"},
}
NOT_SHARDED = {
    "bloom": "a bloom, for which transformers has no plan",
    "phi3": r"a phi3, whose layers\.\*\.self_attn\.qkv_proj is colwise_gather_output",
    "mixtral": r"a mixtral, whose layers\.\*\.mlp\.experts\.gate_up_proj is packed_colwise",
}


def run(parts, model, inputs):
    hidden = model.lm.get_input_embeddings()(inputs)
    for part in parts:
        hidden = part(hidden)
    return hidden


@pytest.mark.parametrize("name", CUT)
def test_stages_together_are_the_model(name):
    model, (inputs, targets) = ours(name), tokens()
    parts, losses = stages_of(model, 2), set()
    for window in (None, 5):
        set_window(model, window, restart_positions=True)
        loss = model.head(run(parts, model, inputs), targets).item()
        assert loss == pytest.approx(model(inputs, targets).item(), rel=1e-6)
        losses.add(loss)
    assert len(losses) == 2
    assert all(sum(1 for _ in part.parameters()) < sum(1 for _ in model.parameters()) for part in parts)


def test_stages_have_equally_many_layers_or_one_more_at_the_front():
    kind, keys = CONFIGS["llama"]
    model = AnyCausalLM(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys | {"num_hidden_layers": 5})))
    own = [
        {int(re.search(r"layers\.(\d)", name)[1]) for name, _ in part.named_parameters() if "layers" in name}
        for part in stages_of(model, 3)
    ]
    assert own == [{0, 1}, {2, 3}, {4}]
    after = [[name for name, _ in part.named_parameters() if "layers" not in name] for part in stages_of(model, 3)]
    assert after == [[], [], ["backbone.norm.weight"]]


def test_a_model_keeps_its_mode_when_it_is_cut():
    model = ours("llama").train()
    assert all(part.training and part.backbone.training for part in stages_of(model, 2))
    assert model.training


@pytest.mark.parametrize("name", NOT_CUT)
def test_other_architectures_are_not_cut(name):
    with pytest.raises(ConfigError, match=NOT_CUT[name]):
        stages_of(ours(name), 2)


def test_what_a_stage_would_compute_twice_is_not_cut():
    model = ours("llama")
    forward = type(model.backbone).forward

    class Scaled(type(model.backbone)):
        def forward(self, *arguments, **keywords):
            outputs = forward(self, *arguments, **keywords)
            outputs.last_hidden_state *= 2
            return outputs

    model.backbone.__class__ = Scaled
    with pytest.raises(ConfigError, match="its stages together differ from the whole model"):
        stages_of(model, 2)


@pytest.mark.parametrize("name", SHARDED)
def test_transformers_plan_is_given_to_autotp(name):
    from deepspeed.module_inject.autotp_config import AutoTPConfig

    model = ours(name)
    config = AutoTPConfig.from_dict({"use_default_specs": False, "layer_specs": partition_specs(model, 2)})
    kinds = {}
    for weight, _ in model.named_parameters():
        spec = config.find_matching_spec(weight)
        kinds.setdefault(spec and spec.partition_type.value, set()).add(weight.split(".")[-2])
    assert kinds["column"] == SHARDED[name]
    rows = {"dense", "dense_4h_to_h"} if name == "neox" else {"o_proj", "down_proj"}
    assert kinds["row"] == rows
    assert kinds.get("skip", set()) == ({"q_norm", "k_norm"} if name == "qwen3" else set())
    assert {"embed_in", "embed_tokens"} & kinds[None]


@pytest.mark.parametrize("name", NOT_SHARDED)
def test_other_architectures_are_not_sharded(name):
    with pytest.raises(ConfigError, match=r"tensor_parallel\.autotp_size: 2 doesn't work with " + NOT_SHARDED[name]):
        partition_specs(ours(name), 2)


def test_a_parameter_between_sharded_layers_must_be_in_the_plan():
    model = ours("llama")
    model.blocks[0].self_attn.q_norm = torch.nn.LayerNorm(8)
    with pytest.raises(ConfigError, match=r"whose model\.layers\.0\.self_attn\.q_norm isn't in transformers' plan"):
        partition_specs(model, 2)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "llama",
            {"tensor_parallel": {"autotp_size": 4}},
            "autotp_size: 4 doesn't divide the 2 heads of num_key_value_h",
        ),
        (
            "llama",
            {"sequence_parallel_size": 4},
            "sequence_parallel_size: 4 doesn't divide the 2 heads of num_key_value_h",
        ),
        ("bloom", {"sequence_parallel_size": 2}, "sequence_parallel_size: 2 doesn't work with a bloom"),
        (
            "gemma2",
            {"tensor_parallel": {"autotp_size": 2}},
            "tensor_parallel.autotp_size: 2 doesn't work with a gemma2",
        ),
    ],
)
def test_what_the_built_model_shows_is_refused_before_deepspeed_starts(name, keys, message):
    with pytest.raises(ConfigError, match=message):
        build_executor(DeepSpeedKeys.model_validate(keys), keys, ours(name), CurriculumScheduler(LINEAR))


@pytest.mark.slow
@pytest.mark.parametrize("ask", [stages_of, partition_specs])
def test_every_architecture_is_divided_or_refused_by_a_message(ask):
    refused = []
    for name in CONFIGS:
        with contextlib.suppress(ConfigError):
            ask(ours(name), 2)
            continue
        refused.append(name)
    assert {"bloom", "opt", "mpt"} <= set(refused) < set(CONFIGS)
