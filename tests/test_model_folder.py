"""Training that starts from a Hugging Face folder: what is refused, what trains on which engine, what comes out."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.launching import ROOT
from helpers.models import CONFIGS, complete, save
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from seqlen_curriculum import ConfigError, DataError, RunConfig
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.models.causal_lm import AnyCausalLM, build_model
from seqlen_curriculum.models.gpt2 import CausalLM, build_gpt2, save_hf
from seqlen_curriculum.models.pretrained import load_model

PARAMETERS = {  # by hand, of H=32, V=257, I=48, two layers
    # each 4 H^2 + 3 H I + 2 H, then the last norm and both ends
    "llama": 2 * (4 * 32**2 + 3 * 32 * 48 + 2 * 32) + 32 + 2 * 257 * 32,
    # q and o as before; k and v of one head of 16 alike; biases of q, k, v; a tied head
    "qwen2": 2 * (2 * 32**2 + 2 * 32 * 16 + 64 + 3 * 32 * 48 + 2 * 32) + 32 + 257 * 32,
    # 384 rows of words, 32 of positions
    "gpt2": 2 * (12 * 32**2 + 13 * 32) + 2 * 32 + (384 + 32) * 32,
    "narrow_gpt2": 2 * (4 * 32**2 + 2 * 32 * 48 + 48 + 9 * 32) + 2 * 32 + (384 + 32) * 32,
}


def section(folder, **keys):
    positions = {"max_position_embeddings": 32} if folder.name == "bloom" else {}  # ALiBi has no longest
    return {"hf_checkpoint": str(folder), **positions, **keys}


def refusal(value):
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(value)
    return str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_the_folders(folders, name):
    config = ModelConfig.model_validate(section(folders / name))
    sizes = (config.num_layers, config.hidden_size, config.num_attention_heads, config.max_position_embeddings)
    assert sizes == (2, 32, 2, 32)
    assert config.vocab_size == 257
    assert config.padded_vocab_size == (384 if "gpt2" in name else 257)
    model = build_model(config)
    assert config.parameter_count() == sum(weight.numel() for weight in model.parameters())
    assert config.parameter_count() == PARAMETERS.get(name, config.parameter_count())
    assert isinstance(model, CausalLM if "gpt2" in name else AnyCausalLM)


def test_flops_leave_out_what_is_looked_up(folders):
    attention = 12 * 2 * 32 * 10  # 12 num_layers hidden_size seqlen
    llama, qwen2 = (ModelConfig.model_validate(section(folders / name)) for name in ("llama", "qwen2"))
    assert llama.flops_per_token(10) == 6 * (PARAMETERS["llama"] - 257 * 32) + attention
    assert qwen2.flops_per_token(10) == 6 * PARAMETERS["qwen2"] + attention


def test_sizes_that_contradict_name_both(folders):
    message = refusal(section(folders / "llama", num_layers=3))
    assert f"num_layers: 3 differs from 2 in hf_checkpoint {folders / 'llama'}" in message
    message = refusal(section(folders / "llama", preset="tiny-200k"))
    assert "hidden_size: 64 differs from 32" in message
    assert ModelConfig.model_validate(section(folders / "llama", num_layers=2)).num_layers == 2
    message = refusal({"hf_checkpoint": str(folders / "bloom")})
    assert "config.json has no max_position_embeddings (as max_position_embeddings or n_positions" in message
    assert "set model.max_position_embeddings" in message


def test_what_is_no_causal_language_model_is_refused(folders, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    classes = save(BertForSequenceClassification(BertConfig(vocab_size=257, **sizes)), tmp_path / "classes")
    assert "has the architecture BertForSequenceClassification; give a causal" in refusal(
        {"hf_checkpoint": str(classes)}
    )
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=257, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16))
    message = refusal({"hf_checkpoint": str(save(t5, tmp_path / "t5"))})
    assert "T5ForConditionalGeneration is an encoder-decoder model" in message
    both_ways = save(BertLMHeadModel(BertConfig(vocab_size=257, **sizes)), tmp_path / "both_ways")
    with pytest.raises(ConfigError, match="its logits change with later tokens"):
        build_model(ModelConfig.model_validate({"hf_checkpoint": str(both_ways)}))
    parts = shutil.copytree(folders / "llama", tmp_path / "parts")
    config = json.loads((parts / "config.json").read_text())
    nested = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "text_config": config}
    (parts / "config.json").write_text(json.dumps(nested))
    assert "num_layers only in the text_config" in refusal({"hf_checkpoint": str(parts)})


def test_folders_that_are_not_whole_are_refused(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal({"hf_checkpoint": str(tmp_path / "nothing")})
    assert "nothing: there is no such folder" in message
    assert "needs its files each time it is resumed" in message
    assert "hf_checkpoint: '' is not a folder" in refusal({"hf_checkpoint": ""})  # not the current one
    assert "neither a config.json" in refusal({"hf_checkpoint": str(tmp_path / "empty")})
    cut = shutil.copytree(folders / "llama", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    assert "model.safetensors: can't be read as safetensors" in refusal({"hf_checkpoint": str(cut)})
    (cut / "model.safetensors").unlink()
    assert "cut: has no weights as model.safetensors or" in refusal({"hf_checkpoint": str(cut)})
    run = tmp_path / "run"
    complete(shutil.copytree(folders / "gpt2", run / "global_step7"), step=7)
    assert "the folder of a run, whose newest checkpoint changes" in refusal({"hf_checkpoint": str(run)})
    assert ModelConfig.model_validate(section(run / "global_step7")).num_layers == 2


def test_settings_that_another_architecture_cannot_have(folders, tiny_run):
    def found(**changes):
        with pytest.raises(ConfigError) as caught:
            RunConfig.from_dict({**tiny_run, "model": section(folders / "llama"), **changes})
        return caught.value.problems

    assert found(pipeline={"stages": 3}) == [
        "pipeline.stages: 3 is above model.num_layers 2, and every stage needs a layer; lower it"
    ]
    (dropout,) = found(model=section(folders / "llama", dropout=0.1))
    assert "dropout 0.1 is not used by a llama" in dropout
    (longer,) = found(data={**tiny_run["data"], "seq_length": 64})
    assert longer.endswith(
        "is above the model's 32 positions; lower it or set model.rope to continue it at longer sequences"
    )


def test_the_runs_identity_is_in_the_weights_not_in_the_path(folders, tiny_run, tmp_path):
    def settings(folder):
        return RunConfig.from_dict({**tiny_run, "model": section(folder)}).settings()

    original = settings(folders / "gpt2")
    assert str(folders) not in json.dumps(original)
    same = shutil.copytree(folders / "gpt2", tmp_path / "copy")
    assert settings(same) == original
    weights = bytearray((same / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (same / "model.safetensors").write_bytes(weights)
    changed = settings(same)
    assert [key for key in original if original[key] != changed[key]] == ["model.initial_weights"]
    config = RunConfig.from_dict({**tiny_run, "model": section(folders / "llama")})
    assert RunConfig.from_dict(config.as_file()).settings() == config.settings()
    scratch = RunConfig.from_dict(tiny_run).settings()
    assert not any("hf_checkpoint" in key or "initial" in key for key in scratch)


def test_a_gpt2_gets_its_weights_its_activation_and_our_dropout(folders):
    model = build_model(ModelConfig.model_validate(section(folders / "gpt2", dropout=0.25)))
    config = model.lm.config
    assert (config.activation_function, config.resid_pdrop, config.attn_pdrop) == ("relu", 0.25, 0.25)
    original = load_model(folders / "gpt2")
    words, padded = original.transformer.wte.weight, model.lm.transformer.wte.weight
    assert padded[:257].equal(words)
    torch.testing.assert_close(padded[257:], words.mean(0).expand(127, 32))
    tokens = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(model.eval().lm(tokens).logits[..., :257], original(tokens).logits)


def test_a_checkpoint_keeps_its_padding_rows(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16}
    model = build_gpt2(ModelConfig(vocab_size=257, **sizes))
    save_hf(model, tmp_path / "global_step3")
    again = build_model(ModelConfig.model_validate(section(complete(tmp_path / "global_step3", step=3))))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(value.equal(again.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_corpus_has_the_tokenizer_of_the_model(folders, corpus, tiny_run, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"bytes{suffix}")
    model = shutil.copytree(folders / "llama", tmp_path / "llama")
    run = {**tiny_run, "model": section(model), "data": {**tiny_run["data"], "train": [str(tmp_path / "bytes.bin")]}}
    open_run_data(RunConfig.from_dict(run))  # the corpus has none
    beside = tmp_path / "bytes.tokenizer.json"
    tokenizer = build_tokenizer(TokenizerChoice(train_vocab=257), [])
    tokenizer.save(str(beside))
    open_run_data(RunConfig.from_dict(run))
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(beside))
    open_run_data(RunConfig.from_dict(run))  # no id means another token
    build_tokenizer(TokenizerChoice(train_vocab=258), ["abab"]).save(str(model / "tokenizer.json"))
    with pytest.raises(DataError) as caught:
        open_run_data(RunConfig.from_dict(run))
    message = (
        f"{beside}: is not the tokenizer in model.hf_checkpoint {model}: id 257 there is 'ab', here another; prepare"
    )
    assert str(caught.value).startswith(message)
    beside.unlink()
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"llama/tokenizer\.json: not a tokenizer\.json"):
        open_run_data(RunConfig.from_dict(run))


@given(st.integers(0, 10**6), st.floats(0.01, 5.0))
def test_padding_rows_cost_at_most_their_share(seed, scale):
    # 100 words and 28 rows of their mean: 28 exp(mean) <= 28 / 100 sum(exp), so the loss rises by ln(1.28) at most.
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(100, 8, generator=generator) * scale
    hidden = torch.randn(5, 8, generator=generator) * scale
    logits, mean = hidden @ words.T, hidden @ words.mean(0)
    padded = torch.cat([logits, mean[:, None].expand(-1, 28)], dim=1)
    rise = padded.logsumexp(1) - logits.logsumexp(1)
    assert (rise >= -1e-4).all()
    assert (rise <= math.log(1.28) + 1e-4).all()


def test_the_plan_needs_no_torch(folders, tiny_run, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**tiny_run, "model": section(folders / "llama")}))
    code = (
        "import runpy, sys; runpy.run_path('scripts/plan.py', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run.json"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parameters"] == PARAMETERS["llama"]
