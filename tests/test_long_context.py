"""``model.rope``: another base or scaling of rotary positions, in the plan, the built model, the recipe and the export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.command import slw
from helpers.models import CONFIGS, save
from transformers import AutoModelForCausalLM, BloomConfig, Gemma3TextConfig, LlamaConfig, OPTConfig

from seqlen_curriculum import ConfigError, RunConfig
from seqlen_curriculum.cli.configs import sizes
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.export.huggingface import export
from seqlen_curriculum.models.causal_lm import build_model, save_model
from seqlen_curriculum.models.pretrained import load_model
from seqlen_curriculum.models.pretrained_tokenizer import copy_tokenizer, save_tokenizer
from seqlen_curriculum.shipped import shipped_configs

RECIPE = Path(__file__).parent.parent / "configs" / "long_context" / "llama3_8b_64k.json"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 257}
LLAMA = LlamaConfig(**SIZES, intermediate_size=48, max_position_embeddings=32, rope_theta=5e5)
YARN = {"rope_type": "yarn", "factor": 4.0}
OTHERS = {
    "opt": OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32),
    "bloom": BloomConfig(n_layer=2, n_head=2, hidden_size=32, vocab_size=257),
    "gemma3": Gemma3TextConfig(**SIZES, intermediate_size=48, max_position_embeddings=32, head_dim=16),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of 32 positions with base 500,000, whose config.json is that of transformers 5."""
    torch.manual_seed(0)
    return save(AutoModelForCausalLM.from_config(LLAMA), tmp_path_factory.mktemp("llama"))


def model_of(folder, rope, **more):
    return ModelConfig.model_validate({"hf_checkpoint": str(folder), "rope": rope, **more})


def frequencies(model):
    (found,) = {buffer for name, buffer in model.named_buffers() if name.endswith(".inv_freq")}
    return found


def run(folder, seq_length, **model):
    return RunConfig.from_dict(
        {
            "train_batch_size": 4,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
            "model": {"hf_checkpoint": str(folder), **model},
            "data": {"train": ["x"], "seq_length": seq_length},
            "training": {"train_tokens": 10_000},
        }
    )


def test_the_base_rotates_the_positions_of_the_loaded_weights(llama):
    changed = build_model(model_of(llama, {"theta": 8e6}, max_position_embeddings=128))
    own = build_model(ModelConfig.model_validate({"hf_checkpoint": str(llama)}))
    exponents = torch.arange(0, 16, 2) / 16  # heads of 16
    torch.testing.assert_close(frequencies(changed), 8e6**-exponents)
    torch.testing.assert_close(frequencies(own), 5e5**-exponents)
    assert changed.lm.config.max_position_embeddings == 128
    for (name, weight), (_, other) in zip(changed.named_parameters(), own.named_parameters(), strict=True):
        assert torch.equal(weight, other), name
    again = build_model(model_of(llama, {"theta": 8e6}, max_position_embeddings=128), read_weights=False)  # a resume
    assert torch.equal(frequencies(again), frequencies(changed))


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"theta": 8e6}, {"rope_type": "default", "rope_theta": 8e6}),
        (
            {"scaling": YARN},
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "original_max_position_embeddings": 32},
        ),
        (
            {"theta": 1e4, "scaling": {**YARN, "original_max_position_embeddings": 16}},
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
        ),
        # as in the files of transformers 4 and 5
        ({"scaling": {"type": "linear", "factor": 2}}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}),
        (
            {"scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e5}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e5},
        ),
    ],
)
def test_scaling_has_the_keys_of_transformers(llama, rope, expected):
    lm = build_model(model_of(llama, rope, max_position_embeddings=128)).lm
    assert lm.config.rope_parameters == expected
    assert lm(torch.arange(100).unsqueeze(0)).logits.isfinite().all()


@pytest.mark.parametrize("rope", [{"theta": 8e6}, {"scaling": {"rope_type": "linear", "factor": 2.0}}])
def test_both_spellings_of_a_folder_are_the_same_model(llama, tmp_path, rope):
    older = save(load_model(llama), tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 16
    (older / "config.json").write_text(json.dumps({**config, "rope_theta": 2e4, "rope_scaling": scaling}))
    newer = save(load_model(llama), tmp_path / "newer")
    (newer / "config.json").write_text(json.dumps({**config, "rope_parameters": {**scaling, "rope_theta": 2e4}}))
    first, second = (build_model(model_of(folder, rope)).lm for folder in (older, newer))
    assert first.config.rope_parameters == second.config.rope_parameters
    assert torch.equal(frequencies(first), frequencies(second))
    assert first.config.rope_parameters["rope_theta"] == rope.get("theta", 2e4)
    assert first.config.rope_parameters["rope_type"] == ("linear" if "scaling" in rope else "llama3")


def test_positions_grow_to_the_length_of_the_data(llama):
    assert run(llama, 64, rope={"theta": 8e6}).model.max_position_embeddings == 64
    assert run(llama, 16, rope={"theta": 8e6}).model.max_position_embeddings == 32
    given = run(llama, 64, rope={"theta": 8e6}, max_position_embeddings=256)
    assert given.model.max_position_embeddings == 256
    assert RunConfig.from_dict(given.as_file()).settings() == given.settings()
    grown = run(llama, 64, rope={"theta": 8e6})
    assert RunConfig.from_dict(grown.as_file()).settings() == grown.settings()
    assert grown.settings()["model.rope.theta"] == 8e6
    assert "model.rope.theta" not in run(llama, 32).settings()  # old checkpoints of such runs resume


@pytest.mark.parametrize(
    ("seq_length", "model", "message"),
    [
        (64, {}, "data.seq_length: 64 is above the model's 32 positions; lower it or set model.rope to continue"),
        (64, {"rope": {"theta": 1e6}, "max_position_embeddings": 48}, "data.seq_length: 64 is above the model's 48"),
        (32, {"rope": {"theta": 1e6}, "max_position_embeddings": 16}, "max_position_embeddings: 16 differs from 32"),
        (32, {"max_position_embeddings": 64}, "max_position_embeddings: 64 differs from 32"),
        (32, {"rope": {}}, "model.rope: has neither theta nor scaling"),
        (32, {"rope": {"theta": 0}}, "model.rope.theta: 0 is not valid"),
        (32, {"rope": {"theta": 1e4, "scaling": {**YARN, "rope_theta": 2e4}}}, "theta 10000.0 and scaling.rope_theta"),
        (32, {"rope": {"base": 1e4}}, "model.rope.base: unknown key"),
        (32, {"rope": {"scaling": {"rope_type": "ntk"}}}, "model.rope.scaling.rope_type: 'ntk' is not valid"),
        (32, {"rope": {"scaling": {"rope_type": "yarn"}}}, "model.rope.scaling: factor is required by rope_type yarn"),
        (32, {"rope": {"scaling": {**YARN, "factor": 0.5}}}, "model.rope.scaling.factor: 0.5 is not valid"),
        (
            32,
            {"rope": {"scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 32}}},
            "model.rope.scaling: beta_fast isn't used by rope_type linear",
        ),
    ],
)
def test_wrong_sections_are_refused_by_name(llama, seq_length, model, message):
    with pytest.raises(ConfigError) as caught:
        run(llama, seq_length, **model)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "gpt2",
            "model: rope can't lengthen a gpt2, whose positions are learned (transformer.wpe.weight); remove rope",
        ),
        ("opt", "model: rope can't lengthen a opt, whose positions are learned (model.decoder.embed_positions.weight)"),
    ],
)
def test_learned_positions_are_refused_in_the_plan(tmp_path, kind, message):
    folder = save(AutoModelForCausalLM.from_config({**CONFIGS, **OTHERS}[kind]), tmp_path / kind)
    with pytest.raises(ConfigError) as caught:
        run(folder, 32, rope={"theta": 1e6})
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match=r"take another model\.hf_checkpoint"):
        run(folder, 64)


def test_a_new_model_has_nothing_to_change():
    with pytest.raises(
        ConfigError, match=r"^model: rope changes the positions of a trained model, but hf_checkpoint isn't"
    ):
        RunConfig.from_dict({"model": {"preset": "tiny-200k", "rope": {"theta": 1e6}}})


@pytest.mark.parametrize(("kind", "problem"), [("bloom", "has no RoPE"), ("gemma3", "has a RoPE for each type")])
def test_a_model_without_one_rope_is_refused_when_it_is_built(tmp_path, kind, problem):
    folder = save(AutoModelForCausalLM.from_config(OTHERS[kind]), tmp_path / kind)
    positions = {"max_position_embeddings": 32}
    with pytest.raises(ConfigError, match=rf"^model\.rope: the \w+ of model\.hf_checkpoint {problem}.*remove rope"):
        build_model(model_of(folder, {"theta": 1e6}, **positions))


def test_longrope_has_a_factor_for_each_pair_of_dimensions(llama):
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 7}
    with pytest.raises(
        ConfigError, match=r"scaling\.long_factor: has 7 factors, but each head of the model has 8 pairs"
    ):
        build_model(model_of(llama, {"scaling": scaling}))
    rope = {"scaling": {**scaling, "long_factor": [2.0] * 8}}
    assert (
        build_model(model_of(llama, rope, max_position_embeddings=64)).lm.config.rope_parameters["rope_type"]
        == "longrope"
    )


@pytest.mark.parametrize(("limit", "written"), [(32, 128), (16, 16), (1e30, 128)])
def test_the_tokenizers_limit_grows_with_the_positions(llama, tmp_path, limit, written):
    source = shutil.copytree(llama, tmp_path / "source")
    save_tokenizer(build_tokenizer(TokenizerChoice(train_vocab=257), []), source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": limit}))
    (tmp_path / "copy").mkdir()
    copy_tokenizer(source, tmp_path / "copy", positions=128)
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["model_max_length"] == written


# --- the recipe ---


def test_the_recipe_says_what_it_needs_and_is_listed():
    assert slw("plan", RECIPE).stderr.count("hf_checkpoint isn't given; set it to the model's folder") == 1
    assert sizes(RECIPE) == {
        "parameters": None,
        "train_tokens": 5000 * 64 * 65_536,
        "first_batch_size": 64,
        "batch_size": 64,
        "first_seqlen": 8192,
        "seq_length": 65_536,
        "full_length_step": 999,
    }
    listed = slw("configs", "list").stdout
    (line,) = [line for line in listed.splitlines() if line.startswith("long_context/llama3_8b_64k")]
    assert line.split()[1:3] == ["yours", "21B"]
    assert RECIPE in shipped_configs().values()


def test_the_recipe_trains_and_exports_the_changed_rope(llama, tmp_path):
    """The recipe with lengths / 1,024: 8 to 64 tokens, for a few steps of the loop, without DeepSpeed."""
    small = [
        f"model.hf_checkpoint={llama}",
        "data.seq_length=64",
        "curriculum_learning.min_difficulty=8",
        "curriculum_learning.max_difficulty=64",
        'curriculum_learning.schedule_config={"total_curriculum_tokens": 10000, "difficulty_step": 8}',
        "train_batch_size=8",
        "scheduler.params.warmup_tokens=2000",
        "optimizer.params.lr=0.01",
        "training.train_tokens=16000",
    ]
    config = RunConfig.load(RECIPE, small, require=("model", "data", "training"))
    timeline, rate = config.timeline(), config.plan.learning_rate()
    assert (timeline.seqlen(1), timeline.seqlen(timeline.steps)) == (8, 64)
    assert config.model.max_position_embeddings == 64
    model = build_model(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate.max_lr)
    losses = []
    for step in range(1, timeline.steps + 1):
        optimizer.param_groups[0]["lr"] = rate(step)
        tokens = (torch.arange(timeline.seqlen(step) + 1) + 7 * torch.arange(8)[:, None] + step) % 257  # counts upwards
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1
    save_model(model, tmp_path / "trained", dict(model.named_parameters()))
    export(tmp_path / "trained", tmp_path / "exported")
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["rope_parameters"] == {"rope_theta": 8e6, "rope_type": "default"}
    assert written["rope_theta"] == 8e6  # for transformers 4
    assert written["max_position_embeddings"] == 64
    loaded = load_model(tmp_path / "exported")
    assert torch.equal(frequencies(loaded), frequencies(model))
    tokens = torch.arange(64).unsqueeze(0)
    torch.testing.assert_close(loaded(tokens).logits, model.eval().lm(tokens).logits)


def test_an_export_has_the_scaling_in_both_spellings(llama, tmp_path):
    model = build_model(model_of(llama, {"scaling": YARN}, max_position_embeddings=128))
    save_model(model, tmp_path / "model", dict(model.named_parameters()))
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["rope_scaling"] == {**YARN, "original_max_position_embeddings": 32}
    assert written["rope_parameters"] == {**written["rope_scaling"], "rope_theta": 5e5}
    assert load_model(tmp_path / "model").config.rope_parameters == written["rope_parameters"]
