"""Runs that start from Hugging Face folders, on two ranks in one launch: they learn, resume and save such folders."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers.launching import forked, launch
from helpers.models import SHAPES
from helpers.runs import Runs
from helpers.runs import run as run_of
from transformers import AutoTokenizer

from seqlen_curriculum import RunConfig
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.data.tokenizer import TokenizerChoice, build_tokenizer
from seqlen_curriculum.models.pretrained import load_model
from seqlen_curriculum.run_folder.checkpoint_manifest import differences, read_checkpoint
from seqlen_curriculum.run_folder.run_log import read_run_log

RUNS = {  # name: (model, more settings, checkpoint to resume from)
    "gpt2": ("gpt2", ["zero_optimization.stage=1"], None),
    "gpt2-zero3": ("gpt2", ["zero_optimization.stage=3"], None),
    "gpt2-goes-on": ("gpt2/global_step18", ["optimizer.params.lr=1e-12", "scheduler.params.min_lr=0"], None),
    "llama": ("llama", ["training.variance_interval=0"], None),
    "llama-zero3": ("llama", ["zero_optimization.stage=3"], None),
    "llama-zero3-resumed": ("llama", ["zero_optimization.stage=3"], "llama-zero3/global_step9"),
    "llama-bf16": ("llama", ["zero_optimization.stage=2", "bf16.enabled=true"], None),
    "llama-rope": ("llama", ["zero_optimization.stage=1", "model.rope.theta=500"], None),
    "bloom-zero3": ("bloom", ["zero_optimization.stage=3", "model.max_position_embeddings=32"], None),
    "gpt2-tensor": ("gpt2", ["tensor_parallel.autotp_size=2", "zero_optimization.stage=1"], None),
    "gpt2-pipeline": ("gpt2", ["pipeline.stages=2", "zero_optimization.stage=1"], None),
}
FRESH = ("llama-1b", "qwen3-0.6b", "olmo2-1b", "neox-160m", "mistral-7b")
"""Shapes that are trained from their configuration alone, one of each architecture."""
# A run that began from another folder is named its own checkpoint.
REFUSED = ("llama-zero3/global_step18", ["zero_optimization.stage=3"], "llama-zero3/global_step9")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, tiny_run, corpus):
    """18 steps of 8 rows, checkpoints and evaluations at 9 and 18; a tokenizer lies beside the corpus."""
    folder = tmp_path_factory.mktemp("hf_runs")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", folder)
    tokenizer = build_tokenizer(TokenizerChoice(train_vocab=257), [])
    tokenizer.save(f"{folder / corpus.name}.tokenizer.json")
    run = json.loads(json.dumps(tiny_run))
    run["data"]["train"] = [str(folder / corpus.name)]
    del run["model"]
    run["training"] |= {"train_tokens": 2_528, "eval_interval": 9, "save_interval": 9, "keep_last": 9}
    run["training"]["variance_interval"] = 5
    run["train_micro_batch_size_per_gpu"] = 4  # one or two micro-batches per step on one rank, which is faster
    (folder / "run.json").write_text(json.dumps(run))
    return folder / "run.json"


@pytest.fixture(scope="module")
def trained(run_file, folders):
    """The folder of ``RUNS``, all trained by two ranks in one launch."""
    root = run_file.parent

    def run(name, model, sets, resume, **more):
        path = root / model if "/" in model else folders / model
        sets = [f"model.hf_checkpoint={path}", *sets]
        begins_with = [where.split("/")[0] for where in (model, resume or "") if "/" in where]
        needs = ["bf16"] if "bf16" in name else []
        resume = root / resume if resume else "auto"
        return run_of(run_file, root / name, sets, resume, needs, after=begins_with[0] if begins_with else None, **more)

    runs = Runs(root)
    refused = run("refused", *REFUSED, fails=True)
    fresh = [run_of(run_file, root / name, fresh_model(name)) for name in FRESH]
    # Last come those of other engines: DeepSpeed keeps their process groups in globals.
    runs.launch("all", [*fresh, *(run(name, *how) for name, how in RUNS.items()), refused], ranks=2)
    return runs


def fresh_model(name):
    return [f"model.hf_config={json.dumps(SHAPES[name])}"]


@pytest.fixture(scope="module")
def alone(run_file, tmp_path_factory):
    """Each of ``FRESH`` on one rank: whole, and from its checkpoint during the warmup."""
    runs = Runs(tmp_path_factory.mktemp("alone"))
    todo = []
    for name in FRESH:
        todo.append(run_of(run_file, runs.folder / name, fresh_model(name)))
        checkpoint = runs.folder / name / "global_step9"
        todo.append(run_of(run_file, runs.folder / f"{name}-resumed", fresh_model(name), checkpoint, after=name))
    other = [f"model.hf_config={json.dumps({**SHAPES['llama-1b'], 'rms_norm_eps': 0.1})}"]
    begun = runs.folder / "llama-1b" / "global_step9"
    todo.append(run_of(run_file, runs.folder / "other", other, begun, after="llama-1b", fails=True))
    runs.launch("one", todo, ranks=1)
    return runs


def test_another_configuration_is_refused_by_its_key(alone):
    message = (alone["other"] / "error").read_text()
    assert "\n  - model.hf_config.rms_norm_eps: 1e-05 in the checkpoint, 0.1 now" in message
    assert message.count("\n  - ") == 1


@pytest.mark.parametrize("name", FRESH)
def test_a_new_model_of_any_architecture_learns_and_resumes(trained, alone, run_file, name):
    found = losses(trained[name])
    assert found[0] == pytest.approx(math.log(384), abs=0.3)  # 257 words padded to 384
    assert found[-1] < found[0] - 0.5
    assert losses(alone[name]) == pytest.approx(found, rel=1e-4)
    lengths = [record["seqlen"] for record in read_run_log(alone[name] / "runlog.jsonl") if "loss" in record]
    assert lengths[9] < lengths[-1]  # during the warmup
    assert losses(alone[f"{name}-resumed"]) == losses(alone[name])[9:]
    assert losses(alone[f"{name}-resumed"], "valid_loss") == losses(alone[name], "valid_loss")[1:]
    recorded = json.loads((alone[name] / "run.json").read_text())["config"]["model"]
    assert recorded["hf_config"] == SHAPES[name]


def test_transformers_prints_nothing(trained):
    assert "[transformers]" not in trained.outputs["all"]


def losses(folder, kind="loss"):
    return [record[kind] for record in read_run_log(folder / "runlog.jsonl") if kind in record]


@pytest.mark.parametrize("name", RUNS)
def test_every_run_learns_and_saves_a_loadable_folder(trained, name):
    found = losses(trained[name])
    if not name.endswith(("resumed", "goes-on")):
        assert found[0] > 4.9  # ln(257) is 5.5
        assert found[-1] < found[0] - 0.5
    checkpoint = trained[name] / "global_step18"
    model, _, _ = RUNS[name]
    assert load_model(checkpoint).config.model_type == model.split("/")[0]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    assert tokenizer("ab").input_ids == [65, 66]
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (0, 32)  # the corpus's end, the model's positions
    assert json.loads((checkpoint / "config.json").read_text())["eos_token_id"] == 0
    written = json.loads((checkpoint / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows it


@pytest.mark.parametrize(
    ("one", "other", "rounding"),
    [
        ("gpt2", "gpt2-zero3", 1e-4),
        ("gpt2", "gpt2-tensor", 1e-4),
        ("gpt2", "gpt2-pipeline", 1e-4),
        ("llama", "llama-zero3", 1e-4),
        ("llama", "llama-bf16", 2e-2),
    ],
)
def test_the_engines_agree(trained, one, other, rounding):
    assert losses(trained[other]) == pytest.approx(losses(trained[one]), rel=rounding)
    assert losses(trained[other], "valid_loss") == pytest.approx(losses(trained[one], "valid_loss"), rel=rounding)


def test_a_run_resumes_to_the_last_bit(trained):
    whole, resumed = trained["llama-zero3"], trained["llama-zero3-resumed"]
    assert losses(resumed) == losses(whole)[9:]
    assert losses(resumed, "valid_loss") == losses(whole, "valid_loss")[1:]
    assert losses(resumed, "variance_norm") == losses(whole, "variance_norm")[1:]


def test_a_checkpoint_continues_with_the_loss_it_had(trained):
    # At a rate of 1e-12 the evaluation at step 9 is that of the weights it began with.
    (ended,) = losses(trained["gpt2"], "valid_loss")[1:]
    assert losses(trained["gpt2-goes-on"], "valid_loss") == pytest.approx([ended, ended], rel=1e-5)


def saved_loss(folder, config):
    """The validation loss by transformers alone, in the saved precision."""
    _, valid = open_run_data(config)
    tokens = torch.from_numpy(valid.read(np.arange(5) * valid.num_samples // 5, 32)).long()
    with torch.no_grad():
        logits = load_model(folder, dtype=None)(tokens[:, :-1]).logits.float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


# In bf16 too, where rotary positions would be others if the engine rounded their frequencies. There a CPU rounds the loss of
# each token: losses near 4 are multiples of 2^-6, and the mean of 160 of them is off by up to about 1e-3.
@pytest.mark.parametrize(
    ("name", "rounding"), [("llama-zero3", 1e-5), ("bloom-zero3", 1e-5), ("llama-bf16", 5e-4), ("llama-rope", 1e-5)]
)
def test_the_saved_weights_have_the_evaluated_loss(trained, run_file, folders, name, rounding):
    sets = [f"model.hf_checkpoint={folders / name.split('-')[0]}", "model.max_position_embeddings=32"]
    loss = saved_loss(trained[name] / "global_step18", RunConfig.load(run_file, sets))
    assert loss == pytest.approx(losses(trained[name], "valid_loss")[1], rel=rounding)


def test_a_changed_base_of_rope_is_trained_and_saved(trained):
    config = json.loads((trained["llama-rope"] / "global_step18" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 500
    assert 0 < abs(losses(trained["llama-rope"])[-1] - losses(trained["llama"])[-1]) < 0.5


def test_the_flag_continues_on_one_rank(trained, run_file, folders, tmp_path):
    """Another number of ranks and another ZeRO stage, by the command."""
    shutil.copytree(trained["llama-zero3"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "global_step18")
    arguments = ["--config", run_file, "--hf-checkpoint", folders / "llama", "--save", tmp_path / "run"]
    status, output = launch(tmp_path / "log", "scripts/train_gpt2.py", *arguments, launcher=forked)
    assert status == 0, output
    assert losses(tmp_path / "run") == pytest.approx(losses(trained["llama-zero3"]), rel=1e-4)


def test_another_start_is_refused_by_name(trained, run_file, folders):
    message = (trained["refused"] / "error").read_text()
    (line,) = [line for line in message.splitlines() if "model.initial_weights" in line]
    assert "now; set model.hf_checkpoint to the folder that the run started from, with unchanged files" in line
    saved = read_checkpoint(trained["llama-zero3"] / "global_step9").run
    other = RunConfig.load(run_file, [f"model.hf_checkpoint={folders / 'neox'}"]).settings()
    model = {key: value for key, value in saved.items() if key in other}
    assert [line.partition(":")[0] for line in differences(model, other)] == ["model.initial_weights"]
