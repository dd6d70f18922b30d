"""Corrupted manifests, ledgers and run logs: every command reads the right data or raises one of our errors.

Reading all files of a folder takes at most 2 s of CPU time and 500 MB.
``bash scripts/test.sh -m slow tests/test_fuzzed_run_folders.py`` tries 5,000 files.
"""

import json
import math
import shutil

import pytest
from helpers.bounds import Bounds, check_message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqlen_curriculum.analysis.plot_data import packed, plot_data
from seqlen_curriculum.analysis.read_run import load_run
from seqlen_curriculum.analysis.report import report
from seqlen_curriculum.analysis.run import summarise
from seqlen_curriculum.analysis.tables import ReportTables
from seqlen_curriculum.config.equivalence import trains_identically
from seqlen_curriculum.errors import SeqlenCurriculumError
from seqlen_curriculum.export.huggingface import read_run_up_to
from seqlen_curriculum.export.model_card import ModelCard
from seqlen_curriculum.run_folder.checkpoint_manifest import checkpoint_folders, damage, differences, read_checkpoint
from seqlen_curriculum.run_folder.rollbacks import read_rollbacks
from seqlen_curriculum.run_folder.run_log import RunLog, losses, records_after

STEP = {"seqlen": 8, "rows": 2, "loss": 5.0, "lr": 0.01, "grad_norm": 1.0, "seconds": 0.1, "mfu": None}
RUN = {
    "train_batch_size": 2,
    "optimizer.type": "Adam",
    "optimizer.params.lr": 0.01,
    "curriculum_learning.enabled": True,
    "curriculum_learning.schedule_type": "fixed_linear",
    "curriculum_learning.min_difficulty": 8,
    "curriculum_learning.max_difficulty": 16,
    "curriculum_learning.schedule_config.total_curriculum_step": 4,
    "curriculum_learning.schedule_config.difficulty_step": 8,
    "data.seq_length": 16,
    "training.train_tokens": 128,
}
ROLLBACK = {"step": 3, "loss": 9.0, "ratio": 1.8, "seqlen": 8, "lr": 0.01, "returned_to": 1, "skipped": [2, 3]}
MANIFEST = {
    "step": 4,
    "data_ranks": 1,
    "zero_stage": 0,
    "zero": {"stage": 0},
    "run": RUN,
    "rollbacks": [ROLLBACK],
    "evaluations": {"least_loss": 4.5, "held": [4]},
    "files": {"states.pt": 3},
    "crc32": {"states.pt": 891568578},
}
LAUNCH = {"started": "2024-01-01T00:00:00+00:00", "ranks": 1, "first_step": 1, "versions": {"torch": "2.13.0"}}
DEVICE = {"accelerator": None, "cpu": "x", "cores": 2, "memory_bytes": 2**30}
CONTENTS = {
    "global_step4/complete.json": MANIFEST,
    "rollbacks.json": [ROLLBACK],
    "run.json": {"config": {"training": {"train_tokens": 128, "seed": 1}}, "launches": [{**LAUNCH, "device": DEVICE}]},
    "runlog.jsonl": [
        {"step": 1, "consumed_tokens": 16, **STEP},
        {"step": 2, "consumed_tokens": 32, "seqlen": 8, "rows": 2, "skipped": True},
        {"step": 3, "consumed_tokens": 48, **STEP},
        {"step": 3, "consumed_tokens": 48, "valid_loss": 4.5, "valid_ppl": 90.0, "seconds": 0.2},
        {"step": 4, "consumed_tokens": 64, **STEP},
    ],
}
NUMBERS = st.sampled_from([0, -1, 0.5, 1e308, 10**15, 2**63, 10**400, math.nan, math.inf, True, 5])
NAMES = st.sampled_from(["", "..", "a\0b", "../x", "/etc/passwd", "x" * 5000, "\ud800", "training", "é", "."])
VALUES = st.one_of(NUMBERS, NAMES, st.none(), st.builds(list), st.builds(dict), st.builds(lambda: {"a": {"b": [1]}}))


def places(value, path=()):
    """The paths to all values inside ``value``."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def corrupted(draw, name):
    """The bytes of the file ``name`` with another value, a key more or less, other bytes, or cut."""
    content = json.loads(json.dumps(CONTENTS[name]))
    for _ in range(draw(st.integers(0, 2))):
        *parents, key = draw(st.sampled_from(list(places(content))))
        target = content
        for parent in parents:
            target = target[parent]
        change = draw(st.sampled_from(["value", "remove", "add"]))
        if change == "value":
            target[key] = draw(VALUES)
        elif change == "remove":
            del target[key]
        elif isinstance(target, dict):
            target[draw(NAMES)] = draw(VALUES)
        if not list(places(content)):
            break
    as_lines = name.endswith(".jsonl")
    text = "".join(json.dumps(line) + "\n" for line in content) if as_lines else json.dumps(content)
    raw = bytearray(text.encode())
    for _ in range(draw(st.integers(0, 2)) if raw else 0):
        at, kind = draw(st.integers(0, len(raw) - 1)), draw(st.sampled_from(["byte", "cut", "deep", "digits"]))
        more = {"byte": bytes([draw(st.integers(0, 255))]), "cut": b"", "deep": b"[" * 5000, "digits": b"7" * 5000}[
            kind
        ]
        raw[at : len(raw) if kind == "cut" else at + 1] = more
        if not raw:
            break
    return bytes(raw)


def allowed(function, *arguments):
    """The result of ``function``, None after one of our errors."""
    try:
        return function(*arguments)
    except SeqlenCurriculumError as error:
        check_message(str(error))
        return None


def read_everything(save):
    """Read the folder as report, export and resume do."""
    run = allowed(load_run, save)
    if run is not None:
        json.dumps(report([run]), allow_nan=False).encode()
        summarise(run)
        tables = ReportTables(report([run]))
        for table in (tables.conditions, tables.launches, tables.shared_settings, tables.stability, tables.ends):
            table()
        packed(plot_data([run]))
    for folder in checkpoint_folders(save):
        checkpoint = allowed(read_checkpoint, folder)
        if checkpoint is not None:
            allowed(damage, checkpoint)
            trains_identically(checkpoint.run, {**RUN, "training.train_tokens": 160}, checkpoint.step)
            differences(checkpoint.run, RUN)
            run = allowed(read_run_up_to, checkpoint)
            card = ModelCard(
                "a", "GPT2LMHeadModel", "gpt2", 1, {}, "float32", False, checkpoint.step, checkpoint.run, run
            )
            card.markdown().encode()
    allowed(read_rollbacks, save)
    log = save / "runlog.jsonl"
    allowed(lambda: list(losses(log)))
    allowed(lambda: list(records_after(log, 2)))
    allowed(RunLog.rewind, log, 2)


def make_folder(save):
    (save / "global_step4").mkdir(parents=True)
    (save / "global_step4" / "states.pt").write_bytes(b"abc")
    for name, content in CONTENTS.items():
        as_lines = name.endswith(".jsonl")
        (save / name).write_text(
            "".join(json.dumps(line) + "\n" for line in content) if as_lines else json.dumps(content)
        )
    return save


def fuzz(tmp_path_factory, name, examples):
    innocent = make_folder(tmp_path_factory.mktemp("innocent") / "run")
    load_run(innocent)
    assert damage(read_checkpoint(innocent / "global_step4")) == ""
    save, bounds = tmp_path_factory.mktemp("fuzzed") / "run", Bounds()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(corrupted(name))
    def check(raw):
        shutil.rmtree(save, ignore_errors=True)
        shutil.copytree(innocent, save)
        (save / name).write_bytes(raw)
        with bounds.applied():
            read_everything(save)

    check()
    bounds.report({name: examples})


@pytest.mark.parametrize("name", CONTENTS)
def test_a_corrupted_file_is_read_or_refused(tmp_path_factory, name):
    fuzz(tmp_path_factory, name, 25)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTENTS)
def test_5000_corrupted_files_are_read_or_refused(tmp_path_factory, name):
    fuzz(tmp_path_factory, name, 1250)
