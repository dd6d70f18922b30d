"""Complete training runs, many in one launch, and comparisons of their files with the expected ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.capabilities import require_launches
from helpers.launching import running
from helpers.parts import Part, Results, do_parts, launch_parts
from seqlen_curriculum import RunConfig
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.errors import SeqlenCurriculumError
from seqlen_curriculum.run_folder.run_log import MACHINE_KEYS, read_run_log

TRAIN = "scripts/train_gpt2.py"
ENGINES = {
    "zero0": [],
    "zero1": ["zero_optimization.stage=1"],
    "zero2": ["zero_optimization.stage=2"],
    "zero3": ["zero_optimization.stage=3"],
    # With torch's Adam: DeepSpeed's CPU Adam takes minutes to compile.
    "offload": [
        "zero_optimization.stage=2",
        'zero_optimization.offload_optimizer={"device": "cpu"}',
        "zero_force_ds_cpu_optimizer=false",
    ],
    "checkpointing": ["zero_optimization.stage=1", "model.activation_checkpointing=true"],
    "ulysses": ["sequence_parallel_size=2", "zero_optimization.stage=1"],
    # DeepSpeed keeps the process groups of these engines in globals, so no other engine can follow in the same process.
    "tensor_zero0": ["tensor_parallel.autotp_size=2"],
    "tensor": ["tensor_parallel.autotp_size=2", "zero_optimization.stage=1"],
    "tensor_zero3": ["tensor_parallel.autotp_size=2", "zero_optimization.stage=3"],
    "pipeline": ["pipeline.stages=2"],
    "pipeline_zero1": ["pipeline.stages=2", "zero_optimization.stage=1"],
}


class Runs:
    """The folders of runs in shared launches. Reading one that failed or was skipped fails or skips the test."""

    def __init__(self, folder):
        self.folder = folder
        self.results = Results()
        self.outputs = {}
        """Return the output of the launch with that name."""

    def launch(self, name, runs, ranks):
        """Execute all ``runs``, each made by ``run``, in one launch."""
        folder = self.folder / f"launch-{name}"
        folder.mkdir()
        before = len(self.results.output)
        launch_parts(folder, __file__, runs, ranks, self.results)
        self.outputs[name] = self.results.output[before:]

    def __getitem__(self, run):
        _ = self.results[run]
        return self.folder / run


def run(config, save, sets=(), resume="auto", needs=(), after=None, **more):
    """Return a run for ``Runs.launch``: a file, a new folder, changed settings, and the checkpoint to resume from.

    more: ``until_step`` is the last step to train. ``fails`` marks a run that ends with an error, whose message is written
    to the file ``error`` in its folder. ``begins_as_copy_of`` names another run's folder. ``no_compiler`` hides the compiler
    from torch. ``sigterm_at`` is a file: once it exists, each rank gets a SIGTERM. ``measures`` writes the record of
    ``slw benchmark documents`` to ``record.json`` instead of training.
    """
    save = Path(save)
    arguments = {"config": str(config), "sets": list(sets), "save": str(save), "resume": resume and str(resume), **more}
    return Part(save.name, arguments, tuple(needs), after)


def do_run(
    config,
    sets,
    save,
    resume,
    until_step=None,
    fails=False,
    begins_as_copy_of=None,
    no_compiler=False,
    sigterm_at=None,
    measures=False,
):
    import torch
    import torch._inductor.config

    from seqlen_curriculum.training.pretrain import pretrain

    config = RunConfig.load(config, sets, require=("optimizer", "model", "data", "training"))
    save = Path(save)
    save.mkdir(parents=True, exist_ok=True)
    if begins_as_copy_of and torch.distributed.get_rank() == 0:
        shutil.copytree(begins_as_copy_of, save, dirs_exist_ok=True)
    torch.distributed.barrier()
    if measures:
        from seqlen_curriculum.training.document_benchmark import measure_documents

        (save / "record.json").write_text(json.dumps(measure_documents(config, save, steps=2, rounds=1)))
        return
    compilers = torch._inductor.config.cpp.cxx
    if no_compiler:
        torch._inductor.config.cpp.cxx = ("nowhere/g++",)
    torch._dynamo.utils.counters.clear()
    if sigterm_at:
        _sigterm_once(Path(sigterm_at))
    try:
        pretrain(config, *open_run_data(config), save, resume, until_step)
    except SeqlenCurriculumError as error:
        if not fails:
            raise
        (save / "error").write_text(str(error))
    finally:
        torch._inductor.config.cpp.cxx = compilers
        if torch.are_deterministic_algorithms_enabled():
            (save / "deterministic").touch()
            torch.use_deterministic_algorithms(False)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    (save / "graphs.json").write_text(json.dumps(graphs and graphs - 1))  # one is the compiler check


def _sigterm_once(path):
    def wait():
        while not path.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def without_machine(record):
    return {name: value for name, value in record.items() if name not in MACHINE_KEYS}


def records(save):
    """Return (training records, evaluation records) of a run, without the keys that depend on the machine."""
    both = [without_machine(record) for record in read_run_log(save / "runlog.jsonl")]
    return [r for r in both if "loss" in r], [r for r in both if "valid_loss" in r]


def samples_by_step(save):
    """Return (source, epoch, number) of the samples of each step, in their order over the ranks."""
    read = [record for path in save.glob("samples.rank*.jsonl") for record in read_run_log(path)]
    steps = {}
    for record in sorted(read, key=lambda record: (record["step"], record["first_sample"])):
        steps.setdefault(record["step"], []).extend(map(tuple, record["samples"]))
    return steps


def planned_samples(feed):
    """Return the expected result of ``samples_by_step``."""
    steps = range(1, feed.timeline.steps + 1)
    return {step: list(zip(*np.stack(feed.sample_ids(step)).tolist(), strict=True)) for step in steps}


def assert_same_run(save, reference, loss_tolerance=0.0):
    """Assert that two logs are bit-identical, or equal to ``loss_tolerance`` where sums over ranks are rounded."""
    for ours, theirs in zip(records(save), records(reference), strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                rounded = loss_tolerance if name.endswith(("loss", "_ppl", "_norm", "_max")) else 0.0
                assert value == pytest.approx(other[name], rel=rounded, abs=0.0), (one, other)
    assert samples_by_step(save) == samples_by_step(reference)


def hugging_face_loss(folder, config):
    """Return the validation loss of a checkpoint, computed by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    _, valid = open_run_data(config)
    tokens = torch.from_numpy(valid.read(np.arange(5) * valid.num_samples // 5, 32)).long()
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def has_reached(save, step):
    return (save / "runlog.jsonl").exists() and any(r["step"] >= step for r in read_run_log(save / "runlog.jsonl"))


def run_and_kill(command, log, due):
    """Train until ``due()``, then kill all processes with SIGKILL. Return False if the run ended before."""
    require_launches()
    with running(command, log) as process:
        while process.poll() is None:
            if due():
                return True
            time.sleep(0.002)
    return False


if __name__ == "__main__":
    import deepspeed
    import torch

    deepspeed.init_distributed()
    do_parts(do_run)
    torch.distributed.destroy_process_group()
