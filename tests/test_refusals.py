"""What only DeepSpeed can refuse is one line, with its cause; other errors pass unchanged."""

import deepspeed
import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.muon import muon_optimizer, original_muon
from torch import nn

from seqlen_curriculum import ConfigError
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.models.gpt2 import build_gpt2
from seqlen_curriculum.training.muon import embeddings_by_adam, run_uncompiled
from seqlen_curriculum.training.refusals import initialize_deepspeed


def out_of_memory(**_):
    raise RuntimeError("can't allocate memory")


def read_only(config):
    return (DeepSpeedConfig(config),)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"elasticity": {}}, "DeepSpeedConfigError: Elastic training has been removed"),
        ({"train_batch_size": 1, "communication_data_type": "fp8"}, "ValueError: Invalid communication_data_type"),
        (
            {"train_batch_size": 1, "zero_optimization": {"stage": 4}},
            "zero_optimization.stage: 4 is not valid in DeepSpeed",
        ),
        ({"train_batch_size": 1, "fp16": {"enabled": "x"}}, "fp16.enabled: 'x' is not valid in DeepSpeed"),
        (
            {"train_batch_size": 1, "checkpoint": {"tag_validation": "x"}},
            "DeepSpeedConfigError: Checkpoint config contains",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else list(value)[-1],
)
def test_a_refusal_of_deepspeeds_is_one_line(monkeypatch, config, cause):
    monkeypatch.setattr(deepspeed, "initialize", read_only)
    with pytest.raises(ConfigError) as caught:
        initialize_deepspeed(config=config)
    (problem,) = caught.value.problems
    assert cause in problem
    assert "\n" not in problem


def test_other_errors_pass_unchanged(monkeypatch):
    monkeypatch.setattr(deepspeed, "initialize", out_of_memory)
    with pytest.raises(RuntimeError, match="allocate"):
        initialize_deepspeed(config={})
    assert deepspeed.set_optimizer_flags.__module__ == "deepspeed"


class OwnModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.block, self.out = nn.Embedding(96, 8), nn.Linear(8, 8), nn.Linear(8, 96, bias=False)


class NamesItsHead(OwnModel):
    """A model whose head isn't the last layer with as many outputs as there are words."""

    def __init__(self):
        super().__init__()
        self.head, self.more = nn.Linear(8, 90, bias=False), nn.Linear(8, 96)

    def get_output_embeddings(self):
        return self.head


def gpt2():
    return build_gpt2(ModelConfig.model_validate({"preset": "tiny-200k"}))


MODELS = {
    "GPT-2": (gpt2, {"lm.transformer.wte", "lm.transformer.wpe"}),
    "get_output_embeddings": (NamesItsHead, {"words", "head"}),
    "a model of the user's own": (OwnModel, {"words", "out"}),
}


@pytest.mark.parametrize(("build", "left_out"), MODELS.values(), ids=MODELS)
def test_muon_trains_no_embedding_and_no_head(build, left_out):
    model = build()
    config = DeepSpeedConfig({"train_batch_size": 1, "optimizer": {"type": "Muon", "params": {"lr": 1e-3}}})
    with embeddings_by_adam():
        deepspeed.set_optimizer_flags(config, model)
    muon, adam = DeepSpeedEngine._muon_param_groups(list(model.parameters()), {"lr": 1e-3})
    assert (muon["use_muon"], adam["use_muon"]) == (True, False)
    of_muon = {id(weight) for weight in muon["params"]}
    matrices = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}
    by_adam = {name.removesuffix(".weight") for name, weight in matrices.items() if id(weight) not in of_muon}
    assert by_adam == left_out
    assert of_muon


def test_muon_runs_uncompiled():
    run_uncompiled()
    momentum, gradient = torch.zeros(6, 4), torch.arange(24.0).reshape(6, 4).cos()
    for module in (original_muon, muon_optimizer):
        assert not any(hasattr(function, "_torchdynamo_orig_callable") for function in vars(module).values())
    update = muon_optimizer.muon_update(gradient.clone(), momentum, ns_method="standard")
    torch.testing.assert_close(momentum, 0.05 * gradient)
    # An orthogonal matrix times sqrt(6 / 4); Newton-Schulz leaves its singular values between 0.6 and 1.3.
    values = torch.linalg.svdvals(update) / (6 / 4) ** 0.5
    assert values.min() > 0.6
    assert values.max() < 1.3
