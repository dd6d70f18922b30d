"""Fixtures: capabilities and environment of the machine, a tiny corpus, a tiny run, small models, and evaluate.py."""

import contextlib
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import capabilities
from helpers.launching import ROOT, remove_stale_locks, slowness
from helpers.order import longest_first
from hypothesis import settings

from seqlen_curriculum.data.writer import CorpusWriter

# A shared machine may pause. What is drawn depends on the test alone: the suite passes or fails for everybody.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile("fixed")
capabilities.set_up_environment()
resources = contextlib.ExitStack()


def pytest_configure(config):
    """Probe capabilities and speed of the machine once. Workers of xdist inherit the controller's results."""
    if hasattr(config, "workerinput"):
        return
    config.option.loadscopereorder = False  # xdist's own order is by the number of tests
    try:
        without = capabilities.disabled()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    remove_stale_locks()
    resources.enter_context(capabilities.hidden_commands(without))
    slowness()
    if config.getoption("numprocesses", None):
        capabilities.ask_all()


def pytest_collection_modifyitems(items):
    items[:] = longest_first(items)


def pytest_unconfigure():
    resources.close()


def pytest_runtest_setup(item):
    for mark in item.iter_markers("needs"):
        capabilities.require(*mark.args)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Return the prefix of a corpus of bytes: sources of a few standard library modules, with 256 as end of text."""
    prefix = tmp_path_factory.mktemp("corpus") / "bytes"
    modules = (json, socket, subprocess, textwrap, resource, signal, os)
    sources = [Path(module.__file__).read_bytes() for module in modules if str(module.__file__).endswith(".py")]
    with CorpusWriter(prefix, vocab_size=257) as writer:
        for source in sources * 2:
            writer.add_document([*source, 256])
    return prefix


@pytest.fixture(scope="session")
def tiny_run(corpus):
    """Return a run of 46 steps: lengths 8 to 32, two micro-batches per step, dropout, evaluations and checkpoints."""
    return {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 5e-3, "betas": [0.9, 0.95], "torch_adam": True}},
        "gradient_clipping": 1.0,
        "curriculum_learning": {
            "enabled": True,
            "curriculum_type": "seqlen",
            "min_difficulty": 8,
            "max_difficulty": 32,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": 20, "difficulty_step": 4},
        },
        "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 5, "min_lr": 1e-4}},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "vocab_size": 257,
            "dropout": 0.1,
        },
        "data": {"train": [str(corpus)], "seq_length": 32, "split": "8,1,1"},
        "training": {
            "train_tokens": 9_500,
            "eval_interval": 7,
            "eval_rows": 5,
            "save_interval": 6,
            "keep_last": 2,
            "log_sample_ids": True,
        },
    }


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return the folder of a small random model of each kind, saved by transformers; tests change only copies of them."""
    from helpers.models import make_models

    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def llama(folders, tmp_path):
    """Return a copy of the Llama in ``folders``, which a test may change."""
    return shutil.copytree(folders / "llama", tmp_path / "llama")


@pytest.fixture(scope="session")
def evaluated_place(tmp_path_factory):
    """Return the folder with the files of evaluate.py's examples, and a small trained model."""
    from helpers.evaluated import make

    return make(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="session")
def evaluated_model(evaluated_place):
    from seqlen_curriculum.models.pretrained import load_model

    return load_model(evaluated_place.checkpoint)


@pytest.fixture
def evaluate_command(evaluated_place, monkeypatch, capsys):
    """Return a function that runs evaluate.py in this process, in the folder of its examples, and returns its output."""
    script = str(ROOT / "scripts" / "evaluate.py")

    def command(*arguments):
        monkeypatch.chdir(evaluated_place.folder)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return command


@pytest.fixture
def evaluate_error(evaluate_command, capsys):
    """Return a function that returns the error of evaluate.py, which must exit with status 1."""

    def command(*arguments):
        with pytest.raises(SystemExit) as end:
            evaluate_command(*arguments)
        assert end.value.code == 1
        return capsys.readouterr().err

    return command
