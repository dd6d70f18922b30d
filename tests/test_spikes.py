"""A real spike in real runs: one step reads random bytes. Two launches: one is killed amid it, the other does the rest.

41 steps of 16 rows, checkpoints every 6 steps, lengths 16 to 32. Step 25 spikes; 22 to 25 are what a rollback skips.
"""

import json
import math
import re
import shutil
from functools import partial

import numpy as np
import pytest
from conftest import launch_command
from test_matrix import ENGINES, launch_runs
from test_training import TRAIN, assert_same_run, has_reached, planned_samples, records, run_and_kill, samples_by_step

from seqlen_curriculum import RunConfig
from seqlen_curriculum.analysis.stability import stability
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.run_data import open_run_data
from seqlen_curriculum.runlog import read_runlog
from seqlen_curriculum.training.guard import LEDGER

SPIKE, SKIPPED = 25, [22, 23, 24, 25]
ROLLED_BACK = ("zero2", "zero3", "pipeline_zero1")
PLANNED = [{"step": 25, "loss": 6.9, "ratio": 2.3, "seqlen": 28, "lr": 1e-3, "returned_to": 18, "skipped": [22, 25]}]
ON_ROLLBACK = "training.on_spike=rollback"
KEEP_ALL = "training.keep_last=9"
ZERO2 = (*ENGINES["zero2"], ON_ROLLBACK, KEEP_ALL)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, tiny_run, corpus):
    """A run whose step 25, and no other, reads random bytes."""
    folder = tmp_path_factory.mktemp("spikes")
    for path in corpus.parent.iterdir():
        shutil.copy(path, folder)
    run = json.loads(json.dumps(tiny_run))
    run |= {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}
    run["curriculum_learning"] |= {
        "min_difficulty": 16,
        "schedule_config": {"total_curriculum_step": 30, "difficulty_step": 4},
    }
    run["data"]["train"] = [str(folder / corpus.name)]
    run["training"] |= {"train_tokens": 16_000, "eval_interval": 8, "keep_last": 3}
    run["training"] |= {"spike_ratio": 1.3, "spike_skip_steps": 4}
    overwrite(run, SPIKE)
    path = folder / "run.json"
    path.write_text(json.dumps(run))
    return path


def overwrite(run, step):
    """Make the samples that ``step`` reads random bytes in the corpus itself."""
    feed, _ = open_run_data(RunConfig.from_dict(run))
    read = [tuple(place) for samples in planned_samples(feed).values() for place in samples]
    assert len(set(read)) == len(read)  # each is read at one step only
    (prefix,) = run["data"]["train"]
    tokens = np.memmap(f"{prefix}.bin", dtype=IndexedCorpus(prefix).tokens.dtype, mode="r+")
    random = np.random.default_rng(0)
    for _, stretches in feed.stretches(step):
        for start, length in zip(stretches.start, stretches.length, strict=True):
            tokens[start : start + length] = random.integers(0, 256, length)
    tokens.flush()


def killed_command(folder):
    sets = [word for setting in ZERO2 for word in ("--set", setting)]
    return launch_command(TRAIN, "--config", folder / "run.json", "--save", folder / "killed", *sets, ranks=2)


@pytest.fixture(scope="module")
def runs(run_file):
    """The folder of all runs."""
    folder = run_file.parent

    def run(name, *sets, resume="auto", fails=False):
        return {"config": str(run_file), "sets": sets, "save": f"{folder}/{name}", "resume": resume, "fails": fails}

    assert run_and_kill(killed_command(folder), folder / "killed.log", (folder / "killed" / LEDGER).exists)
    shutil.copy(folder / "killed" / "runlog.jsonl", folder / "killed.jsonl")
    for engine in ROLLED_BACK:
        (folder / f"{engine}-planned").mkdir()
        (folder / f"{engine}-planned" / LEDGER).write_text(json.dumps(PLANNED))
    by_engine = [
        run(f"{engine}{kind}", *ENGINES[engine], *wanted)
        for engine in ROLLED_BACK
        for kind, wanted in (("", [ON_ROLLBACK, KEEP_ALL]), ("-planned", []))
    ]
    too_fast = ("optimizer.params.lr=1e20", "gradient_clipping=0", "training.eval_interval=0", "training.keep_last=3")
    others = [
        run("killed", *ZERO2),
        run("log", *ENGINES["zero2"]),
        run("stop", *ENGINES["zero2"], "training.on_spike=stop", fails=True),
        run("too-new", *ZERO2, "training.spike_skip_steps=8", resume=f"{folder}/stop/global_step18", fails=True),
        run("from-elsewhere", *ZERO2, resume=f"{folder}/zero2/global_step24"),
        run("too-fast", *ZERO2, *too_fast, fails=True),
    ]
    at = len(by_engine) - 2  # no other engine can follow a pipeline
    launch_runs(folder, "spikes", [*by_engine[:at], *others, *by_engine[at:]], ranks=2)
    return folder


def raw(run, name="runlog.jsonl"):
    return [{key: value for key, value in one.items() if key != "seconds"} for one in read_runlog(run / name)]


@pytest.mark.parametrize("engine", ROLLED_BACK)
def test_a_rollback_is_the_run_that_skips_these_steps_from_the_start(runs, engine):
    run, planned = runs / engine, runs / f"{engine}-planned"
    assert raw(run) == raw(planned)
    assert samples_by_step(run) == samples_by_step(planned)
    weights = [sorted((folder / "global_step41").glob("*.safetensors")) for folder in (run, planned)]
    assert weights[0]
    for one, other in zip(*weights, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_log_is_whole_and_names_the_skipped_steps(runs, run_file):
    config = RunConfig.load(run_file)
    timeline = config.timeline()
    rate = config.learning_rate(timeline)
    log = [record for record in raw(runs / "zero2") if "valid_loss" not in record]
    assert [record["step"] for record in log] == list(range(1, 42))
    for record in log:
        step = record["step"]
        planned = {"step": step, "seqlen": timeline.seqlen(step), "rows": 16}
        planned["consumed_tokens"] = timeline.consumed_tokens(step)
        assert {**record, **planned} == record
        if step in SKIPPED:
            assert record == {**planned, "skipped": True}
        else:
            assert record["lr"] == rate(step)
    steps, evaluations = records(runs / "zero2")
    assert stability(steps)["max_loss_ratio"] < 1.3
    assert [record["step"] for record in evaluations] == [8, 16, 24, 32, 40, 41]
    feed, _ = open_run_data(config)
    assert samples_by_step(runs / "zero2") == {
        step: samples for step, samples in planned_samples(feed).items() if step not in SKIPPED
    }


def test_the_rollback_is_on_record(runs, run_file):
    (rollback,) = json.loads((runs / "zero2" / LEDGER).read_text())
    (spike,) = [record for record in records(runs / "log")[0] if record["step"] == SPIKE]  # the same run up to there
    assert {name: rollback[name] for name in ("step", "loss", "seqlen", "lr")} == {
        name: spike[name] for name in ("step", "loss", "seqlen", "lr")
    }
    assert rollback["loss"] > 5
    least = min(record["loss"] for record in records(runs / "log")[0] if record["step"] < SPIKE)
    assert rollback["ratio"] == rollback["loss"] / least
    assert (rollback["returned_to"], rollback["skipped"]) == (18, [22, 25])


def test_the_engine_counts_the_skipped_steps(runs):
    import torch

    states = torch.load(runs / "zero2" / "global_step41" / "mp_rank_00_model_states.pt", weights_only=False)
    assert (states["global_steps"], states["global_samples"]) == (41, 41 * 16)
    assert states["skipped_steps"] == 0  # those of fp16


@pytest.mark.parametrize("run", ["zero2", "killed"])
def test_checkpoints_tell_their_course(runs, run):
    seen = {
        int(path.parent.name.removeprefix("global_step")): json.loads(path.read_text())["rollbacks"]
        for path in (runs / run).glob("global_step*/complete.json")
    }
    ledger = json.loads((runs / run / LEDGER).read_text())
    assert seen == {0: [], 6: [], 12: [], 18: [], 24: ledger, 30: ledger, 36: ledger, 41: ledger}


def assert_same_rollback(run, reference):
    assert_same_run(run, reference)
    assert raw(run) == raw(reference)
    assert (run / LEDGER).read_text() == (reference / LEDGER).read_text()


def test_killed_amid_the_rollback_it_comes_out_the_same(runs):
    assert raw(runs, "killed.jsonl")[-1]["step"] < 41
    assert_same_rollback(runs / "killed", runs / "zero2")


@pytest.mark.slow
def test_killed_again_and_again(runs, run_file, tmp_path):
    shutil.copy(run_file, tmp_path)
    save = tmp_path / "killed"
    dues = [partial(has_reached, save, 24), (save / LEDGER).exists]
    dues += [partial(has_reached, save, step) for step in (27, 33, 38)]
    for number, due in enumerate(dues):
        log = tmp_path / f"{number}.log"
        assert run_and_kill(killed_command(tmp_path), log, due), log.read_text()
    assert not run_and_kill(killed_command(tmp_path), tmp_path / "log", lambda: False)  # to its end
    assert_same_rollback(save, runs / "zero2")


def test_only_told_of_by_default(runs):
    steps, _ = records(runs / "log")
    assert [record["step"] for record in steps] == list(range(1, 42))
    spikes = [one["step"] for one in stability(steps)["spikes"] if one["ratio"] > 1.3]
    assert spikes[0] == SPIKE
    episodes = [step for step in spikes if step - 1 not in spikes]
    told = re.findall(r"step (\d+): the loss [^;\n]* at seqlen \d+ and lr \S+\s*\n", (runs / "spikes.log").read_text())
    assert list(map(int, told)) == episodes
    assert not (runs / "log" / LEDGER).exists()
    assert not (runs / "log" / "global_step0").exists()


def test_stops_before_anything_of_the_spike_is_saved(runs):
    steps, _ = records(runs / "stop")
    assert steps == records(runs / "log")[0][: SPIKE - 1]
    told = (runs / "stop" / "error").read_text()
    assert told.startswith("step 25: the loss ")
    for part in (
        "times the least before it",
        "training.spike_ratio 1.3",
        "seqlen 28",
        "lr 0.00265",
        "intact",
        "rollback",
    ):
        assert part in told
    assert sorted(path.name for path in (runs / "stop").glob("global_step*")) == [
        "global_step12",
        "global_step18",
        "global_step24",
    ]


def test_without_a_checkpoint_from_before_it_says_what_to_change(runs):
    told = (runs / "too-new" / "error").read_text()
    assert "a rollback skips steps 18 to 25, and no checkpoint from before them is kept" in told
    for key in ("training.keep_last", "save less often", "training.spike_skip_steps"):
        assert key in told
    assert not (runs / "too-new" / LEDGER).exists()


def test_a_checkpoint_from_elsewhere_brings_its_skipped_steps(runs):
    assert raw(runs / "from-elsewhere") == [record for record in raw(runs / "zero2") if record["step"] > 24]
    manifests = [runs / run / "global_step41" / "complete.json" for run in ("from-elsewhere", "zero2")]
    ours, theirs = (json.loads(path.read_text())["rollbacks"] for path in manifests)
    assert ours == theirs != []


def test_gives_up_on_what_spikes_again_and_again(runs):
    told = (runs / "too-fast" / "error").read_text()
    assert re.match(r"step \d+: the loss is (nan|inf), at seqlen", told)
    assert "after 10 rollbacks" in told
    assert "Lower optimizer.params.lr" in told
    ledger = json.loads((runs / "too-fast" / LEDGER).read_text())
    assert len(ledger) == 10
    assert {rollback["loss"] for rollback in ledger} == {None}
    steps, _ = records(runs / "too-fast")
    assert len(steps) >= 1  # what follows the last rollback; by then the engine was ten times full of NaN
    assert all(math.isfinite(record["loss"] + record["grad_norm"]) for record in steps)
    assert sorted(path.name for path in (runs / "too-fast").glob("global_step*")) == [
        "global_step12",
        "global_step18",
        "global_step6",
    ]
    last = ledger[-1]["skipped"][1]
    assert [record["step"] for record in raw(runs / "too-fast") if "skipped" in record] == list(range(1, last + 1))
