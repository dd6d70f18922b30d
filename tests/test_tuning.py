"""Whole searches, one of them killed twice; what a probe's log says, and what is refused."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import psutil
import pytest
from helpers.capabilities import require_launches
from helpers.command import slw
from helpers.forked_command import forked_command
from helpers.launching import ROOT, free_port, limit, running, wait_until
from helpers.runs import records
from helpers.settings import changed

from seqlen_curriculum import CheckpointError, RunConfig
from seqlen_curriculum.config.equivalence import count_identical_steps
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.errors import DIVERGED
from seqlen_curriculum.files import read_json
from seqlen_curriculum.run_folder.ratios import ratios_to_best
from seqlen_curriculum.run_folder.run_log import RunLog
from seqlen_curriculum.tuning.cost import cost_of
from seqlen_curriculum.tuning.probes import ProbeRun
from seqlen_curriculum.tuning.search import Candidate, upcoming
from seqlen_curriculum.tuning.space import Settings, scheduled, space_of

TUNE = [sys.executable, str(ROOT / "scripts" / "tune.py")]


def tune_command(config, save, *flags):
    # What the launcher sets for one rank. The launcher itself would start as long as a probe runs.
    ranks = [f"{name}=0" for name in ("RANK", "LOCAL_RANK")] + ["WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1"]
    launcher = ["env", *ranks, f"MASTER_PORT={free_port()}", *forked_command()]
    return [*TUNE, str(config), "--save", str(save), "--launcher", shlex.join(launcher), *flags]


def in_process(command):
    return ["tune", *command[len(TUNE) :]]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, tiny_run):
    """The tiny run without its notes of samples; 5 of 16 steps of a probe are its LR warmup."""
    path = tmp_path_factory.mktemp("tuning") / "run.json"
    path.write_text(json.dumps(changed(tiny_run, training__log_sample_ids=False)))
    return path


# The second probe would be of 100 steps: it is of the whole run.
SEARCH = (
    "--min-difficulty",
    "16",
    "--resolution",
    "2",
    "--eval-interval",
    "2",
    "--max-share",
    "3",
    "--probe-warmups",
    "20",
)


def killed_at(command, log, is_time, everything):
    """Start a search, kill it with -9 once ``is_time``: alone, or with all that it has started."""
    with open(log, "ab") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        wait_until(lambda: is_time() or process.poll() is not None, "the search hung", seconds=300)
        assert process.poll() is None, log.read_text()
    finally:
        doomed = [process, *(process.children(recursive=True) if everything else ())]
        for one in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


@pytest.fixture(scope="module")
def searches(config_file):
    """A search, and the same one killed twice: in its first probe alone, in its second with all processes."""
    require_launches()
    folder = config_file.parent
    command, save = tune_command(config_file, folder / "killed", *SEARCH), folder / "killed"

    def has_run(number, steps):
        """Whether the probe of this number, from 1, is at so many steps."""
        logs = sorted(save.glob("probes/*/runlog.jsonl"), key=lambda path: path.stat().st_ctime)
        return len(logs) >= number and len(logs[number - 1].read_text().splitlines()) >= steps

    with running(tune_command(config_file, folder / "whole", *SEARCH), folder / "whole.log") as whole:
        killed_at(command, folder / "killed.log", lambda: has_run(1, 1), everything=False)
        killed_at(command, folder / "killed.log", lambda: has_run(2, 4), everything=True)
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stdout + result.stderr + (folder / "killed.log").read_text()
        assert whole.wait(timeout=limit(120)) == 0, (folder / "whole.log").read_text()
    (folder / "killed.out").write_text(result.stdout)
    return folder


def message(save):
    state = read_json(save / "tuning.json")
    return {name: value for name, value in state.items() if name != "seconds"}


def test_a_search_killed_twice_ends_with_the_same_answer(searches):
    assert message(searches / "killed") == message(searches / "whole")
    assert read_json(searches / "killed" / "tuned.json") == read_json(searches / "whole" / "tuned.json")
    for probe in (searches / "whole" / "probes").glob("min*/"):
        assert records(searches / "killed" / "probes" / probe.name) == records(probe)


def test_the_answer_is_the_file_with_another_schedule(searches, config_file):
    state, found = read_json(searches / "whole" / "tuning.json"), read_json(searches / "whole" / "tuned.json")
    best = Candidate(**state["best"])
    assert state["complete"]
    assert found == scheduled(read_json(config_file), best.min_difficulty, total_curriculum_step=best.total_steps)
    verdicts = [one["stable"] for one in state["probes"]]
    assert upcoming(space_of(read_json(config_file), Settings(min_difficulty=16, resolution=2)), verdicts) == best


def test_verdicts_are_those_of_the_logs(searches):
    for one in read_json(searches / "whole" / "tuning.json")["probes"]:
        name = f"min{one['min_difficulty']}-T{one['total_steps']}"
        evaluations = records(searches / "whole" / "probes" / name)[1]
        losses = [record["valid_loss"] for record in evaluations if record["step"] <= one["until_step"]]
        assert one["ratio"] == pytest.approx(float(ratios_to_best(np.exp(losses))[1:].max()), rel=1e-12)
        assert one["stable"] == (one["ratio"] <= 1.3)
        steps = RunConfig.load(searches / "whole" / "probes" / f"{name}.json").timeline().steps
        assert one["step"] == min(one["until_step"], steps)


def test_a_probe_takes_over_what_it_shares_with_an_earlier_one(searches):
    first, second = read_json(searches / "whole" / "tuning.json")["probes"]
    runs = [searches / "whole" / "probes" / f"min16-T{one['total_steps']}" for one in (first, second)]
    configs = [RunConfig.load(run.with_suffix(".json")) for run in runs]
    shared = count_identical_steps(*configs, first["until_step"])
    assert shared > 0
    assert read_json(runs[1] / "run.json")["launches"][0]["first_step"] == shared + 1
    both = [[one for one in records(run)[0] if one["step"] <= shared] for run in runs]
    assert both[0] == both[1]


def test_it_reports_what_it_found_and_what_it_cost(searches, config_file):
    text = (searches / "killed.out").read_text()
    state = read_json(searches / "killed" / "tuning.json")
    first, second = state["probes"]
    configs = [
        RunConfig.load(searches / "killed" / "probes" / f"min16-T{one['total_steps']}.json") for one in (first, second)
    ]
    shared = count_identical_steps(*configs, first["until_step"])
    tokens = sum(
        cost_of(config, begin, one["until_step"]).tokens
        for config, begin, one in zip(configs, (1, shared + 1), (first, second), strict=True)
    )
    assert f"cost              {tokens:,} tokens, " in text
    assert (
        f"min_difficulty 16, total_curriculum_step {second['total_steps']}: the largest T that --most-of-run 0.8"
        in text
    )
    page = (searches / "killed" / "report" / "report.html").read_text()
    assert f"min 16, T {second['total_steps']}: stable" in page
    assert (searches / "killed" / "report" / "perplexity_step.png").exists()


@pytest.mark.parametrize(
    ("launcher", "message"),
    [(["false"], "status 1 .*step 9"), (["true"], "status 0 .*step 9")],
)
def test_a_probe_that_fails_otherwise_is_no_verdict(tmp_path, tiny_run, launcher, message):
    """Also where the log is at the step already: it was killed before that step's evaluation, say."""
    run = ProbeRun(tmp_path / "probe", tiny_run, max_ratio=1.3)
    run.save.mkdir()
    log = RunLog(run.save / "runlog.jsonl")
    log.write({"step": 9, "loss": 3.0})
    log.close()
    run.save.with_suffix(".log").write_text("error: of an earlier launch\n")
    with pytest.raises(CheckpointError, match=message) as raised:
        run.train(9, launcher, ROOT / "seqlen_curriculum" / "train.py", lambda _: None)
    assert "earlier launch" not in str(raised.value)


@pytest.mark.parametrize(
    "damage", ['{"seconds": 1}', '{"config": {}, "settings": {}, "seconds": 0, "probes": [{}]}', "{"]
)
def test_a_damaged_state_is_reported(config_file, tmp_path, damage):
    (tmp_path / "tuning.json").write_text(damage)
    result = slw(*in_process(tune_command(config_file, tmp_path, *SEARCH)))
    assert result.returncode == 1
    assert "tuning.json: is not the state of a search" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "tuning.json").read_text() == damage


def test_a_budget_of_time_that_is_spent_launches_nothing(searches, config_file, tmp_path):
    state = read_json(searches / "whole" / "tuning.json")
    (tmp_path / "tuning.json").write_text(json.dumps({**state, "probes": [], "seconds": 61.0}))
    command = tune_command(config_file, tmp_path, *SEARCH, "--max-minutes", "1")
    result = slw(*in_process(command))
    assert result.returncode == 1
    assert "the budget ended before a stable T was found" in result.stderr
    assert not list((tmp_path / "probes").iterdir())


@pytest.mark.slow
def test_a_search_with_fluctuations_bisects(config_file, tmp_path):
    """At a high rate, with a strict ratio: each verdict is its log's, and the search asks what they make it ask."""
    flags = (
        "--min-difficulty",
        "16",
        "--resolution",
        "2",
        "--eval-interval",
        "1",
        "--max-share",
        "9",
        "--ratio",
        "1.03",
    )
    require_launches()
    command = tune_command(config_file, tmp_path / "hot", *flags, "--set", "optimizer.params.lr=2e-2")
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode in (0, DIVERGED), result.stdout + result.stderr
    state = read_json(tmp_path / "hot" / "tuning.json")
    raw = changed(read_json(config_file), optimizer__params__lr=2e-2)
    space = space_of(raw, Settings(min_difficulty=16, resolution=2, eval_interval=1, ratio=1.03))
    verdicts = [one["stable"] for one in state["probes"]]
    assert False in verdicts
    for number, one in enumerate(state["probes"]):
        asked = upcoming(space, verdicts[:number])
        assert (*asked.candidate, asked.until_step) == (one["min_difficulty"], one["total_steps"], one["until_step"])
        name = f"min{one['min_difficulty']}-T{one['total_steps']}"
        evaluations = records(tmp_path / "hot" / "probes" / name)[1]
        losses = [record["valid_loss"] for record in evaluations if record["step"] <= one["until_step"]]
        assert one["stable"] == bool(ratios_to_best(np.exp(losses))[1:].max() <= 1.03)
    best = upcoming(space, verdicts)
    assert state["best"] == (best and best._asdict())


def test_a_folder_of_another_search_is_refused(searches, config_file):
    command = tune_command(config_file, searches / "whole", *SEARCH, "--ratio", "1.2")
    result = slw(*in_process(command))
    assert result.returncode == 1
    assert "contains a search with another settings" in result.stderr


def test_a_training_that_diverges_is_no_answer(config_file, tmp_path):
    sets = ("--set", "optimizer.params.lr=1e20", "--set", "gradient_clipping=0")
    require_launches()
    command = tune_command(config_file, tmp_path / "hot", *SEARCH, *sets)
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == DIVERGED, result.stdout + result.stderr
    assert re.search(r"probe 1: min_difficulty 16, T \d+: (diverged|fluctuates)", result.stdout)
    assert "every schedule fluctuates; lower optimizer.params.lr" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--launcher", "deep'speed"), "No closing quotation"),
        (("--launcher", "no-such-launcher"), "--launcher 'no-such-launcher': command not found"),
        (("--max-share", "0"), "--max-share: 0.0 is not valid"),
        (("--set", 'data.train=["nowhere"]'), "nowhere"),
        (("--set", "training.train_tokenz=1"), "did you mean 'train_tokens'"),
    ],
)
def test_mistakes_are_reported_before_any_probe(config_file, tmp_path, flags, message):
    command = [*TUNE, str(config_file), "--save", str(tmp_path / "x"), "--launcher", sys.executable, *flags]
    result = slw(*in_process(command))
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x" / "tuning.json").exists()


def test_a_dry_run_reports_costs_and_writes_nothing(config_file, tmp_path):
    command = [*TUNE, str(config_file), "--save", str(tmp_path / "x"), "--launcher", sys.executable, "--dry-run"]
    result = slw(*in_process(command))
    assert result.returncode == 0, result.stderr
    costs = [line.split() for line in result.stdout.splitlines() if re.fullmatch(r"[ \d,.%]+", line)]
    tokens = {int(row[0]): int(row[2].replace(",", "")) for row in costs[1:]}
    for total, cost in tokens.items():
        config = RunConfig.from_dict(scheduled(read_json(config_file), 8, total_curriculum_step=total))
        assert cost == config.timeline().consumed_tokens(min(15, config.timeline().steps))
    assert not (tmp_path / "x").exists()


def test_a_dry_run_as_json(config_file, tmp_path):
    command = [*TUNE, "--config", str(config_file), "--save", str(tmp_path / "x"), "--dry-run", "--json"]
    result = slw(*in_process(command))
    space = json.loads(result.stdout)
    assert space["lengths"][0] == 8
    assert space["totals"] == sorted(space["totals"])
    assert space["most_tokens"] == RunConfig.load(config_file).train_tokens // 5  # --max-share is 0.2


@pytest.fixture
def checkout(tmp_path):
    """What the examples in the help find beside them: scripts, configurations, and a small corpus of the name they use."""
    (tmp_path / "run.json").symlink_to(ROOT / "configs" / "tiny_cpu.json")
    (tmp_path / "corpus").mkdir()
    text = (ROOT / "README.md").read_bytes()
    with CorpusWriter(tmp_path / "corpus" / "stdlib", vocab_size=512) as writer:
        for number in range(100):
            writer.add_document([*text[number::7], 256])
    return tmp_path


def examples():
    message = subprocess.run([*TUNE, "--help"], capture_output=True, text=True, check=True).stdout
    return [line.strip() for line in message.split("Example:")[1].splitlines() if "slw tune" in line]


def run_example(line, folder):
    words = shlex.split(line)
    assert words[:2] == ["slw", "tune"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "seqlen_curriculum", *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_the_first_example_in_the_help_works(checkout):
    result = run_example(examples()[0], checkout)
    assert result.returncode == 0, result.stderr
    assert "of training" in result.stdout


@pytest.mark.slow
def test_the_second_example_in_the_help_works(checkout):
    require_launches()
    result = run_example(examples()[1], checkout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (checkout / "runs" / "tuning" / "tuned.json").exists()


def test_a_probe_is_judged_by_its_log(tmp_path, tiny_run):
    log = RunLog(tmp_path / "runlog.jsonl")
    for step, loss in enumerate([3.0, 2.0, 2.2, 1.9, 2.5, 1.0], start=1):
        log.write({"step": 2 * step, "valid_loss": loss})
    log.close()
    run = ProbeRun(tmp_path, tiny_run, max_ratio=1.3)
    assert run.judge(until_step=2) == (True, 2, None)
    assert run.judge(until_step=8) == (True, 8, pytest.approx(np.exp(0.2)))  # 2.2 after 2.0
    assert run.judge(until_step=10) == (False, 10, pytest.approx(np.exp(0.6)))  # 2.5 after 1.9
    assert run.last_step() == 12
    assert ProbeRun(tmp_path / "not begun", tiny_run, max_ratio=1.3).judge(9) == (True, 0, None)
