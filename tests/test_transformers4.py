"""Exports load in transformers 4.57.6, in an environment of its own, with the same logits."""

import json
import site
import subprocess
import sys
import venv

import pytest
import torch
from helpers.models import SHAPES, SMALL, complete

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.export.huggingface import export
from seqlen_curriculum.models.causal_lm import build_model, save_model

pytestmark = pytest.mark.slow
VERSION = "4.57.6"
GROUPED = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    **SHAPES,
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 257},
    "gemma": {"model_type": "gemma", **GROUPED, "head_dim": 8},
    "qwen2": {"model_type": "qwen2", **GROUPED, "rope_theta": 1e6},
    "olmo": {"model_type": "olmo", **SMALL, "rope_theta": 5e5},
    "yarn": {"model_type": "llama", **SMALL, "rope_theta": 5e5, "rope_scaling": SCALING},
    "mixtral": {"model_type": "mixtral", **GROUPED, "num_local_experts": 4},
    "qwen2_moe": {"model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS},
    "olmoe": {"model_type": "olmoe", **SMALL, "num_experts": 4, "num_experts_per_tok": 2},
}
TOKENS = torch.arange(60).reshape(1, 60) * 4
READ = """
import json, pathlib, sys, torch, transformers
differences = {"version": transformers.__version__}
for folder in pathlib.Path(sys.argv[1]).iterdir():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
    saved = torch.load(folder / "logits.pt")
    with torch.no_grad():
        logits = model(saved["tokens"], use_cache=False).logits
    differences[folder.name] = float((logits - saved["logits"]).abs().max())
print(json.dumps(differences))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """The interpreter of an environment with the older transformers, which finds all else in this one."""
    folder = tmp_path_factory.mktemp("transformers4")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", f"transformers=={VERSION}"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"transformers {VERSION} can't be installed: {installed.stderr[-300:]}")
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "zz_ours.pth").write_text("\n".join(site.getsitepackages()))  # after its own packages
    return python


def write(folder, config):
    torch.manual_seed(0)
    model = build_model(ModelConfig(hf_config=config))
    for weight in model.parameters():
        if weight.dim() > 1:  # larger than at the start, so that wrong positions show
            torch.nn.init.normal_(weight.data, std=0.2)
    save_model(model, folder / "global_step1", model.state_dict())
    export(complete(folder / "global_step1"), folder / "out")
    with torch.no_grad():
        logits = model.eval().lm(TOKENS, use_cache=False).logits[..., :257].clone()
    torch.save({"tokens": TOKENS, "logits": logits}, folder / "logits.pt")


def test_exports_have_the_same_logits_in_transformers_4(older, tmp_path):
    for name, config in MODELS.items():
        write(tmp_path / name, config)
    read = subprocess.run([older, "-c", READ, tmp_path], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert read.returncode == 0, read.stderr
    found = json.loads(read.stdout.splitlines()[-1])
    assert found.pop("version") == VERSION != sys.modules["transformers"].__version__
    assert found.keys() == MODELS.keys()
    assert all(difference < 1e-5 for difference in found.values()), found
