"""Models and tokenizers out of checkpoints, run folders and Hugging Face folders."""

import json
import shutil

import pytest
import torch
from helpers.models import SIZES, complete
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.models.gpt2 import build_gpt2, save_hf
from seqlen_curriculum.models.pretrained import load_model
from seqlen_curriculum.models.pretrained_tokenizer import load_tokenizer, save_tokenizer
from seqlen_curriculum.run_folder.model_folder import model_folder


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(TokenizerChoice(train_vocab=257), [])


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """``run/global_step1``: 257 words in 384 rows, and a tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path / "run" / "global_step1"
    save_hf(build_gpt2(ModelConfig(**SIZES)), folder)
    save_tokenizer(tokenizer, folder)
    return complete(folder)


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=32, **sizes))
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_path_means_itself_or_the_newest_complete_checkpoint(checkpoint, llama):
    run = checkpoint.parent
    assert model_folder(checkpoint) == checkpoint
    assert model_folder(llama) == llama
    assert model_folder(run) == checkpoint
    newer = shutil.copytree(checkpoint, run / "global_step10")
    assert model_folder(run) == newer
    (newer / "model.safetensors").write_bytes(b"cut")
    assert model_folder(run) == checkpoint
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 3 bytes"):
        model_folder(newer)


def test_a_checkpoint_of_an_abandoned_course_is_passed_over(checkpoint):
    run = checkpoint.parent
    newer = shutil.copytree(checkpoint, run / "global_step10")
    complete(newer, step=10)
    rollback = {"step": 9, "loss": None, "ratio": None, "seqlen": 8, "lr": 0.1, "returned_to": 1, "skipped": [8, 9]}
    (run / "rollbacks.json").write_text(json.dumps([rollback]))
    assert model_folder(run) == checkpoint
    (newer / "complete.json").unlink()
    complete(newer, step=10, rollbacks=[rollback])
    assert model_folder(run) == newer


def test_wrong_paths_are_reported(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "nothing", "there is no such folder"),
        (checkpoint / "config.json", "is a file"),
        (tmp_path / "empty", "neither a config.json nor checkpoints"),
    ):
        with pytest.raises(CheckpointError, match=words):
            model_folder(path)
    (checkpoint / "complete.json").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint; the newest of 1: .*no readable complete\.json"):
        model_folder(checkpoint.parent)


def test_padding_rows_are_cut_off(checkpoint, capfd):
    tokens = torch.arange(12).reshape(1, 12) * 20
    padded = AutoModelForCausalLM.from_pretrained(checkpoint)(tokens).logits
    capfd.readouterr()
    model = load_model(checkpoint)
    assert capfd.readouterr() == ("", "")
    assert padded.shape[-1] == 384
    assert model.config.vocab_size == 257
    assert not model.training
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(model(tokens).logits, padded[..., :257], atol=0, rtol=0)


def test_the_type_is_float32_or_the_saved_one(llama):
    model = load_model(llama).to(torch.bfloat16)
    model.save_pretrained(llama / "half")
    assert load_model(llama / "half").dtype == torch.float32
    assert load_model(llama / "half", dtype=None).dtype == torch.bfloat16
    assert load_model(llama / "half", dtype=torch.float16).dtype == torch.float16


def test_a_model_that_is_not_whole_is_refused(llama):
    weights = load_file(llama / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 of the model's weights are missing, such as lm_head\.weight"):
        load_model(llama)
    (llama / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: can't be read as safetensors"):
        load_model(llama)
    (llama / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(CheckpointError, match="can't be loaded as a causal language model"):
        load_model(llama)


def test_the_tokenizer_is_the_folders_own_or_the_one_given(checkpoint, llama, tokenizer, tmp_path):
    text = "Sequence length, warmed up.\n<|endoftext|>"
    expected = tokenizer.encode(text).ids
    assert expected[-1] == tokenizer.token_to_id("<|endoftext|>")
    assert load_tokenizer(checkpoint).encode(text).ids == expected
    with pytest.raises(ConfigError, match=r"llama: has no tokenizer\.json; give --tokenizer"):
        load_tokenizer(llama)
    for given in (checkpoint, checkpoint / "tokenizer.json"):
        assert load_tokenizer(llama, given).encode(text).ids == expected
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "encoder.json").write_text(json.dumps(tokenizer.get_vocab()))
    (gpt2 / "vocab.bpe").write_text("#version: 0.2\n")
    assert load_tokenizer(llama, gpt2).encode(text).ids == expected
    with pytest.raises(ConfigError, match="run: no tokenizer here"):
        load_tokenizer(llama, tmp_path / "run")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(checkpoint):
    larger = build_tokenizer(TokenizerChoice(train_vocab=258), ["aaaa"])
    save_tokenizer(larger, checkpoint)
    complete(checkpoint)
    with pytest.raises(ConfigError, match=r"the tokenizer has 258 tokens, the model in .* 257"):
        load_tokenizer(checkpoint)


def test_transformers_loads_the_saved_tokenizer(checkpoint, tokenizer):
    loaded = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    assert loaded("Hello  world").input_ids == tokenizer.encode("Hello  world").ids
    assert loaded.eos_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert isinstance(Tokenizer.from_file(str(checkpoint / "tokenizer.json")), Tokenizer)
