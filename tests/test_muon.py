"""Which parameters Muon trains, in the plan and in the model, and what is measured under optimizers without a variance."""

from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.muon import muon_optimizer, original_muon
from helpers.models import ALIKE, CONFIGS, save
from helpers.wrong_files import changed
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from seqlen_curriculum import RunConfig
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.muon import planned_groups
from seqlen_curriculum.models.causal_lm import build_model
from seqlen_curriculum.models.gpt2 import build_gpt2
from seqlen_curriculum.planning.summary import describe, plan
from seqlen_curriculum.training import adam_moments, refusals
from seqlen_curriculum.training.muon import embeddings_by_adam, run_uncompiled

MUON = {"train_batch_size": 1, "optimizer": {"type": "Muon", "params": {"lr": 1e-3}}}


def divided(model):
    """DeepSpeed's groups of a model, as its initialize makes them."""
    with embeddings_by_adam() as groups:
        deepspeed.set_optimizer_flags(DeepSpeedConfig(MUON), model)
    return groups


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
    divided(model)
    muon, adam = DeepSpeedEngine._muon_param_groups(list(model.parameters()), {"lr": 1e-3})
    assert (muon["use_muon"], adam["use_muon"]) == (True, False)
    of_muon = {id(weight) for weight in muon["params"]}
    matrices = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}
    by_adam = {name.removesuffix(".weight") for name, weight in matrices.items() if id(weight) not in of_muon}
    assert by_adam == left_out
    assert of_muon


FOLDERS = {
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "narrow_gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "qwen2": {"model.embed_tokens.weight"},  # tied
    "neox": {
        "gpt_neox.embed_in.weight",
        "embed_out.weight",
    },  # the head's name in files; transformers 5 calls it lm_head
    "bloom": {"transformer.word_embeddings.weight"},
    "opt": {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
}
OPT = OPTConfig(ffn_dim=48, **{key: ALIKE[key] for key in ALIKE if key != "intermediate_size"})


@pytest.mark.parametrize("name", FOLDERS)
def test_the_plan_has_the_groups_of_the_built_model(name, tmp_path):
    folder = save(AutoModelForCausalLM.from_config({**CONFIGS, "opt": OPT}[name]), tmp_path / name)
    more = {"max_position_embeddings": 32} if name == "bloom" else {}
    config = ModelConfig.model_validate({"hf_checkpoint": str(folder), **more})
    model, planned = build_model(config), planned_groups(config)
    (built,) = divided(model)
    assert set(planned.left_out) == FOLDERS[name]
    names = {"lm_head.weight": "embed_out.weight"} if name == "neox" else {}
    assert {names.get(one, one) for one in built.left_out} == FOLDERS[name]
    assert (built.muon, built.adam) == (planned.muon, planned.adam)
    assert built.muon > 0
    assert built.muon + built.adam == sum(weight.numel() for weight in model.parameters())


def test_a_preset_is_planned_as_it_is_built():
    config = ModelConfig.model_validate({"preset": "tiny-200k"})
    assert divided(build_gpt2(config))[0].muon == planned_groups(config).muon == 2 * 12 * 64**2


@pytest.mark.parametrize("name", ["llama", "qwen2", "neox"])
def test_a_new_model_is_planned_as_it_is_built(name):
    config = ModelConfig.model_validate({"hf_config": CONFIGS[name].to_diff_dict()})
    (built,), planned = divided(build_model(config)), planned_groups(config)
    assert (built.muon, built.adam) == (planned.muon, planned.adam)
    assert len(built.left_out) == len(planned.left_out)


def test_the_plan_names_the_groups():
    summary = plan(RunConfig.from_dict(changed(optimizer__type="Muon")))
    assert summary["muon"]["muon"] + summary["muon"]["adam"] == summary["parameters"]
    assert "optimizer         98,304 parameters by Muon, " in describe(summary)
    assert "transformer.wte.weight, transformer.wpe.weight" in describe(summary)
    assert "muon" not in plan(RunConfig.from_dict(changed()))


def test_no_groups_are_reported_for_other_optimizers():
    with embeddings_by_adam() as groups:
        deepspeed.set_optimizer_flags(DeepSpeedConfig({**MUON, "optimizer": {"type": "Adam", "params": {}}}), gpt2())
    assert groups == []


def test_the_start_of_a_run_logs_the_groups_once(monkeypatch):
    lines, model = [], gpt2()

    def initialize(config, model):
        deepspeed.set_optimizer_flags(DeepSpeedConfig(config), model)
        return (model,)

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    monkeypatch.setattr(refusals, "log_rank0", lines.append)
    refusals.initialize_deepspeed(config=MUON, model=model)
    assert lines == [
        "optimizer: 98,304 parameters by Muon, 100,096 by Adam (transformer.wte.weight, transformer.wpe.weight; vectors)"
    ]


@pytest.fixture
def logged(monkeypatch):
    """The lines of the log; one process is all ranks."""
    lines = []
    alone = SimpleNamespace(get_world_size=lambda: 1, all_gather=lambda parts, own: parts[0].copy_(own))
    monkeypatch.setattr(adam_moments, "dist", alone)
    monkeypatch.setattr(adam_moments, "log_rank0", lines.append)
    return lines


def meter(model, optimizer, steps=1, **more):
    """What measures the moments of ``optimizer`` after a step of ``model``."""
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    engine = SimpleNamespace(
        module=model,
        basic_optimizer=optimizer,
        optimizer=None,
        device=torch.device("cpu"),
        global_steps=steps,
        skipped_steps=0,
        optimizer_name=lambda: type(optimizer).__name__.lower(),
        zero_optimization=lambda: False,
        zero_optimization_stage=lambda: 0,
        fp16_enabled=lambda: False,
    )
    vars(engine).update(more)
    executor = SimpleNamespace(engine=engine, replica=0, unique_parameters=list)
    return adam_moments.MomentsMeter(executor)


@pytest.mark.parametrize("kind", ["Adagrad", "SGD", "RMSprop"])
def test_an_optimizer_without_variance_is_reported_once(logged, kind):
    model = nn.Linear(3, 2)
    measures = meter(model, getattr(torch.optim, kind)(model.parameters(), lr=0.1))
    assert measures.measure() == measures.measure() == {}
    assert logged == [
        f"optimizer.type {kind.lower()}: keeps no variance of the gradients, so the run log has no variance_norm and "
        "momentum_norm"
    ]


def test_adam_needs_no_report(logged):
    model = nn.Linear(3, 2)
    assert meter(model, torch.optim.AdamW(model.parameters())).measure().keys() >= {"variance_norm", "momentum_max"}
    assert logged == []


def test_nothing_is_reported_before_a_step_was_applied(logged):
    model = nn.Linear(3, 2)
    assert meter(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=4, skipped_steps=4).measure() == {}
    assert logged == []


def test_a_state_that_cannot_be_read_is_no_missing_one(logged):
    model = nn.Linear(3, 2)
    assert meter(model, torch.optim.AdamW(model.parameters()), fp16_enabled=lambda: True).measure() == {}
    (line,) = logged
    assert "adamw: the variance can't be measured here (fp16 at ZeRO stage 0" in line


def test_under_muon_the_moments_of_its_adam_group_are_measured(logged):
    model = OwnModel()
    divided(model)
    adam = [weight for weight in model.parameters() if not weight.use_muon]
    alone = torch.optim.AdamW(adam)
    measured = meter(model, alone)
    expected = measured.measure()
    assert expected["variance_norm"] == pytest.approx(sum(w.numel() for w in adam) * 0.001**0.5, rel=1e-5)
    assert len(logged) == 1
    assert "those of the parameters that Adam trains; Muon keeps no variance" in logged[0]
    for weight in model.parameters():
        if weight.use_muon:
            alone.state[weight] = {"momentum_buffer": torch.ones_like(weight)}
    assert measured.measure() == expected


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
