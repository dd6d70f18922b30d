"""Folders of models as people have them: other formats of weights, weight maps, links, code, names on the Hub."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.run_file import absolute_paths, read_run_file
from seqlen_curriculum.data.tokenizer import read_tokenizer
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.export.huggingface import export
from seqlen_curriculum.models.causal_lm import build_model
from seqlen_curriculum.models.pretrained import load_model
from seqlen_curriculum.models.pretrained_tokenizer import load_tokenizer
from seqlen_curriculum.run_folder.hub import hub_folder, is_hub_name
from seqlen_curriculum.run_folder.model_files import weight_files, weight_shapes
from seqlen_curriculum.run_folder.model_folder import model_folder, read_pretrained

TOKENS = torch.arange(12).reshape(1, 12) * 20


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def with_torch_weights(folder, legacy=False, shards=1):
    """Replace the file of safetensors with one or more of torch.save."""
    weights = load_model(folder).state_dict()  # with a tied head under both names
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return folder
    file_of = {name: f"pytorch_model-0000{number % shards}.bin" for number, name in enumerate(weights)}
    for file in set(file_of.values()):
        torch.save({name: weights[name] for name in weights if file_of[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": file_of}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


# Other formats of weights


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("how", [{}, {"legacy": True}, {"shards": 2}])
def test_torchs_files_are_trained_as_they_are_evaluated(folders, tmp_path, name, how):
    folder = shutil.copytree(folders / name, tmp_path / name)
    expected = load_model(folder)(TOKENS).logits
    parameters = ModelConfig(hf_checkpoint=str(folder)).parameter_count()
    with_torch_weights(folder, **how)
    torch.testing.assert_close(load_model(folder)(TOKENS).logits, expected, atol=0, rtol=0)
    config = ModelConfig(hf_checkpoint=str(folder))
    if "shards" not in how or name == "llama":  # a tied head in another file is a second copy
        assert config.parameter_count() == parameters
    trained = build_model(config).eval()
    torch.testing.assert_close(trained.lm(TOKENS).logits, expected, atol=0, rtol=0)
    assert config.initial is not None
    assert len(config.initial.fingerprint) == 32


def test_safetensors_come_first_as_in_transformers(llama):
    (llama / "pytorch_model.bin").write_bytes(b"not read")
    (llama / "model.safetensors.index.json").write_text("{}")
    assert weight_files(llama) == [llama / "model.safetensors"]
    assert load_model(llama)(TOKENS).logits.shape[-1] == 257


class Pickled:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_never_run(llama, tmp_path, legacy):
    (llama / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    weights = {"x": Pickled(str(canary))}
    torch.save(weights, llama / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValidationError, match=r"pytorch_model\.bin: can't be read as weights"):
        ModelConfig(hf_checkpoint=str(llama))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: can't be read as weights"):
        load_model(llama)
    with pytest.raises(CheckpointError):
        export(llama, tmp_path / "out")
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"abc"])
def test_damaged_files_of_torch(llama, content):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: can't be read as weights"):
        list(weight_shapes(llama / "pytorch_model.bin"))


def test_a_folder_without_weights_names_the_files_that_are_looked_for(llama):
    (llama / "model.safetensors").rename(llama / "tf_model.h5")
    for read in (read_pretrained, load_model):
        with pytest.raises(CheckpointError, match=r"has no weights as model\.safetensors or .*pytorch_model\.bin"):
            read(llama)


# Weight maps and links


def targets(tmp_path):
    (tmp_path / "outside.safetensors").write_bytes(b"secret")
    return {
        "absolute": (str(tmp_path / "outside.safetensors"), "leads out of the folder"),
        "climbing": ("../outside.safetensors", "leads out of the folder"),
        "device": ("/dev/zero.safetensors", "leads out of the folder"),
        "absent": ("none.safetensors", "there is no such file"),
        "folder": ("sub.safetensors", "is not a regular file"),
        "fifo": ("pipe.safetensors", "is not a regular file"),
        "link": ("link.safetensors", "outside the folder"),
        "long": ("x" * 5000 + ".safetensors", "is not the name of a file"),
        "nul": ("a\\u0000.safetensors", "NUL|null"),
        "suffix": ("other.bin", "no weight_map of names to .safetensors files"),
    }


@pytest.mark.parametrize(
    "kind", ["absolute", "climbing", "device", "absent", "folder", "fifo", "link", "long", "nul", "suffix"]
)
def test_weight_maps_stay_inside_their_folder(llama, tmp_path, kind):
    name, problem = targets(tmp_path)[kind]
    if kind == "folder":
        (llama / name).mkdir()
    elif kind == "fifo":
        os.mkfifo(llama / name)
    elif kind == "link":
        (llama / name).symlink_to("/dev/zero")
    names = list(weights_of(llama))
    (llama / "model.safetensors").rename(llama / "part.safetensors")
    file_of = {**dict.fromkeys(names, "part.safetensors"), names[0]: "FILE"}
    index = json.dumps({"metadata": {}, "weight_map": file_of}).replace("FILE", name)
    (llama / "model.safetensors.index.json").write_text(index)
    for read in (read_pretrained, load_model, lambda folder: export(folder, tmp_path / "out")):
        with pytest.raises((CheckpointError, ConfigError), match=problem) as caught:
            read(llama)
        assert len(str(caught.value)) < 700
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_links_out_of_a_folder_are_not_followed(llama, tmp_path, name):
    shutil.move(llama / name, tmp_path / "elsewhere")
    (llama / name).symlink_to(tmp_path / "elsewhere")
    for read in (load_model, lambda folder: export(folder, tmp_path / "out"), read_pretrained):
        with pytest.raises(CheckpointError, match=f"{name}: is a link to .*outside the folder"):
            read(llama)
    if name == "tokenizer.json":
        with pytest.raises(CheckpointError, match="outside the folder"):
            read_tokenizer(llama)
    (llama / name).unlink()
    shutil.move(tmp_path / "elsewhere", llama / "inside")
    (llama / name).symlink_to("inside")
    export(llama, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


# Code in the folder


@pytest.mark.parametrize("model_type", ["llama", "unknown"])
def test_a_folders_code_is_neither_run_nor_asked_about(llama, tmp_path, monkeypatch, model_type):
    code = f"open({str(tmp_path / 'canary')!r}, 'w')\n"
    (llama / "code.py").write_text(code + "class Config: pass\nclass Model: pass\nclass Tokens: pass\n")
    config = json.loads((llama / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config["model_type"] = model_type
    (llama / "config.json").write_text(json.dumps(config))
    tokens = json.loads((llama / "tokenizer_config.json").read_text())
    tokens["auto_map"] = {"AutoTokenizer": ["code.Tokens", None]}
    (llama / "tokenizer_config.json").write_text(json.dumps(tokens))

    def asked(*_):
        raise AssertionError("a prompt")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    load_tokenizer(llama)
    if model_type == "unknown":
        with pytest.raises(CheckpointError, match="can't be loaded as a causal language model"):
            load_model(llama)
        with pytest.raises(ConfigError, match=r"model\.hf_checkpoint: .* can't read its config\.json"):
            build_model(ModelConfig(hf_checkpoint=str(llama)))
    else:
        load_model(llama)
        trained = build_model(ModelConfig(hf_checkpoint=str(llama)))
        assert not hasattr(trained.lm.config, "auto_map")
        build_model(ModelConfig(hf_checkpoint=str(llama)), read_weights=False)
        export(llama, tmp_path / "out")
        assert not any("auto_map" in path.read_text() for path in (tmp_path / "out").glob("*.json"))
        assert not (tmp_path / "out" / "code.py").exists()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("change", [{"attn_implementation": "org/code"}, {"text_config": {"x_implementation": "a/b"}}])
def test_code_on_the_hub_is_not_run(llama, change):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, **change}))
    for read in (load_model, read_pretrained):
        with pytest.raises(CheckpointError, match=r"config\.json names code to download, .*_implementation '"):
            read(llama)


def test_a_pipe_is_not_a_tokenizer(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="is not an ordinary file"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_an_adapter_names_another_model(llama):
    (llama / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*merge_and_unload"):
        load_model(llama)


# Names on the Hub


@pytest.fixture
def cache(folders, tmp_path, monkeypatch):
    """Hugging Face's cache with ``org/llama``: a snapshot of links to blobs."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    repo = tmp_path / "hub" / "models--org--llama"
    snapshot, blobs = repo / "snapshots" / ("a" * 40), repo / "blobs"
    for folder in (snapshot, blobs, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    for number, path in enumerate(sorted((folders / "llama").iterdir())):
        shutil.copy(path, blobs / f"{number:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_name_means_its_folder_in_the_cache(cache, folders, tmp_path):
    name = "org/llama"
    assert model_folder(cache) == cache
    assert hub_folder(name) == cache
    expected = load_model(folders / "llama")(TOKENS).logits
    torch.testing.assert_close(load_model(Path(name))(TOKENS).logits, expected, atol=0, rtol=0)
    assert read_tokenizer(Path(name)).get_vocab_size() == 257
    export(Path(name), tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    config = ModelConfig(hf_checkpoint=name)
    assert (config.vocab_size, config.initial.folder) == (257, cache)
    (tmp_path / "files").mkdir()
    run = {"model": {"hf_checkpoint": name}}
    (tmp_path / "files" / "run.json").write_text(json.dumps(run))
    assert read_run_file(tmp_path / "files" / "run.json")["model"] == run["model"]
    assert absolute_paths(run) == run


def test_a_name_that_is_nowhere_is_one_line(cache, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        model_folder(Path("gpt2"))
    message = str(caught.value)
    assert message.startswith("gpt2: there is no such folder, and no complete model of this name in the cache")
    assert "can't be downloaded from the Hub (" in message
    assert "\n" not in message
    with pytest.raises(ValidationError, match="hf_checkpoint: gpt2: there is no such folder"):
        ModelConfig(hf_checkpoint="gpt2")
    with pytest.raises(CheckpointError, match="gpt2: there is no such folder"):
        read_tokenizer(Path("gpt2"))
    (cache / "model.safetensors").unlink()  # an interrupted download
    with pytest.raises(CheckpointError, match="no complete model of this name"):
        model_folder(Path("org/llama"))


@pytest.mark.parametrize(
    "name", ["/gpt2", "./gpt2", "../gpt2", "a/b/c", "a..b", "a--b", "tokenizer.json", "", "x" * 97]
)
def test_paths_are_no_names(name):
    assert not is_hub_name(name)


def test_a_folder_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("gpt2")
    (tmp_path / "gpt2").mkdir()
    assert not is_hub_name("gpt2")
