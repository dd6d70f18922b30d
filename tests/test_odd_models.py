"""Folders of models as people have them: pointers of Git LFS, other prefixes, weights saved twice, weights that diverged."""

import json
import re
import resource
import shutil
import signal

import pytest
import torch
from helpers.command import slw
from safetensors.torch import load_file, save_file

from seqlen_curriculum.config.hf_config import config_problems
from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer, read_tokenizer
from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError
from seqlen_curriculum.models.generation import Sampling, generate
from seqlen_curriculum.models.pretrained import load_model
from seqlen_curriculum.run_folder.model_files import weight_shapes
from seqlen_curriculum.run_folder.model_folder import read_pretrained

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def change_config(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def change_weights(folder, change):
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_in_a_model(llama, name):
    (llama / name).write_bytes(POINTER)
    result = slw("generate", llama, "--prompt", "a")
    assert (
        result.stderr
        == f"error: {llama / name}: is a pointer of Git LFS, not the file itself; run git lfs pull there\n"
    )


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_a_pointer_of_git_lfs_among_inputs(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(POINTER)
    for given in (tmp_path / "in", tmp_path / "in" / name):
        result = slw("prepare", "--input", given, "--train-vocab", 300, "--out", tmp_path / "c", "--workers", 1)
        assert f"{name}: is a pointer of Git LFS" in result.stderr


def test_a_pointer_of_git_lfs_in_place_of_a_corpus(tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"c{suffix}").write_bytes(POINTER)
    assert "c.idx: is a pointer of Git LFS" in slw("inspect", tmp_path / "c").stderr


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_of_weights_with_a_prefix(llama, prefix):
    change_weights(llama, lambda weights: {prefix + name: weight for name, weight in weights.items()})
    with pytest.raises(CheckpointError, match=rf"weights are missing, .*files have others, such as {prefix}lm_head"):
        load_model(llama)


def test_a_tied_head_that_is_saved_too_counts_once(folders, tmp_path):
    folder = shutil.copytree(folders / "qwen2", tmp_path / "qwen2")
    expected = ModelConfig(hf_checkpoint=str(folder)).parameter_count()
    change_weights(folder, lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert ModelConfig(hf_checkpoint=str(folder)).parameter_count() == expected
    assert read_pretrained(folder).looked_up_count() == 0
    assert load_model(folder).num_parameters() == expected


@pytest.mark.parametrize("temperature", [0, 1])
def test_text_of_a_model_that_diverged(llama, temperature):
    change_weights(llama, lambda weights: {name: weight * float("nan") for name, weight in weights.items()})
    with pytest.raises(CheckpointError, match="the logits are not finite"):
        next(generate(llama, ["a"], Sampling(max_new_tokens=1, temperature=temperature)))


@pytest.mark.parametrize("size", [{"num_hidden_layers": 10**7}, {"intermediate_size": 10**9}, {"vocab_size": 2**30}])
def test_sizes_that_the_weights_do_not_have(llama, size):
    change_config(llama, **size)
    with pytest.raises(
        CheckpointError, match=r"config\.json (has 10,000,000 layers|describes [\d,]+ parameters), and its files"
    ):
        load_model(llama)


@pytest.mark.parametrize("size", [{"num_hidden_layers": -1}, {"hidden_size": 0}])
def test_what_is_no_size(llama, size):
    change_config(llama, **size)
    with pytest.raises(CheckpointError, match=r"in its config\.json: .* is not a size"):
        load_model(llama)


@pytest.mark.parametrize("value", [-0.5, 2, "a"])
def test_a_dropout_that_is_no_probability(llama, value):
    change_config(llama, attention_dropout=value)
    problem = "attention_dropout: .* is not a probability; give one from 0 to 1"
    for read in (load_model, read_pretrained):
        with pytest.raises(CheckpointError, match=rf"config\.json: {problem}"):
            read(llama)
    (of_file,) = config_problems(json.loads((llama / "config.json").read_text()))
    assert re.search(problem, of_file)


def test_an_odd_width_of_gpt2(folders, tmp_path):
    folder = shutil.copytree(folders / "narrow_gpt2", tmp_path / "gpt2")
    change_config(folder, n_inner="wide")
    with pytest.raises(ConfigError, match=r"n_inner in its config\.json: 'wide' is not a width"):
        read_pretrained(folder)


@pytest.mark.parametrize("value", ["a", [1, "b"], 0.5])
def test_tokens_of_generation_that_are_no_ids(llama, value):
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        CheckpointError, match=r"eos_token_id in its generation_config\.json: .* is not the id of a token"
    ):
        load_model(llama)
    (llama / "generation_config.json").write_text("{broken")
    with pytest.raises(ConfigError, match=r"generation_config\.json: not valid JSON"):
        load_model(llama)


def test_a_checkpoint_of_another_trainer_as_weights(llama, tmp_path):
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="'state_dict' is of type dict, not a tensor"):
        list(weight_shapes(tmp_path / "pytorch_model.bin"))


@pytest.mark.parametrize("size", [100, 5_000, 25_000])
def test_an_export_to_a_full_disk(llama, tmp_path, size):
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        result = slw("export", llama, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "can't be written" in result.stderr
    assert "File too large" in result.stderr
    assert not (tmp_path / "out").exists()


# Tokenizers


def test_an_id_that_needs_gigabytes(llama):
    content = json.loads((llama / "tokenizer.json").read_text())
    token = next(iter(content["model"]["vocab"]))
    content["model"]["vocab"][token] = 2**32 - 1
    (llama / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"has the id 4,294,967,295, above 16,777,215"):
        read_tokenizer(llama)


def test_two_tokens_with_one_id(tmp_path):
    vocab = build_tokenizer(TokenizerChoice(train_vocab=257), []).get_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "a": vocab["b"]}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(
        ConfigError, match=rf"'a' and 'b' have the id {vocab['b']}|'b' and 'a' have the id {vocab['b']}"
    ):
        read_tokenizer(tmp_path)


def test_a_panic_of_the_library_prints_nothing(tmp_path, capfd):
    content = json.loads(build_tokenizer(TokenizerChoice(train_vocab=257), []).to_str())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises((ConfigError, DataError), match=r"not a tokenizer\.json"):
        read_tokenizer(tmp_path)
    assert capfd.readouterr() == ("", "")
