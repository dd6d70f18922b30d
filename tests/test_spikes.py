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
from helpers.launching import forked
from helpers.runs import (
    ENGINES,
    TRAIN,
    Runs,
    assert_same_run,
    has_reached,
    planned_samples,
    records,
    run_and_kill,
    samples_by_step,
    without_machine,
)
from helpers.runs import run as run_of

from seqlen_curriculum import RunConfig
from seqlen_curriculum.analysis.stability import stability
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.run_folder import ROLLBACKS
from seqlen_curriculum.run_folder.run_log import read_run_log

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
    run |= {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 8}
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
    for _, token_spans in feed.token_spans(step):
        for start, length in zip(token_spans.start, token_spans.length, strict=True):
            tokens[start : start + length] = random.integers(0, 256, length)
    tokens.flush()


def killed_command(folder):
    sets = [word for setting in ZERO2 for word in ("--set", setting)]
    return forked(TRAIN, "--config", folder / "run.json", "--save", folder / "killed", *sets, ranks=2)


@pytest.fixture(scope="module")
def runs(run_file):
    """The folder of all runs."""
    folder = run_file.parent

    def run(name, *sets, **more):
        return run_of(run_file, folder / name, sets, **more)

    assert run_and_kill(killed_command(folder), folder / "killed.log", (folder / "killed" / ROLLBACKS).exists)
    shutil.copy(folder / "killed" / "runlog.jsonl", folder / "killed.jsonl")
    for engine in ROLLED_BACK:
        (folder / f"{engine}-planned").mkdir()
        (folder / f"{engine}-planned" / ROLLBACKS).write_text(json.dumps(PLANNED))
    by_engine = [
        run(f"{engine}{kind}", *ENGINES[engine], *wanted)
        for engine in ROLLED_BACK
        for kind, wanted in (("", [ON_ROLLBACK, KEEP_ALL]), ("-planned", []))
    ]
    too_fast = ("optimizer.params.lr=1e20", "gradient_clipping=0", "training.eval_interval=0", "training.keep_last=3")
    restless = ("training.spike_ratio=1.01", "training.spike_skip_steps=1", "training.eval_interval=0")
    few = ("training.save_interval=0", "training.keep_last=1")
    for blocked in ("no-lock/.lock", "no-pointer/latest"):
        (folder / blocked).mkdir(parents=True)
    others = [
        run("killed", *ZERO2),
        run("log", *ENGINES["zero2"]),
        run("stop", *ENGINES["zero2"], "training.on_spike=stop", fails=True),
        run(
            "too-new",
            *ZERO2,
            "training.spike_skip_steps=8",
            resume=f"{folder}/stop/global_step18",
            after="stop",
            fails=True,
        ),
        run("newer", *ZERO2, "training.spike_skip_steps=7", begins_as_copy_of=f"{folder}/too-new", after="too-new"),
        run("from-elsewhere", *ZERO2, resume=f"{folder}/zero2/global_step24", after="zero2"),
        run("too-fast", *ZERO2, *too_fast, fails=True),
        run("restless", *ZERO2, *restless, fails=True),
        run("rested", *ENGINES["zero2"], *restless, begins_as_copy_of=f"{folder}/restless", after="restless"),
        run("terminated", *ZERO2, *few, sigterm_at=f"{folder}/terminated/{ROLLBACKS}"),
        run("no-lock", *ZERO2, fails=True),
        run("no-pointer", *ZERO2, fails=True),
    ]
    at = len(by_engine) - 2  # no other engine can follow a pipeline
    all_runs = Runs(folder)
    all_runs.launch("spikes", [*by_engine[:at], *others, *by_engine[at:]], ranks=2)
    return all_runs


def raw(run, name="runlog.jsonl"):
    return [without_machine(one) for one in read_run_log(run / name)]


@pytest.mark.parametrize("engine", ROLLED_BACK)
def test_a_rollback_is_the_run_that_skips_these_steps_from_the_start(runs, engine):
    run, planned = runs[engine], runs[f"{engine}-planned"]
    assert raw(run) == raw(planned)
    assert samples_by_step(run) == samples_by_step(planned)
    weights = [sorted((folder / "global_step41").glob("*.safetensors")) for folder in (run, planned)]
    assert weights[0]
    for one, other in zip(*weights, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_log_is_whole_and_names_the_skipped_steps(runs, run_file):
    config = RunConfig.load(run_file)
    timeline = config.timeline()
    rate = config.plan.learning_rate()
    log = [record for record in raw(runs["zero2"]) if "valid_loss" not in record]
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
    steps, evaluations = records(runs["zero2"])
    assert stability(steps)["max_loss_ratio"] < 1.3
    assert [record["step"] for record in evaluations] == [8, 16, 24, 32, 40, 41]
    feed, _ = open_run_data(config)
    assert samples_by_step(runs["zero2"]) == {
        step: samples for step, samples in planned_samples(feed).items() if step not in SKIPPED
    }


def test_the_rollback_is_on_record(runs, run_file):
    (rollback,) = json.loads((runs["zero2"] / ROLLBACKS).read_text())
    (spike,) = [record for record in records(runs["log"])[0] if record["step"] == SPIKE]  # the same run up to there
    assert {name: rollback[name] for name in ("step", "loss", "seqlen", "lr")} == {
        name: spike[name] for name in ("step", "loss", "seqlen", "lr")
    }
    assert rollback["loss"] > 5
    least = min(record["loss"] for record in records(runs["log"])[0] if record["step"] < SPIKE)
    assert rollback["ratio"] == rollback["loss"] / least
    assert (rollback["returned_to"], rollback["skipped"]) == (18, [22, 25])
    assert rollback["seconds"] > 0


def test_the_engine_counts_the_skipped_steps(runs):
    import torch

    states = torch.load(runs["zero2"] / "global_step41" / "mp_rank_00_model_states.pt", weights_only=False)
    assert (states["global_steps"], states["global_samples"]) == (41, 41 * 16)
    assert states["skipped_steps"] == 0  # those of fp16


@pytest.mark.parametrize("run", ["zero2", "killed"])
def test_checkpoints_tell_their_course(runs, run):
    seen = {
        int(path.parent.name.removeprefix("global_step")): json.loads(path.read_text())["rollbacks"]
        for path in (runs[run]).glob("global_step*/complete.json")
    }
    ledger = json.loads((runs[run] / ROLLBACKS).read_text())
    assert seen == {0: [], 6: [], 12: [], 18: [], 24: ledger, 30: ledger, 36: ledger, 41: ledger}


def assert_same_rollback(run, reference):
    assert_same_run(run, reference)
    assert raw(run) == raw(reference)
    ours, theirs = (json.loads((save / ROLLBACKS).read_text()) for save in (run, reference))
    assert [{**one, "seconds": None} for one in ours] == [{**one, "seconds": None} for one in theirs]


def test_killed_during_the_rollback_it_comes_out_the_same(runs):
    assert raw(runs.folder, "killed.jsonl")[-1]["step"] < 41
    assert_same_rollback(runs["killed"], runs["zero2"])


@pytest.mark.slow
def test_killed_again_and_again(runs, run_file, tmp_path):
    shutil.copy(run_file, tmp_path)
    save = tmp_path / "killed"
    dues = [partial(has_reached, save, 24), (save / ROLLBACKS).exists]
    dues += [partial(has_reached, save, step) for step in (27, 33, 38)]
    for number, due in enumerate(dues):
        log = tmp_path / f"{number}.log"
        assert run_and_kill(killed_command(tmp_path), log, due), log.read_text()
    assert not run_and_kill(killed_command(tmp_path), tmp_path / "log", lambda: False)  # to its end
    assert_same_rollback(save, runs["zero2"])


def test_only_logged_by_default(runs):
    steps, _ = records(runs["log"])
    assert [record["step"] for record in steps] == list(range(1, 42))
    spikes = [one["step"] for one in stability(steps)["spikes"] if one["ratio"] > 1.3]
    assert spikes[0] == SPIKE
    episodes = [step for step in spikes if step - 1 not in spikes]
    line = r"step (\d+): the loss [^;\n]*spike_ratio 1\.3\), at seqlen \d+ and lr \S+\s*\n"
    message = re.findall(line, runs.outputs["spikes"])
    assert list(map(int, message)) == episodes
    assert not (runs["log"] / ROLLBACKS).exists()
    assert not (runs["log"] / "global_step0").exists()


def test_stops_before_anything_of_the_spike_is_saved(runs):
    steps, _ = records(runs["stop"])
    assert steps == records(runs["log"])[0][: SPIKE - 1]
    message = (runs["stop"] / "error").read_text()
    assert message.startswith("step 25: the loss ")
    for part in (
        "times the lowest before it",
        "training.spike_ratio 1.3",
        "seqlen 28",
        "lr 0.00265",
        "intact",
        "rollback",
    ):
        assert part in message
    assert sorted(path.name for path in (runs["stop"]).glob("global_step*")) == [
        "global_step12",
        "global_step18",
        "global_step24",
    ]


def test_without_a_checkpoint_from_before_it_names_the_fixes(runs):
    message = (runs["too-new"] / "error").read_text()
    assert "a rollback skips steps 18 to 25, but there is no checkpoint from before them" in message
    assert 'Set training.spike_skip_steps to 7 or less, or training.on_spike to "log"' in message
    assert not (runs["too-new"] / ROLLBACKS).exists()
    (rollback,) = json.loads((runs["newer"] / ROLLBACKS).read_text())  # it was set to 7, in the same command
    assert (rollback["returned_to"], rollback["skipped"]) == (18, [19, 25])
    assert raw(runs["newer"])[-1]["step"] == 41


def test_a_checkpoint_from_elsewhere_brings_its_skipped_steps(runs):
    assert raw(runs["from-elsewhere"]) == [record for record in raw(runs["zero2"]) if record["step"] > 24]
    manifests = [runs[run] / "global_step41" / "complete.json" for run in ("from-elsewhere", "zero2")]
    ours, theirs = (json.loads(path.read_text())["rollbacks"] for path in manifests)
    assert ours == theirs != []


def test_skipped_steps_ahead_are_logged_when_a_run_starts(runs):
    message = re.findall(r"steps to skip, .*: (.*\d)\s*\n", runs.outputs["spikes"])
    assert message.count("22 to 25") >= len(ROLLED_BACK)  # planned
    assert "25 to 25" in message  # from-elsewhere begins with it


def test_gives_up_on_what_spikes_again_and_again(runs):
    message = (runs["too-fast"] / "error").read_text()
    assert re.match(r"step \d+: the loss is (nan|inf), at seqlen", message)
    assert "after 10 rollbacks" in message
    assert "Lower optimizer.params.lr" in message
    ledger = json.loads((runs["too-fast"] / ROLLBACKS).read_text())
    assert len(ledger) == 10
    assert {rollback["loss"] for rollback in ledger} == {None}
    steps, _ = records(runs["too-fast"])
    assert len(steps) >= 1  # what follows the last rollback; by then the engine was ten times full of NaN
    assert all(math.isfinite(record["loss"] + record["grad_norm"]) for record in steps)
    assert sorted(path.name for path in (runs["too-fast"]).glob("global_step*")) == [
        "global_step12",
        "global_step18",
        "global_step6",
    ]
    last = ledger[-1]["skipped"][1]
    assert [record["step"] for record in raw(runs["too-fast"]) if "skipped" in record] == list(range(1, last + 1))


def test_what_spikes_again_and_again_resumes_when_only_logged(runs):
    message = (runs["restless"] / "error").read_text()
    assert "after 10 rollbacks" in message
    assert 'or set training.on_spike to "log"' in message
    assert '"log"' not in (runs["too-fast"] / "error").read_text()  # NaN can't be gone on from
    log = [record for record in raw(runs["rested"]) if "valid_loss" not in record]
    assert [record["step"] for record in log] == list(range(1, 42))
    skipped = [one["skipped"][0] for one in json.loads((runs["rested"] / ROLLBACKS).read_text())]
    assert [record["step"] for record in log if "skipped" in record] == sorted(skipped)


def test_sigterm_while_it_goes_back_saves_and_leaves_a_checkpoint_to_go_back_to(runs):
    (rollback,) = json.loads((runs["terminated"] / ROLLBACKS).read_text())
    assert rollback["returned_to"] == 0
    log = raw(runs["terminated"])
    assert [record["step"] for record in log] == [1]
    assert sorted(path.name for path in (runs["terminated"]).glob("global_step*")) == ["global_step0", "global_step1"]


def test_what_ails_the_folder_is_reported_by_all_ranks(runs):
    """By one of them only, the launch of all these runs would have hung."""
    assert re.match(r".*Is a directory: .*/no-lock/\.lock'; free space or fix", (runs["no-lock"] / "error").read_text())
    message = (runs["no-pointer"] / "error").read_text()
    assert re.match(r".*/no-pointer/global_step0: is complete, but .*latest.*fix", message)
    assert (runs["no-pointer"] / "global_step0" / "complete.json").exists()
