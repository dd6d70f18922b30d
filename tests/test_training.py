"""Whole runs, one of them under the real launcher: the log is the plan, and nothing a run can suffer changes it."""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from helpers import launchers
from helpers.launching import ROOT, TESTS, forked, launch, launch_command, running, wait_for_all, wait_until
from helpers.monitors import tensorboard_scalars, wandb_axes, wandb_history
from helpers.runs import (
    TRAIN,
    Runs,
    assert_same_run,
    has_reached,
    hugging_face_loss,
    planned_samples,
    records,
    run,
    run_and_kill,
    samples_by_step,
)

from seqlen_curriculum import RunConfig, Timeline
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.errors import DIVERGED
from seqlen_curriculum.evaluation.by_position import loss_by_position, mean_loss
from seqlen_curriculum.run_folder.run_log import MACHINE_KEYS, read_run_log


@pytest.fixture(scope="session")
def tiny_run(tiny_run):
    """The tiny run in half as many micro-batches, which are faster: one or two per step on one rank."""
    return {**tiny_run, "train_micro_batch_size_per_gpu": 4}


@pytest.fixture(scope="session")
def run_file(tmp_path_factory, tiny_run):
    path = tmp_path_factory.mktemp("configs") / "run.json"
    path.write_text(json.dumps(tiny_run))
    return path


@pytest.fixture(scope="session")
def reference(tmp_path_factory, run_file):
    """An uninterrupted run on one rank, with DeepSpeed's CSV monitor on."""
    folder = tmp_path_factory.mktemp("reference")
    monitor = json.dumps({"enabled": True, "output_path": str(folder / "csv"), "job_name": "tiny"})
    arguments = ("--config", run_file, "--save", folder / "run", "--set", f"csv_monitor={monitor}")
    status, output = launch(folder / "log", TRAIN, *arguments, launcher=forked)
    assert status == 0, output
    return folder / "run"


@pytest.fixture(scope="session")
def fixed_file(tmp_path_factory, tiny_run):
    """The run with micro-batches of the same rows whatever the number of ranks: dropout then draws the same masks."""
    path = tmp_path_factory.mktemp("configs") / "fixed.json"
    path.write_text(json.dumps({**tiny_run, "training": {**tiny_run["training"], "micro_batch": "fixed"}}))
    return path


@pytest.fixture(scope="session")
def one_rank(reference, run_file, fixed_file, tmp_path_factory):
    """Further runs on one rank, in one launch: uninterrupted, from elsewhere, refused, and with TensorBoard and W&B."""
    folder = tmp_path_factory.mktemp("one")
    first, last = checkpoints_of(reference)
    damaged = shutil.copytree(reference, folder / "damaged")
    states = damaged / last / "mp_rank_00_model_states.pt"
    states.write_bytes(bytes(states.stat().st_size))
    manifest = json.loads((damaged / last / "complete.json").read_text())
    old = {key: value for key, value in manifest.items() if "crc32" not in key}  # as an earlier version wrote it
    (damaged / last / "complete.json").write_text(json.dumps(old))
    other = ["training.seed=7", "optimizer.params.lr=0.1"]
    events = json.dumps({"enabled": True, "output_path": str(folder / "tensorboard"), "job_name": "tiny"})
    monitored = [f"tensorboard={events}", 'wandb={"enabled": true, "project": "tiny"}']
    runs = Runs(folder)
    parts = [
        run(fixed_file, folder / "fixed"),
        run(run_file, folder / "elsewhere", resume=reference / first),
        run(run_file, damaged, fails=True),
        run(run_file, folder / "other", other, begins_as_copy_of=str(reference), fails=True),
        run(run_file, folder / "again", resume="none", begins_as_copy_of=str(reference), fails=True),
        run(run_file, folder / "monitored", monitored, needs=("tensorboard", "wandb")),
    ]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_MODE", "offline")
        environment.setenv("WANDB_DIR", str(folder))
        runs.launch("one", parts, ranks=1)
    return runs


@pytest.fixture
def fixed_reference(one_rank):
    return one_rank["fixed"]


def checkpoints_of(save):
    """Names of its checkpoints, by their steps."""
    return sorted(
        (path.name for path in save.glob("global_step*")), key=lambda name: int(name.removeprefix("global_step"))
    )


def test_every_step_is_the_planned_one(reference, tiny_run):
    config = RunConfig.from_dict(tiny_run)
    timeline = config.timeline()
    rate = config.plan.learning_rate()
    steps, evaluations = records(reference)
    assert [
        {name: record[name] for name in ("step", "seqlen", "rows", "consumed_tokens", "lr")} for record in steps
    ] == [
        {
            "step": step,
            "seqlen": timeline.seqlen(step),
            "rows": 8,
            "consumed_tokens": timeline.consumed_tokens(step),
            "lr": rate(step),
        }
        for step in range(1, timeline.steps + 1)
    ]
    assert steps[0]["seqlen"] == 8
    assert steps[-1]["lr"] == 1e-4
    assert all(record["grad_norm"] > 0 for record in steps)
    assert [record["step"] for record in evaluations] == [*range(7, timeline.steps, 7), timeline.steps]
    assert [record["consumed_tokens"] for record in evaluations] == [
        timeline.consumed_tokens(record["step"]) for record in evaluations
    ]


def test_it_learns(reference):
    _, evaluations = records(reference)
    assert evaluations[-1]["valid_loss"] < evaluations[0]["valid_loss"] - 0.5
    assert evaluations[-1]["valid_ppl"] == math.exp(evaluations[-1]["valid_loss"])


def test_reads_the_samples_that_the_arithmetic_names(reference, tiny_run):
    config = RunConfig.from_dict(tiny_run)
    train, _ = open_run_data(config)
    assert samples_by_step(reference) == planned_samples(train)


def test_keeps_the_last_checkpoints_and_they_are_hugging_face_folders(reference, tiny_run):
    steps, evaluations = records(reference)
    last = len(steps)
    assert sorted(path.name for path in reference.glob("global_step*")) == [
        f"global_step{last // 6 * 6}",
        f"global_step{last}",
    ]
    assert (reference / "latest").read_text() == f"global_step{last}"
    loss = hugging_face_loss(reference / f"global_step{last}", RunConfig.from_dict(tiny_run))
    assert loss == pytest.approx(evaluations[-1]["valid_loss"], rel=1e-6)
    by_position = loss_by_position(reference, RunConfig.load(reference))
    assert list(by_position) == ["1-8", "9-32"]
    assert mean_loss(by_position) == pytest.approx(evaluations[-1]["valid_loss"], rel=1e-6)


def test_the_monitor_has_values_against_steps_and_against_tokens(reference):
    files = {path.stem: path.read_text().splitlines() for path in (reference.parent / "csv" / "tiny").glob("*.csv")}
    by_steps, by_tokens = files["Train_loss"], files["Train-by-tokens_loss"]
    first, second = (int(line.split(",")[0]) for line in by_tokens[1:3])
    steps, _ = records(reference)
    assert [first, second] == [record["consumed_tokens"] for record in steps[:2]]
    assert int(by_steps[2].split(",")[0]) == 2
    assert len(by_steps) == len(by_tokens) == len(steps) + 1


def test_records_have_what_the_machine_did(reference):
    steps = [record for record in read_run_log(reference / "runlog.jsonl") if "loss" in record]
    for record in steps:
        assert record["mfu"] is None  # the peak speed of a CPU is not known
        assert record["peak_memory_bytes"] > 2**27
        # After steps 6, 12, ... a checkpoint was written.
        assert ("checkpoint_seconds" in record) == (record["step"] % 6 == 1 and record["step"] > 1)
        assert all(record.get(key, 0) >= 0 for key in set(MACHINE_KEYS) - {"mfu"})


MONITORED = {"Train": "loss", "Valid": "valid_loss"}
"""A value that every record of the group has, and no other."""


def monitored_values(save, group):
    """(step, consumed tokens, the values that monitors get) of the records in the run log."""
    places = ("step", "consumed_tokens", "rows")
    for record in read_run_log(save / "runlog.jsonl"):
        if MONITORED[group] in record:
            values = {name: value for name, value in record.items() if name not in places and value is not None}
            if group == "Valid":
                del values["seconds"]
            yield record["step"], record["consumed_tokens"], values


@pytest.mark.parametrize("group", MONITORED)
def test_wandb_has_the_values_of_every_step_on_both_axes(one_rank, group):
    rows = [row for row in wandb_history(one_rank.folder) if f"{group}/{MONITORED[group]}" in row]
    logged = list(monitored_values(one_rank["monitored"], group))
    assert len(rows) == len(logged)
    for row, (step, tokens, values) in zip(rows, logged, strict=True):
        ours = {name: value for name, value in row.items() if not name.startswith(("_", "Train/Samples/"))}
        named = {f"{kind}/{name}": value for kind in (group, f"{group}-by-tokens") for name, value in values.items()}
        assert ours == {**named, "step": step, "consumed_tokens": tokens}
    axes = wandb_axes(one_rank.folder)
    assert (axes[f"{group}/*"], axes[f"{group}-by-tokens/*"]) == ("step", "consumed_tokens")


@pytest.mark.parametrize("group", MONITORED)
def test_tensorboard_has_the_values_of_every_step_on_both_axes(one_rank, group):
    logged = list(monitored_values(one_rank["monitored"], group))
    scalars = tensorboard_scalars(one_rank.folder / "tensorboard" / "tiny")
    wanted = {}
    for step, tokens, values in logged:
        for name, value in values.items():
            single = float(np.float32(value))  # what an event holds
            wanted.setdefault(f"{group}/{name}", []).append((step, single))
            wanted.setdefault(f"{group}-by-tokens/{name}", []).append((tokens, single))
    assert {tag: scalars[tag] for tag in wanted} == wanted
    assert {tag for tag in scalars if tag.startswith(group)} - wanted.keys() <= {"Train/Samples/lr"}


def kill_and_resume(reference, run_file, folder, kill_after):
    save = folder / "run"
    for number, step in enumerate(kill_after):
        command, log = forked(TRAIN, "--config", run_file, "--save", save), folder / f"log{number}"
        assert run_and_kill(command, log, partial(has_reached, save, step)), log.read_text()
    status, output = launch(folder / "log", TRAIN, "--config", run_file, "--save", save, launcher=forked)
    assert status == 0, output
    assert_same_run(save, reference)


def test_killed_and_resumed_runs_equal_the_uninterrupted_one_to_the_last_bit(reference, run_file, tmp_path):
    kill_and_resume(reference, run_file, tmp_path, kill_after=[3, 27])


@pytest.mark.slow
def test_killed_at_six_random_steps(reference, run_file, tmp_path):
    steps, _ = records(reference)
    kill_and_resume(reference, run_file, tmp_path, sorted(random.Random(0).sample(range(2, len(steps) - 6), 6)))


def test_two_ranks_stopped_by_sigterm_and_resumed_on_one(fixed_reference, fixed_file, tmp_path):
    save = tmp_path / "run"
    with running(launch_command(TRAIN, "--config", fixed_file, "--save", save, ranks=2), tmp_path / "log") as process:
        wait_until(lambda: process.poll() is not None or (save / "global_step6").exists(), "the run hung", seconds=300)
        os.killpg(process.pid, signal.SIGTERM)  # as a terminal or a batch system does; `deepspeed` passes nothing on
        wait_for_all(process)
    stopped = len(records(save)[0])
    assert 6 <= stopped < len(records(fixed_reference)[0]), (tmp_path / "log").read_text()
    assert (save / f"global_step{stopped}" / "complete.json").exists()
    assert f"stopped after step {stopped}" in (tmp_path / "log").read_text()
    status, output = launch(tmp_path / "log2", TRAIN, "--config", fixed_file, "--save", save, launcher=forked)
    assert status == 0, output
    assert_same_run(save, fixed_reference, loss_tolerance=1e-4)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, fixed_file):
    folder = tmp_path_factory.mktemp("two")
    arguments = ("--config", fixed_file, "--save", folder / "run")
    status, output = launch(folder / "log", TRAIN, *arguments, ranks=2, launcher=forked)
    assert status == 0, output
    return folder / "run"


def test_two_ranks_train_the_same_run(fixed_reference, two_ranks):
    assert_same_run(two_ranks, fixed_reference, loss_tolerance=1e-4)


def copied(run, folder):
    shutil.copytree(run, folder / "run")
    return folder / "run"


def test_a_damaged_checkpoint_is_passed_over_for_the_newest_complete_one(reference, run_file, tmp_path):
    save = copied(reference, tmp_path)
    last = max(int(path.name.removeprefix("global_step")) for path in save.glob("global_step*"))
    states = save / f"global_step{last}" / "mp_rank_00_model_states.pt"
    states.write_bytes(states.read_bytes()[:-1000])
    # with a relative --save, as the README has it
    arguments = ("--config", run_file, "--save", "run")
    status, output = launch(tmp_path / "log", TRAIN, *arguments, launcher=forked, cwd=tmp_path)
    assert status == 0, output
    assert f"skipping an unusable checkpoint: {save}/global_step{last}: mp_rank_00_model_states.pt has" in output
    assert f"resuming after step {last // 6 * 6}" in output
    assert_same_run(save, reference)


def test_an_earlier_versions_checkpoint_that_does_not_load_is_named(reference, one_rank):
    save = one_rank["damaged"]
    error = (save / "error").read_text()
    assert f"{save}/{checkpoints_of(reference)[-1]}: can't be loaded" in error
    assert "move it away" in error


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(reference, one_rank):
    error = (one_rank["other"] / "error").read_text()
    assert "made by another run" in error
    assert "training.seed: 1234 in the checkpoint, 7 now" in error
    assert "optimizer.params.lr: 0.005 in the checkpoint, 0.1 now" in error
    assert_same_run(one_rank["other"], reference)


def test_a_run_that_diverges_stops_in_words_and_saves_nothing_broken(run_file, tmp_path):
    sets = ("--set", "optimizer.params.lr=1e20", "--set", "gradient_clipping=0", "--set", "training.save_interval=0")
    arguments = ("--config", run_file, "--save", tmp_path / "run", *sets)
    status, output = launch(tmp_path / "log", TRAIN, *arguments, launcher=forked)
    assert status == DIVERGED
    assert re.search(r"error: step \d+: the (loss|gradient norm|validation loss) is (nan|inf)", output)
    assert "Traceback" not in output
    assert not list((tmp_path / "run").glob("*global_step*"))


def test_a_checkpoint_from_elsewhere_starts_a_folder_of_the_same_run(reference, one_rank):
    ours, theirs = records(one_rank["elsewhere"]), records(reference)
    first = ours[0][0]["step"]
    assert checkpoints_of(reference)[0] == f"global_step{first - 1}"
    assert ours[0] == theirs[0][first - 1 :]
    assert ours[1][-1] == theirs[1][-1]


def test_a_full_disk_leaves_the_previous_checkpoint(reference, run_file, tmp_path):
    save = copied(reference, tmp_path)
    before = sorted(path.name for path in save.glob("global_step*"))
    last = max(int(name.removeprefix("global_step")) for name in before)
    shutil.rmtree(save / f"global_step{last}")  # one more step to train and to save
    arguments, limits = ("--config", run_file, "--save", save), {resource.RLIMIT_FSIZE: 50_000}
    status, output = launch(tmp_path / "log", TRAIN, *arguments, launcher=forked, limits=limits)
    assert status != 0
    assert "can't be written" in output
    assert f"the checkpoint {save}/global_step{last // 6 * 6} is intact" in output
    assert "Traceback" not in output
    assert [path.name for path in save.glob("*global_step*")] == [f"global_step{last // 6 * 6}"]


def test_too_large_a_micro_batch_shows_before_step_1(run_file, tmp_path):
    long = ("data.seq_length=2048", "model.max_position_embeddings=2048", "curriculum_learning.max_difficulty=2048")
    many = ("train_batch_size=512", "train_micro_batch_size_per_gpu=512", "training.eval_interval=0")
    longer = ("training.train_tokens=50000000",)
    sets = [word for setting in (*long, *many, *longer) for word in ("--set", setting)]
    arguments = ("--config", run_file, "--save", tmp_path / "run", *sets)
    limits = {resource.RLIMIT_DATA: 3_000_000_000}
    status, output = launch(tmp_path / "log", TRAIN, *arguments, launcher=forked, limits=limits)
    assert status != 0
    assert "train_micro_batch_size_per_gpu: a micro-batch of 512 rows of 2048 tokens" in output
    assert "model.activation_checkpointing" in output
    assert "Traceback" not in output
    assert (tmp_path / "run" / "runlog.jsonl").read_text() == ""


def test_a_second_run_into_the_same_folder_is_refused(one_rank):
    assert "contains the log of a run that started at step 1" in (one_rank["again"] / "error").read_text()


MISTAKES = {
    "no corpus": (["--set", 'data.train=["nowhere/x"]'], "nowhere/x: no corpus, neither in"),
    "corpus too short": (
        ["--set", "data.seq_length=1000000", "--set", "model.max_position_embeddings=1000000"],
        "no sample in this split",
    ),
    "empty split": (["--set", 'data.split="1,0,0"'], "no sample in this split"),
    "foreign tokens": (["--set", "model.vocab_size=100"], "outside the vocabulary of 100"),
    "unwritable": (["--save", "/dev/null/run"], "--save /dev/null/run: can't be written to"),
    "no such step": (["--until-step", "0"], "--until-step: 0 is not valid"),
    "no such rank": (["--ranks", "3"], "train_batch_size: 8"),
    "malformed": (["--set", "curriculum_learning.min_difficulty=0"], "min_difficulty: 0 is not valid"),
}


@pytest.fixture(scope="module")
def mistakes(run_file, tmp_path_factory):
    """(status, stderr, whether torch is loaded) of each mistake, all in one process."""
    save = str(tmp_path_factory.mktemp("mistakes"))
    commands = {
        name: ["train", "--config", str(run_file), "--save", save, *words] for name, (words, _) in MISTAKES.items()
    }
    code = (
        "import json, sys\nfrom helpers.command import slw\nfor name, words in json.loads(sys.argv[1]).items():\n"
        "    result = slw(*words)\n"
        "    print(json.dumps([name, result.returncode, result.stderr, 'torch' in sys.modules]))"
    )
    path = os.pathsep.join([str(TESTS), str(ROOT)])
    environment = {**launchers.without_launcher(), "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return {name: rest for name, *rest in map(json.loads, result.stdout.splitlines())}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_reported_before_torch_is_loaded(mistakes, name):
    status, printed, loads_torch = mistakes[name]
    assert status == 1
    assert printed.startswith("error: ")
    assert MISTAKES[name][1] in printed
    assert not loads_torch


def test_the_log_ends_where_the_plan_ends(reference, tiny_run):
    timeline: Timeline = RunConfig.from_dict(tiny_run).timeline()
    steps, _ = records(reference)
    assert steps[-1]["consumed_tokens"] >= 9_500 > steps[-2]["consumed_tokens"]
    assert len(steps) == timeline.steps
