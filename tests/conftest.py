"""The tiny corpus, the tiny run, and the real launcher."""

import contextlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from seqlen_curriculum.data.writer import CorpusWriter

ROOT = Path(__file__).parent.parent
settings.register_profile("untimed", deadline=None)  # a shared machine has its pauses
settings.load_profile("untimed")
# Compiled once a machine, outside the repository.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "seqlen-curriculum" / "torch_extensions"))
os.environ.setdefault("OMP_NUM_THREADS", "1")


def shared(name):
    """A file of the test data, which isn't part of the repository; the test is skipped without it."""
    folder = Path(os.environ.get("SEQLEN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / name).exists():
        pytest.skip(f"{name} is not here; SEQLEN_SHARED_DATA names the folder of the test data")
    return folder / name


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The prefix of a corpus of bytes: the sources of a few standard library modules, 256 as end of text."""
    prefix = tmp_path_factory.mktemp("corpus") / "bytes"
    modules = (json, socket, subprocess, textwrap, resource, signal, os)
    sources = [Path(module.__file__).read_bytes() for module in modules if str(module.__file__).endswith(".py")]
    with CorpusWriter(prefix, vocab_size=257) as writer:
        for source in sources * 2:
            writer.add_document([*source, 256])
    return prefix


@pytest.fixture(scope="session")
def tiny_run(corpus):
    """A run of 46 steps: lengths 8 to 32, two micro-batches a step, dropout, evaluations and checkpoints on the way."""
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


def launch_command(script, *args, ranks=1):
    """The command line of the real DeepSpeed launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", str(port), str(ROOT / script), *map(str, args)]


def start(command, log, **kwargs):
    """Start a command in a process group of its own, its output going to the file ``log``."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    options = {"stderr": subprocess.STDOUT, "env": environment, "start_new_session": True, "cwd": ROOT, **kwargs}
    with open(log, "w") as out:
        return subprocess.Popen(command, stdout=out, **options)


def wait_for_all(process, seconds=120):
    """Wait for a command and everything it started; after a signal the launcher ends before its ranks do."""
    process.wait(timeout=seconds)
    deadline = time.monotonic() + seconds
    while _group_is_alive(process.pid):
        assert time.monotonic() < deadline, f"process group {process.pid} is still alive"
        time.sleep(0.1)


def _group_is_alive(group):
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def launch(log, script, *args, ranks=1, seconds=300, **kwargs):
    """Run a script under the launcher to its end; (exit status, output)."""
    process = start(launch_command(script, *args, ranks=ranks), log, **kwargs)
    try:
        status = process.wait(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return status, Path(log).read_text()


@pytest.fixture(scope="session")
def evaluated_place(tmp_path_factory):
    """What the examples of evaluate.py name, with a small trained model."""
    from evaluated import make

    return make(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="session")
def evaluated_model(evaluated_place):
    from seqlen_curriculum.models.pretrained import load_model

    return load_model(evaluated_place.checkpoint)


@pytest.fixture
def evaluate_command(evaluated_place, monkeypatch, capsys):
    """Run evaluate.py in this process, in the folder that its examples are for; what it printed."""
    script = str(ROOT / "scripts" / "evaluate.py")

    def command(*arguments):
        monkeypatch.chdir(evaluated_place.folder)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return command


@pytest.fixture
def evaluate_error(evaluate_command, capsys):
    """The error of evaluate.py, which must end with status 1."""

    def command(*arguments):
        with pytest.raises(SystemExit) as end:
            evaluate_command(*arguments)
        assert end.value.code == 1
        return capsys.readouterr().err

    return command
