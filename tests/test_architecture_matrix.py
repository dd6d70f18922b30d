"""Every architecture on every engine: losses of a plain training loop, clipping, resumes mid-warmup, exports.

All runs on two ranks are one launch. The plain loop, without DeepSpeed, is in this process. The product of architectures,
engines and precisions is a soak test.
"""

import functools
import json

import pytest
import torch
from helpers.runs import ENGINES, Runs, records, run
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from seqlen_curriculum import RunConfig
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.models.attention import set_window
from seqlen_curriculum.models.causal_lm import build_model
from seqlen_curriculum.models.pretrained import load_model, quiet

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SIZES |= {"vocab_size": 257, "max_position_embeddings": 32, "bos_token_id": 256, "eos_token_id": 256}
GROUPED = {**SIZES, "num_key_value_heads": 2}
ALTERNATING = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(sliding_window=6, **GROUPED),
    "qwen2": Qwen2Config(tie_word_embeddings=True, **GROUPED),
    # Three layers for two stages, the types of which alternate, and heads wider than the model divided by them.
    "qwen3": Qwen3Config(
        **{**GROUPED, "num_hidden_layers": 3}, **ALTERNATING, sliding_window=6, head_dim=32, tie_word_embeddings=True
    ),
    "neox": GPTNeoXConfig(**SIZES),
    "olmo2": Olmo2Config(pad_token_id=None, **GROUPED),
}
OTHERS = {
    "cohere": CohereConfig(pad_token_id=None, **GROUPED),
    "gemma3": Gemma3TextConfig(head_dim=16, sliding_window=6, layer_types=ALTERNATING["layer_types"][:2], **GROUPED),
    "granite": GraniteConfig(logits_scaling=4.0, **GROUPED),
    "olmo3": Olmo3Config(pad_token_id=None, sliding_window=6, **GROUPED),
    "phi": PhiConfig(**SIZES),
    "starcoder2": Starcoder2Config(sliding_window=6, **GROUPED),
}
"""Trained by the soak test only."""
WINDOW = [
    'curriculum_learning.method="window"',
    "curriculum_learning.restart_positions=true",
    "training.train_tokens=2048",
]
CELLS = {
    *((name, "ulysses", "fp32") for name in ("llama", "qwen3")),
    *((name, "tensor", "fp32") for name in ("neox", "olmo2", "qwen3")),
    *((name, "pipeline", "fp32") for name in ("llama", "neox", "qwen3")),
    ("olmo2", "tensor", "bf16"),
    ("mistral", "ulysses", "window"),
    ("qwen3", "tensor", "window"),
    ("neox", "pipeline", "window"),
}
RESUMED = {("olmo2", "tensor", "fp32"), ("qwen3", "pipeline", "fp32")}
PRODUCT = {
    (name, engine, precision)
    for name in CONFIGS
    for engine in ENGINES
    for precision in ("fp32", "bf16")
    if precision == "fp32" or engine not in ("pipeline", "tensor_zero0")
}
PRODUCT |= {(name, engine, "fp32") for name in OTHERS for engine in ("ulysses", "tensor", "pipeline")}
RESUMED_IN_ALL = ("olmo2", "qwen3")
SOAK = {cell for cell in PRODUCT - RESUMED if cell not in CELLS or cell[0] in RESUMED_IN_ALL}
PRECISIONS = {"fp32": [], "bf16": ["bf16.enabled=true"], "window": WINDOW}
MID_WARMUP = 4


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, tiny_run):
    """8 steps, in which the length goes from 8 to 32; gradients are clipped from the first one on."""
    folder = tmp_path_factory.mktemp("architectures")
    for name, config in {**CONFIGS, **OTHERS}.items():
        torch.manual_seed(0)
        with quiet():
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"{name}-initial")
    run = json.loads(json.dumps(tiny_run))
    run["curriculum_learning"]["schedule_config"] = {"total_curriculum_step": 7, "difficulty_step": 4}
    run["optimizer"]["params"]["lr"] = 3e-4  # a higher rate amplifies rounding
    run["training"] |= {
        "train_tokens": 1_280,
        "eval_interval": 8,
        "save_interval": 8,
        "keep_last": 9,
        "preflight": False,
    }
    run["train_micro_batch_size_per_gpu"] = 4
    run["gradient_clipping"] = 0.1
    del run["model"]
    (folder / "run.json").write_text(json.dumps(run))
    return folder / "run.json"


def settings_of(run_file, name, precision="fp32"):
    return [f"model.hf_checkpoint={run_file.parent / name}-initial", *PRECISIONS[precision]]


def launch(run_file, launch_name, cells, resumed):
    """Train ``cells``, and train those in ``resumed`` again from their own checkpoints."""
    folder, parts = run_file.parent / launch_name, []
    folder.mkdir()
    runs = Runs(folder)
    # After tensor parallel and pipelines no other engine can follow in a process: ENGINES has them last.
    for cell in sorted(cells, key=lambda cell: (list(ENGINES).index(cell[1]), cell)):
        name, engine, precision = cell
        own, needs = "-".join(cell), [precision] if precision == "bf16" else []
        sets = [*settings_of(run_file, name, precision), *ENGINES[engine]]
        sets += [f"training.save_interval={MID_WARMUP}"] if cell in resumed else []
        parts.append(run(run_file, folder / own, sets, needs=needs))
        if cell in resumed:
            saved = folder / own / f"global_step{MID_WARMUP}"
            parts.append(run(run_file, folder / f"{own}-resumed", sets, saved, needs, after=own))
    runs.launch(launch_name, parts, ranks=2)
    return runs


@pytest.fixture(scope="module")
def matrix(run_file):
    return launch(run_file, "cells", CELLS, RESUMED)


@pytest.fixture(scope="module")
def product(run_file):
    """Return the runs of a precision in ``SOAK``, one launch each, those of two architectures also resumed."""

    @functools.cache
    def launched(precision):
        cells = {cell for cell in SOAK if cell[2] == precision}
        return launch(run_file, precision, cells, {cell for cell in cells if cell[0] in RESUMED_IN_ALL})

    return launched


_plain = {}


def plain(run_file, name, precision):
    """(losses, gradient norms) of the run by torch alone in fp32, in one process and with one batch per step."""
    windows = precision == "window"
    if (name, windows) not in _plain:
        config = RunConfig.load(run_file, settings_of(run_file, name, precision))
        train, _ = open_run_data(config)
        model, rate = build_model(config.model).train(), config.plan.learning_rate(3e-4)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0)
        losses, norms = [], []
        for step in range(1, config.plan.steps + 1):
            inputs, targets = (torch.from_numpy(part).long() for part in train.read(step))
            if windows:
                set_window(model, config.plan.timeline.seqlen(step), restart_positions=True)
            loss = model(inputs, targets)
            loss.backward()
            losses.append(loss.item())
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.step()
            optimizer.zero_grad()
        _plain[name, windows] = losses, norms
    return _plain[name, windows]


def check_training(runs, run_file, cell):
    name, _, precision = cell
    steps, _ = records(runs["-".join(cell)])
    losses, norms = plain(run_file, name, precision)
    assert len(losses) == 8
    assert [record["loss"] for record in steps] == pytest.approx(losses, rel=2e-2 if precision == "bf16" else 1e-5)
    assert min(norms) > 0.1  # all were clipped
    assert len({record["seqlen"] for record in steps}) >= 6
    if precision != "bf16":
        assert [record["grad_norm"] for record in steps] == pytest.approx(norms, rel=1e-4)


def check_resume(runs, cell):
    resumed, whole = (records(runs[f"{'-'.join(cell)}{kind}"]) for kind in ("-resumed", ""))
    assert list(resumed) == [[record for record in part if record["step"] > MID_WARMUP] for part in whole]


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def shapes(folder):
    return {name: tensor.shape for name, tensor in tensors(folder).items()}


def check_export(runs, run_file, cell):
    name, _, precision = cell
    run = runs["-".join(cell)]
    assert shapes(run / "global_step8") == shapes(run_file.parent / f"{name}-initial")
    _, valid = open_run_data(RunConfig.load(run_file, settings_of(run_file, name)))
    tokens = torch.from_numpy(valid.read(torch.arange(5).numpy() * valid.num_samples // 5, 32)).long()
    with torch.no_grad():
        logits = load_model(run / "global_step8")(tokens[:, :-1]).logits
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    assert loss == pytest.approx(records(run)[1][-1]["valid_loss"], rel=1e-3 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("cell", sorted(CELLS), ids="-".join)
def test_trains_as_a_plain_loop(matrix, run_file, cell):
    check_training(matrix, run_file, cell)


@pytest.mark.parametrize("cell", sorted(RESUMED), ids="-".join)
def test_resumes_during_the_warmup(matrix, cell):
    check_resume(matrix, cell)


@pytest.mark.parametrize("cell", sorted(CELLS), ids="-".join)
def test_leaves_the_folder_of_transformers(matrix, run_file, cell):
    check_export(matrix, run_file, cell)


@pytest.mark.parametrize("name", ["neox", "qwen3"])
def test_a_pipeline_leaves_the_same_configuration(matrix, name):
    plain, pipeline = (matrix[f"{name}-{engine}-fp32"] / "global_step8" for engine in ("tensor", "pipeline"))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((pipeline / file).read_text()) == json.loads((plain / file).read_text())


@pytest.mark.parametrize("cell", sorted(cell for cell in CELLS if cell[1] == "tensor"), ids="-".join)
def test_what_tensor_ranks_replicate_stays_equal(matrix, cell):
    files = (matrix["-".join(cell)] / "global_step8").glob("mp_rank_0?_model_states.pt")
    first, second = (torch.load(file, weights_only=False)["module"] for file in sorted(files))
    whole = shapes(matrix["-".join(cell)] / "global_step8")
    replicated = [name for name in first if first[name].shape == whole.get(name.removeprefix("lm."))]
    assert any("norm" in name for name in replicated)
    assert all(torch.equal(first[name], second[name]) for name in replicated)
    assert len(replicated) < len(first)


@pytest.mark.slow
@pytest.mark.parametrize("cell", sorted(SOAK), ids="-".join)
def test_the_product_of_architectures_engines_and_precisions(product, run_file, cell):
    runs = product(cell[2])
    check_training(runs, run_file, cell)
    check_export(runs, run_file, cell)
    if cell[0] in RESUMED_IN_ALL:
        check_resume(runs, cell)
