"""The examples of other trainers train on a corpus of the standard library's source, at the lengths of the run."""

import json
import math
import runpy
import textwrap
import unittest
from pathlib import Path

import pytest
from helpers.launching import ROOT

from seqlen_curriculum.data.preparation.prepare import Request, prepare
from seqlen_curriculum.data.tokenizer import TokenizerChoice
from seqlen_curriculum.integrations.plan import TrainerPlan


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The examples' file with a small corpus and a small budget."""
    folder = tmp_path_factory.mktemp("examples")
    sources = [Path(module.__file__) for module in (json, textwrap, runpy)] + [Path(unittest.__file__).parent]
    prepare(
        Request(
            output_prefix=str(folder / "stdlib"), tokenizer=TokenizerChoice(train_vocab=300), inputs=sources, workers=1
        )
    )
    settings = json.loads((ROOT / "examples" / "run.json").read_text())
    settings["data"]["train"], settings["training"]["train_tokens"] = [str(folder / "stdlib")], 20_000
    (folder / "run.json").write_text(json.dumps(settings))
    return folder / "run.json"


def example(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


@pytest.mark.parametrize(("name", "batch"), [("nanogpt_loop", 16), ("accelerate_loop", 8)])
def test_a_loop_of_ones_own(run, name, batch):
    if name == "accelerate_loop":
        pytest.importorskip("accelerate")
        from accelerate.state import GradientState

        GradientState._reset_state()  # a trainer of another test left its loader at the end of an epoch
    plan = TrainerPlan.of(run, global_batch=batch, max_lr=3e-3)
    history = example(name)(run)
    assert [seqlen for seqlen, _ in history] == [plan.seqlen(step) for step in range(1, plan.steps + 1)]
    assert history[-1][1] < history[0][1]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # a default of TRL's
@pytest.mark.parametrize("name", ["hf_trainer", "trl_sft"])
def test_a_trainer(run, name, tmp_path):
    pytest.importorskip({"hf_trainer": "accelerate", "trl_sft": "trl"}[name])
    trainer = example(name)(run, str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True)
    assert trainer.state.global_step == trainer.plan.steps
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")  # on workers
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # in Lightning
def test_a_lightning_module(run):
    pytest.importorskip("lightning")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer, warmup = example("lightning_module")(run, accelerator="cpu", **quiet)
    assert trainer.global_step == warmup.plan.steps
    assert warmup.seqlen == 64
    assert float(trainer.callback_metrics["valid_loss"]) < math.log(512) - 1


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_of_another_trainer_is_short(path):
    if "integrations" in path.read_text():
        assert len(path.read_text().splitlines()) < 60
