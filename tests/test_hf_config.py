"""New models from a configuration alone: what is read and refused, what is built and saved."""

import copy
import json
import math
import shutil

import pytest
import torch
from helpers.models import SHAPES, SMALL, complete, make_models
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from seqlen_curriculum import ConfigError, DataError, RunConfig
from seqlen_curriculum.config.hf_config import TOKENS
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.presets import ARCHITECTURE_PRESETS
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.export.huggingface import export
from seqlen_curriculum.fields import describe_errors
from seqlen_curriculum.models.causal_lm import AnyCausalLM, build_model, save_model
from seqlen_curriculum.models.gpt2 import CausalLM
from seqlen_curriculum.models.pretrained import add_older_names, load_model, quiet
from seqlen_curriculum.planning import ranks, summary
from seqlen_curriculum.tuning.cost import cost_of

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 257}
LLAMA = {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "pad_token_id": 3}


def changed(base=LLAMA, **changes):
    """``base`` with keys changed, or removed by ``...``."""
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def refusal(**section):
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(section)
    (line,) = describe_errors(caught.value, ModelConfig, "model")
    return line


def test_a_configuration_gives_the_sizes():
    config = ModelConfig(hf_config=LLAMA)
    sizes = (config.num_layers, config.hidden_size, config.num_attention_heads, config.max_position_embeddings)
    assert (*sizes, config.vocab_size, config.padded_vocab_size) == (2, 32, 4, 64, 257, 384)
    assert (config.model_type, config.source, config.is_gpt2) == ("llama", "model.hf_config", False)
    assert ModelConfig(hf_config=LLAMA, num_layers=2) == config
    assert refusal(hf_config=LLAMA, num_layers=3).startswith("model: num_layers: 3 differs from 2 in hf_config; remove")


@pytest.mark.parametrize("name", SHAPES)
def test_fresh_weights_are_the_architectures_own(name):
    config = ModelConfig(hf_config=SHAPES[name])
    torch.manual_seed(5)
    model = build_model(config)
    assert isinstance(model, AnyCausalLM)
    assert config.parameter_count() == sum(weight.numel() for weight in model.parameters())
    torch.manual_seed(5)
    with quiet():
        tokens = dict.fromkeys(TOKENS)  # a padding token would have an embedding of zeros
        own = AutoConfig.for_model(**{**copy.deepcopy(SHAPES[name]), **tokens, "vocab_size": 384})
        expected = AutoModelForCausalLM.from_config(own).state_dict()
    found = model.lm.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[key].equal(value) for key, value in expected.items())


def test_weights_are_drawn_in_fp32_and_every_token_is_trained():
    torch.manual_seed(5)
    plain = build_model(ModelConfig(hf_config=LLAMA))
    torch.manual_seed(5)
    model = build_model(ModelConfig(hf_config={**LLAMA, "torch_dtype": "bfloat16"}))
    assert all(one.equal(other) for one, other in zip(plain.parameters(), model.parameters(), strict=True))
    tokens = torch.tensor([[1, 3, 2]])  # 3 is the padding token
    model(tokens, tokens).backward()
    gradient = model.lm.get_input_embeddings().weight.grad
    assert gradient[3].abs().sum() > 0


def test_a_gpt2_is_ours():
    given = {**GPT2, "n_inner": 48, "activation_function": "relu"}
    config = ModelConfig(hf_config=given, dropout=0.1)
    model = build_model(config)
    assert isinstance(model, CausalLM)
    assert config.parameter_count() == sum(weight.numel() for weight in model.parameters())
    own = model.lm.config
    assert (own.n_inner, own.activation_function, own.resid_pdrop, own.vocab_size) == (48, "relu", 0.1, 384)
    untied = ModelConfig(hf_config={**given, "tie_word_embeddings": False})
    assert not untied.is_gpt2


def test_it_is_read_from_a_file_a_folder_a_checkpoint_and_the_hub(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    expected = ModelConfig(hf_config=LLAMA)
    assert ModelConfig(hf_config=str(path)) == expected
    assert ModelConfig(hf_config=str(tmp_path)) == expected
    folders = make_models(tmp_path / "models")
    checkpoint = complete(shutil.copytree(folders / "llama", tmp_path / "global_step1"), vocab_size=200)
    assert ModelConfig(hf_config=str(checkpoint)).vocab_size == 200  # without its padding
    huggingface_hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "hub" / "models--org--llama" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(path, snapshot)
    (tmp_path / "hub" / "models--org--llama" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--llama" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert ModelConfig(hf_config="org/llama") == expected


def test_a_relative_path_may_start_at_the_file_and_is_recorded_as_the_object(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    given = {**LLAMA, "sliding_window": None, "max_sequence_length": 64}
    (tmp_path / "files" / "config.json").write_text(json.dumps(given))
    run = {**tiny_run, "model": {"hf_config": "config.json"}}
    (tmp_path / "files" / "run.json").write_text(json.dumps(run))
    monkeypatch.chdir(tmp_path)
    config = RunConfig.load("files/run.json")
    recorded = config.as_file()
    assert recorded["model"]["hf_config"] == given  # with its null
    again = RunConfig.from_dict(json.loads(json.dumps(recorded)))
    assert again.settings() == config.settings()
    (warning,) = config.warnings()
    assert warning == "model.hf_config: max_sequence_length: no keys of llama; they are ignored"
    with pytest.raises(ConfigError, match=r"model\.hf_config: no folder 'other\.json', neither in"):
        RunConfig.load("files/run.json", ["model.hf_config=other.json"])


def test_the_runs_identity_is_in_the_configuration(tiny_run):
    def settings(model):
        return RunConfig.from_dict({**tiny_run, "model": model}).settings()

    config = settings({"hf_config": LLAMA})
    assert config["model.hf_config.num_key_value_heads"] == 2
    assert settings({"hf_config": {**LLAMA, "transformers_version": "4.57.0", "torch_dtype": "float16"}}) == config
    other = settings({"hf_config": {**LLAMA, "rms_norm_eps": 1e-5}})
    assert [key for key in other if other[key] != config.get(key)] == ["model.hf_config.rms_norm_eps"]
    mistral = {**LLAMA, "model_type": "mistral"}
    whole = settings({"hf_config": {**mistral, "sliding_window": None}})
    assert whole["model.hf_config.sliding_window"] != settings({"hf_config": mistral}).get(
        "model.hf_config.sliding_window"
    )
    preset = {"preset": "llama-15m", "vocab_size": 257}
    assert settings(preset) == settings({"hf_config": {**ARCHITECTURE_PRESETS["llama-15m"], "vocab_size": 257}})
    recorded = RunConfig.from_dict({**tiny_run, "model": preset}).as_file()
    assert RunConfig.from_dict(recorded).settings() == settings(preset)


def test_sizes_override_a_preset():
    config = ModelConfig(preset="olmo2-1b", num_layers=1, hidden_size=64, vocab_size=300, max_position_embeddings=32)
    assert (config.architecture["num_hidden_layers"], config.architecture["hidden_size"]) == (1, 64)
    assert (config.vocab_size, config.padded_vocab_size) == (300, 384)
    assert "pad_token_id" not in config.architecture  # 100277 is no token any more
    model = build_model(config)
    assert config.parameter_count() == sum(weight.numel() for weight in model.parameters())
    line = refusal(preset="llama-1b", num_attention_heads=4)
    assert "num_key_value_heads: 8 doesn't divide num_attention_heads 4" in line
    assert refusal(preset="llama-15m", hf_config=LLAMA).startswith("model: hf_config and preset each give an arch")
    assert refusal(hf_checkpoint="x", hf_config=LLAMA).startswith("model: hf_config and hf_checkpoint each give")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "hf_config: model_type: None is not the name of an architecture"),
        (
            changed(model_type="lama"),
            "model_type: 'lama' has no causal language model in the installed transformers; did",
        ),
        (changed(model_type="vit"), "model_type: 'vit' has no causal language model"),
        (changed(model_type="mine", auto_map={"AutoConfig": "a.B"}), "auto_map: {'AutoConfig': 'a.B'} is Python code"),
        (changed(architectures=["LlamaForSequenceClassification"]), "architectures: 'LlamaForSequenceClassification'"),
        (changed(is_encoder_decoder=True), "is_encoder_decoder: true is not a causal language model"),
        (
            changed(num_key_value_heads=..., num_key_value_head=2),
            "num_key_value_head: unknown key of llama; did you mean 'num_key_value_heads'?",
        ),
        (changed(n_embd=32, hidden_size=...), "n_embd: unknown key of llama; did you mean 'hidden_size'?"),
        (changed(n_embd=32), "n_embd: 32 is a key of gpt2, not of llama; remove it"),
        (changed(rotary_pct=0.25), "rotary_pct: 0.25 is a key of gpt_neox, not of llama; remove it"),
        ({**GPT2, "rope_theta": 5e5}, "rope_theta: 500000.0 is a key of llama, not of gpt2; remove it"),
        (changed(hidden_size=33), "hidden_size: 33 is not a multiple of num_attention_heads 4; change one of them"),
        (changed(num_key_value_heads=3), "num_key_value_heads: 3 doesn't divide num_attention_heads 4"),
        (changed(model_type="mistral", num_key_value_heads=...), "num_key_value_heads: 8 (the default) doesn't divide"),
        (
            changed(num_attention_heads=32, num_key_value_heads=1),
            "head_dim: 1 is odd, but rotary positions rotate pairs",
        ),
        (changed(intermediate_size=...), "intermediate_size: required, but not given"),
        (changed(hidden_size="32"), "hidden_size: '32' is not valid: write a whole number of at least 1"),
        (changed(num_hidden_layers=10**9), "num_hidden_layers: 1000000000 is above 10,000"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 10**15},
            "num_hidden_layers: 1000000000000000 is above 10,000",
        ),
        (changed(attn_implementation="org/code"), "attn_implementation 'org/code' names code to download"),
        (changed(vocab_size=...), "vocab_size: required, but not given"),
        ("no/such/config.json", "hf_config: no/such/config.json: there is no such file; give a config.json"),
        ("", "hf_config: '' is not a path"),
        (7, "hf_config: 7 is neither a path nor an object"),
    ],
)
def test_what_makes_no_model_is_refused_on_reading(given, message):
    assert message in refusal(hf_config=given)


def test_ids_of_tokens_are_not_those_of_another_tokenizer():
    own = build_model(ModelConfig(hf_config=changed(pad_token_id=...))).lm.config
    assert (own.pad_token_id, own.bos_token_id, own.eos_token_id) == (None, None, None)
    given = build_model(ModelConfig(hf_config=changed(eos_token_id=[7, 8]))).lm
    assert (given.config.pad_token_id, given.config.eos_token_id, given.generation_config.eos_token_id) == (
        3,
        [7, 8],
        [7, 8],
    )


@pytest.mark.parametrize(
    ("name", "older"),
    [
        ("llama-1b", {"rope_theta": 500000.0, "rope_scaling": {**ARCHITECTURE_PRESETS["llama-1b"]["rope_scaling"]}}),
        ("qwen3-0.6b", {"rope_theta": 1000000.0}),
        ("neox-160m", {"rotary_emb_base": 10000, "rotary_pct": 0.25}),
    ],
)
def test_a_saved_configuration_has_the_names_of_transformers_4_too(name, older, tmp_path):
    model = build_model(ModelConfig(hf_config=SHAPES[name]))
    save_model(model, tmp_path, model.state_dict())
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert {key: written[key] for key in older} == older
    with quiet():
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters == model.lm.config.rope_parameters


@pytest.mark.parametrize(("kind", "is_added"), [("llama", True), ("gpt_neox_japanese", False), ("gemma3_text", False)])
def test_older_names_that_transformers_5_reads_differently_are_left_out(kind, is_added, tmp_path):
    scaling = {"rope_type": "linear", "factor": 8.0, "rope_theta": 77.0}
    with quiet():
        config = AutoConfig.for_model(kind, **({} if kind == "gemma3_text" else {"rope_parameters": scaling}))
        config.save_pretrained(tmp_path)
        add_older_names(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters
    assert ("rope_scaling" in json.loads((tmp_path / "config.json").read_text())) == is_added


def test_experts_have_the_name_of_transformers_4_too(tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    model = build_model(ModelConfig(hf_config=changed(model_type="qwen3_moe", **experts)))
    save_model(model, tmp_path, model.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["num_experts"] == 4


def test_code_of_a_known_architecture_is_left_out():
    config = ModelConfig(hf_config={**LLAMA, "auto_map": {"AutoConfig": "code.Config"}})
    assert not hasattr(build_model(config).lm.config, "auto_map")


def test_what_only_transformers_knows_is_refused_when_it_is_built():
    bloom = {
        "model_type": "bloom",
        "n_layer": 2,
        "n_head": 2,
        "hidden_size": 32,
        "vocab_size": 257,
        "hiden_dropout": 0.5,
    }
    with pytest.raises(ConfigError, match="hiden_dropout: unknown key of bloom; did you mean 'hidden_dropout'"):
        build_model(ModelConfig(hf_config=bloom, max_position_embeddings=32))
    with pytest.raises(ConfigError, match=r"model\.hf_config: transformers can't read its config\.json: .*hidden_act"):
        build_model(ModelConfig(hf_config={**LLAMA, "hidden_act": 3}))
    both_ways = {**SMALL, "model_type": "bert"}
    with pytest.raises(ConfigError, match=r"model\.hf_config: its logits change with later tokens"):
        build_model(ModelConfig(hf_config=both_ways))


def test_a_corpus_with_more_tokens_is_refused(tiny_run):
    run = {**tiny_run, "model": {"hf_config": {**LLAMA, "vocab_size": 200}}}
    with pytest.raises(DataError, match="has id 256, outside the vocabulary of 200"):
        open_run_data(RunConfig.from_dict(run))
    open_run_data(RunConfig.from_dict({**tiny_run, "model": {"hf_config": {**LLAMA, "vocab_size": 1000}}}))


def test_the_plan_of_an_architecture_that_is_not_counted(tiny_run):
    bloom = {"model_type": "bloom", "n_layer": 2, "n_head": 2, "hidden_size": 32, "vocab_size": 257}
    config = RunConfig.from_dict({**tiny_run, "model": {"hf_config": bloom, "max_position_embeddings": 32}})
    plan = summary.plan(config)
    assert "parameters" not in plan
    assert "compute           unknown: the weights of the architecture bloom aren't known here" in summary.describe(
        plan
    )
    on_ranks = ranks.on_ranks(config.for_ranks(2), ranks.RankFlags(ranks=2))
    assert on_ranks["hours"] is None
    ranks.describe_ranks(on_ranks)
    cost = cost_of(config, 1, 3)
    assert (cost.tokens, math.isnan(cost.flops)) == (3 * 8 * 8, True)
    assert ranks.rank_warnings(config, on_ranks) == []
    assert isinstance(build_model(config.model), AnyCausalLM)
    llama = RunConfig.from_dict({**tiny_run, "model": {"hf_config": LLAMA}})
    assert summary.plan(llama)["parameters"] == llama.model.parameter_count()


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoint_is_exported_without_padding_and_starts_another_run_with_it(name, tmp_path):
    torch.manual_seed(0)
    model = build_model(ModelConfig(hf_config=SHAPES[name]))
    save_model(model, tmp_path / "global_step3", model.state_dict())
    checkpoint = complete(tmp_path / "global_step3", step=3)
    again = build_model(ModelConfig(hf_checkpoint=str(checkpoint)))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(value.equal(again.state_dict()[key]) for key, value in model.state_dict().items())
    export(checkpoint, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.architectures == [type(model.lm).__name__]
    tokens = torch.arange(12).reshape(1, 12) * 20
    logits = exported(tokens).logits
    assert logits.shape[-1] == 257
    torch.testing.assert_close(logits, model.eval().lm(tokens).logits[..., :257], atol=1e-6, rtol=0)
    assert load_model(tmp_path / "out").config.model_type == SHAPES[name]["model_type"]
