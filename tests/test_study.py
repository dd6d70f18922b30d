"""Studies whose runs a stand-in writes by formula (helpers/fake_train.py), and a real one that is killed."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers.command import slw
from helpers.launching import ROOT, wait_until
from helpers.settings import changed
from helpers.synthetic_runs import synthetic

from seqlen_curriculum import CheckpointError, ConfigError, DivergenceError, RunConfig
from seqlen_curriculum.analysis.study_tables import study_tables
from seqlen_curriculum.cli.study import job_slots
from seqlen_curriculum.files import is_locked, read_json
from seqlen_curriculum.study import run_folders
from seqlen_curriculum.study.cost import arm_costs
from seqlen_curriculum.study.execute import train_all
from seqlen_curriculum.study.progress import Progress, train
from seqlen_curriculum.study.report import (
    device_warnings,
    edge_warnings,
    reference_arm,
    study_results,
    study_sentences,
)
from seqlen_curriculum.study.results import Trained, best_rates, clock_of, mean_final_loss, reduction
from seqlen_curriculum.study.run_folders import StudyRun, check_unchanged
from seqlen_curriculum.study.study_file import read_study
from seqlen_curriculum.tuning.launching import group_of

FAKE = Path(__file__).parent / "helpers" / "fake_train.py"
STUDY = {
    "run": "run.json",
    "cases": {"constant": {"curriculum_learning": None}, "slw": {}},
    "rates": [0.002, 0.004, 0.5],
    "tuning_seeds": [11, 12],
    "seeds": [1, 2, 3],
}


@pytest.fixture
def fake_training(monkeypatch):
    monkeypatch.setattr(run_folders, "TRAIN", (sys.executable, "-S", str(FAKE)))


def write_study(folder, run, **changes):
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "study.json").write_text(json.dumps({**STUDY, **changes}))
    return folder / "study.json"


def starts(save):
    return (save / "starts.txt").read_text().splitlines() if (save / "starts.txt").exists() else []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_run):
    """Return the folder of a study, and the output of its command."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folders, "TRAIN", (sys.executable, "-S", str(FAKE)))
        result = slw("study", write_study(folder, tiny_run), "--save", folder / "save", "--jobs", 3)
    assert result.returncode == 0, result.stderr
    return folder / "save", result


@pytest.fixture(scope="module")
def results(finished):
    return read_json(finished[0] / "report" / "report.json")["study"]


def test_every_run_is_trained_once(finished):
    save, result = finished
    names = [f"{case}/lr{rate}-seed{seed}" for case in STUDY["cases"] for rate in STUDY["rates"] for seed in (11, 12)]
    names += [f"{case}/lr0.004-seed{seed}" for case in STUDY["cases"] for seed in (1, 2, 3)]
    assert sorted(starts(save)) == sorted(names)
    for name in names:
        assert read_json(save / "runs" / f"{name}.json")["training"]["seed"] == int(name.partition("seed")[2])
    assert "18/18  " in result.stderr
    assert result.stderr.count("diverged") == 4 + 2  # its runs, and a warning per case


def test_the_best_rate_is_chosen_on_the_tuning_seeds(results):
    for case, gain in (("constant", 0.0), ("slw", 0.3)):
        tried = next(each["rates"] for each in results["tuning"]["cases"] if each["name"] == case)
        assert [each["mean_final_valid_loss"] for each in tried] == [
            pytest.approx(3.1115 - gain),
            pytest.approx(3.0115 - gain),
            None,  # 0.5 diverges
        ]
        assert [each["diverged"] for each in tried] == [0, 0, 2]
    assert {case["rate"] for case in results["cases"]} == {0.004}


def test_the_costs_to_the_references_loss(results):
    """Constant ends at 3.001, 3.002 and 3.003, mean 3.002, and slw is 0.3 lower: below it from its third quarter on.

    A quarter takes constant 2 s and slw 1 s: 8 s over 3 s, and four quarters of the tokens over three.
    """
    constant, slw_ = results["cases"]
    assert results["target"] == pytest.approx(3.002)
    assert (results["reference"], results["clock"], results["chosen"]) == ("constant", "CPU", "slw")
    assert slw_["final_valid_loss"] == pytest.approx([2.701, 2.702, 2.703])
    assert slw_["range"] == pytest.approx([2.701, 2.703])
    assert (slw_["reached"], slw_["seeds"], constant["reached"]) == (3, 3, 2)
    assert slw_["tokens"] == {"ratio": pytest.approx(9500 / 7125), "interval": pytest.approx([9500 / 7125] * 2)}
    assert slw_["time"] == {"ratio": pytest.approx(8 / 3), "interval": pytest.approx([8 / 3] * 2)}
    # Two of three constant runs reach their own mean, but not if most of a resample is the third.
    assert constant["time"] == {"ratio": 1.0, "interval": [0.0, 1.0]}
    assert constant["largest_variance_max"] == pytest.approx(0.16)


def test_the_cost_of_tuning_is_that_of_all_its_runs(results, tiny_run):
    cost = results["tuning"]["cost"]
    plans = [RunConfig.from_dict({**tiny_run, "curriculum_learning": block}).timeline() for block in
             (None, tiny_run["curriculum_learning"])]  # fmt: skip
    whole = [plan.consumed_tokens(plan.steps) for plan in plans]
    one_step = [plan.consumed_tokens(1) for plan in plans]  # four runs diverge after it
    assert (cost["runs"], cost["tokens"]) == (12, 4 * sum(whole) + 2 * sum(one_step))
    assert cost["trainings"] == pytest.approx(cost["tokens"] / whole[0])
    assert cost["seconds"] == pytest.approx(4 * 8.0 + 4 * 4.0 + 2 * 2.0 + 2 * 1.0)


def test_the_result_is_the_configuration_of_the_best_case(finished, tiny_run):
    assert read_json(finished[0] / "tuned.json") == changed(tiny_run, optimizer__params__lr=0.004)


def test_what_is_printed_is_in_the_report(finished, results):
    save, result = finished
    numbers = read_json(save / "report" / "report.json")
    for table in study_tables(numbers):
        assert table.as_text() in result.stdout
    row = next(line for line in result.stdout.splitlines() if line.startswith("constant "))
    assert row.split() == ["constant", "0.004", "3.002", *["3.001", "to", "3.003", "2", "of", "3", "1.0x", "1.0x"]]
    page = (save / "report" / "report.html").read_text()
    assert "slw at learning rate 0.004 has the lowest mean final validation loss on the tuning seeds." in page
    assert (
        "On 3 other seeds it ends at 2.702, and 3 of 3 runs reach constant&#39;s mean final loss of 3.002, in 2.7x"
        in page
    )
    assert "It has the lowest mean loss on these seeds too." in page
    assert 'data-key="study/cases/1/time/ratio">2.7x' in page


def test_nothing_is_trained_again(finished, fake_training):
    save, before = finished[0], starts(finished[0])
    plan = read_study(save.parent / "study.json")
    planned = [*plan.tuning_runs(), *plan.measured_runs({"constant": 0.004, "slw": 0.004})]
    progress = Progress(planned, arm_costs(plan))
    runs = train(save, planned, [{}], progress)
    assert starts(save) == before
    assert runs["slw", 0.004, 3].final_loss == pytest.approx(2.703)


def test_settings_of_trained_runs_must_not_change(finished, tiny_run, tmp_path):
    save, _ = finished
    longer = {**tiny_run, "training": {**tiny_run["training"], "train_tokens": 19_000}}
    result = slw("study", write_study(tmp_path, longer), "--save", save)
    assert result.returncode == 1
    assert "lr0.002-seed11: was trained with training.train_tokens 9500, the study has 19000" in result.stderr
    assert "and 13 other runs" in result.stderr
    assert "move these folders away" in result.stderr
    check_unchanged(
        [StudyRun(save, run) for run in read_study(write_study(tmp_path, tiny_run, seeds=[1, 7])).tuning_runs()]
    )


def test_the_users_file_is_not_overwritten(tmp_path, tiny_run):
    file = write_study(tmp_path, tiny_run)
    before = file.read_text()
    result = slw("study", file, "--save", tmp_path)
    assert result.returncode == 1
    assert f"--save {tmp_path}: its study.json was not written by slw study" in result.stderr
    assert file.read_text() == before


def test_a_reference_that_diverges_stops_the_study_before_other_runs(tmp_path, tiny_run, fake_training):
    cases = {"constant": {"curriculum_learning": None}, "slw": {}}
    plan = read_study(write_study(tmp_path, tiny_run, cases=cases, rates=[0.5]))
    progress = Progress(
        [*plan.tuning_runs(), *plan.measured_runs({arm.name: None for arm in plan.arms})], arm_costs(plan)
    )
    runs = train(tmp_path / "save", plan.tuning_runs(), [{}], progress)
    rates = best_rates(plan, runs)
    assert edge_warnings(plan, rates, runs) == [
        f"{name}: diverged at every rate, so it is not compared; give lower rates" for name in cases
    ]
    with pytest.raises(DivergenceError, match="reference: constant diverged at every rate"):
        reference_arm(plan, rates, runs)


def test_a_case_that_diverges_is_not_waited_for(capsys, tmp_path, tiny_run, fake_training):
    diverging = {"optimizer": {"params": {"lr": 0.5}}}
    plan = read_study(write_study(tmp_path, tiny_run, cases={"a": {}, "b": diverging}, rates=[], tuning_seeds=[]))
    everything = plan.measured_runs({"a": None, "b": None})
    progress = Progress(everything, arm_costs(plan))
    progress.leave_out([run for run in everything if run.arm.name == "b"])
    train(tmp_path / "save", plan.measured_runs({"a": None}), [{}], progress)
    assert capsys.readouterr().err.splitlines()[-1].startswith("3/3  a/seed3: ")
    assert capsys.readouterr().err == ""


def test_a_folder_of_something_else_is_refused(tmp_path, tiny_run):
    (tmp_path / "save").mkdir()
    (tmp_path / "save" / "thesis.txt").write_text("")
    result = slw("study", write_study(tmp_path, tiny_run), "--save", tmp_path / "save")
    assert result.returncode == 1
    assert "contains other files and no study.json" in result.stderr
    result = slw("study", tmp_path / "study.json", "--save", tmp_path / "new", "--jobs", 0)
    assert "--jobs: 0 is not valid" in result.stderr
    result = slw(
        "study",
        write_study(tmp_path, tiny_run, cases={"a": {"data": {"train": ["nowhere"]}}}),
        "--save",
        tmp_path / "new",
    )
    assert result.returncode == 1
    assert "nowhere" in result.stderr
    assert not (tmp_path / "new").exists()


# --- resuming and stopping


@pytest.fixture
def runs(tmp_path, tiny_run, fake_training):
    plan = read_study(write_study(tmp_path, tiny_run, rates=[0.004], tuning_seeds=[11]))
    (tmp_path / "save").mkdir()
    return [StudyRun(tmp_path / "save", run) for run in plan.measured_runs({"constant": 0.004, "slw": 0.004})]


def test_finished_runs_are_kept_and_others_resume(runs, tmp_path):
    ended = []
    train_all(runs[:2], [{}], ended.append)
    assert ended == runs[:2]
    assert all(run.has_ended for run in runs[:2])
    log = runs[1].save / "runlog.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))  # killed before the last evaluation
    assert [run.has_ended for run in runs[:3]] == [True, False, False]
    train_all([run for run in runs[:3] if not run.has_ended], [{}, {}], ended.append)
    assert sorted(starts(tmp_path / "save")) == sorted(run.planned.name for run in (*runs[:2], *runs[1:3]))


def test_a_run_that_survived_a_killed_command_is_waited_for(runs, tmp_path):
    wait, ended = tmp_path / "save" / "wait", []
    wait.touch()
    survivor = runs[1].start({})
    wait_until(lambda: starts(tmp_path / "save"), "the run did not start")
    assert runs[1].is_running
    assert runs[1].group == survivor.pid
    threading.Timer(0.5, wait.unlink).start()
    train_all(runs[:2], [{}] * 2, ended.append)  # two free slots, one of which the survivor uses
    survivor.wait()
    assert ended == [runs[1], runs[0]]
    assert starts(tmp_path / "save") == [runs[1].planned.name, runs[0].planned.name]


class Interrupted(StudyRun):
    """A run that is started when all others train, and is interrupted then."""

    def start(self, _):
        wait_until(lambda: len(starts(self.folder)) == 2, "the runs did not start")
        raise KeyboardInterrupt


def test_an_interrupt_stops_all_runs(runs, tmp_path):
    (tmp_path / "save" / "wait").touch()
    with pytest.raises(KeyboardInterrupt):
        train_all([*runs[:2], Interrupted(tmp_path / "save", runs[2].planned)], [{}] * 3, lambda _: None)
    assert not any(run.is_running or run.has_ended for run in runs)


def test_an_interrupt_stops_a_run_that_survived_a_killed_command(runs, tmp_path, monkeypatch):
    (tmp_path / "save" / "wait").touch()
    survivor = runs[0].start({})
    wait_until(lambda: starts(tmp_path / "save"), "the run did not start")
    sleep, interrupts = time.sleep, [KeyboardInterrupt]

    def interrupted(seconds):
        if interrupts:
            raise interrupts.pop()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_all(runs[:2], [{}], lambda _: None)
    assert survivor.wait() == -signal.SIGTERM
    assert not any(run.is_running or run.has_ended for run in runs)


def test_a_run_that_fails_stops_the_study(runs, tmp_path):
    (tmp_path / "save" / "fail").touch()
    with pytest.raises(CheckpointError, match=r"seed1.log: the run ended with status 1 .*\nerror: no memory left"):
        train_all(runs, [{}], lambda _: None)
    assert len(starts(tmp_path / "save")) == 1
    assert not runs[0].has_ended


def test_divergence_is_remembered(tmp_path, tiny_run, fake_training):
    plan = read_study(write_study(tmp_path, tiny_run))
    run = StudyRun(tmp_path / "save", plan.run(plan.arms[0], 0.5, 1))
    (tmp_path / "save").mkdir()
    train_all([run], [{}], lambda _: None)
    assert run.has_ended
    assert run.beside("diverged").read_text() == "error: the loss is nan\n"
    assert Trained(run.read()).final_loss is None


def test_each_run_has_a_device_or_a_core_of_its_own(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert job_slots(None) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    assert job_slots(1) == [{"CUDA_VISIBLE_DEVICES": "3"}]
    with pytest.raises(ConfigError, match="--jobs: 3 runs need as many accelerators, this machine has 2"):
        job_slots(3)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert job_slots(None) == [{}] * 4
    assert job_slots(7) == [{}] * 7


# --- numbers by hand


def trained(losses, seconds, **changes):
    """Return a run with an evaluation after each step, whose budget is that of its steps."""
    info = {"config": {"training": {"train_tokens": 100 * len(losses)}}}
    return Trained(synthetic("x", losses, dict(enumerate(losses, 1)), seconds=seconds, info=info, **changes))


def test_ratios_of_medians():
    theirs = [trained([3.0, 2.5, 2.2], 4.0), trained([3.0, 2.4, 2.0], 4.0)]
    ours = [trained([2.3, 2.1], 3.0), trained([2.05, 2.0], 1.0)]
    times, our_times = ([run.over_time("seconds") for run in runs] for runs in (theirs, ours))
    assert mean_final_loss(times) == pytest.approx(2.1)
    assert reduction(times, our_times) == pytest.approx(12 / 3.5)  # 12 s over the median of 6 s and 1 s
    tokens, our_tokens = ([run.over_tokens() for run in runs] for runs in (theirs, ours))
    assert reduction(tokens, our_tokens) == pytest.approx(300 / 150)
    assert reduction([tokens[1]] * 2, [our_tokens[1]] * 2) == pytest.approx(300 / 200)  # 2.05 is not yet 2.0
    assert reduction([None, tokens[1]], our_tokens) == 0.0  # half of ours never reach 2.0
    assert math.isnan(reduction([None, None], our_tokens))
    assert math.isnan(mean_final_loss([None]))


def test_rollbacks_take_time():
    rollback = {"step": 2, "loss": 9.0, "ratio": 3.0, "returned_to": 1, "skipped": [2, 2], "seconds": 10.0}
    run = trained([3.0, 2.5, 2.2], 4.0, rollbacks=[rollback])
    curve = run.over_time("seconds")
    assert curve.costs.tolist() == [4.0, 18.0, 22.0]
    assert curve.until(2.5) == 18.0
    assert curve.until(2.0) == math.inf


def test_the_clock_is_that_of_all_runs():
    with_cpu_time = trained([3.0, 2.5], 4.0)
    assert clock_of([with_cpu_time]) == "seconds"
    for record in with_cpu_time.run.records:
        record["cpu_seconds"] = 1.0
    assert clock_of([with_cpu_time]) == "cpu_seconds"
    assert with_cpu_time.over_time("cpu_seconds").costs.tolist() == [1.0, 2.0]
    assert clock_of([with_cpu_time, trained([3.0, 2.5], 4.0)]) == "seconds"
    rolled_back = replace(with_cpu_time.run, rollbacks=[{"returned_to": 1, "seconds": 10.0}])
    assert clock_of([Trained(rolled_back)]) == "seconds"  # the CPU time of undone steps is unknown
    with_cpu_time.run.info["launches"] = [{"device": {"accelerator": "H200", "cpu": "Xeon"}}]
    assert clock_of([with_cpu_time]) == "seconds"
    other = trained([3.0], 4.0)
    other.run.info["launches"] = [{"device": {"accelerator": None, "cpu": "Xeon"}}]
    runs = {("a", None, 1): with_cpu_time, ("a", None, 2): other}
    assert device_warnings(runs) == [
        "runs were trained on different devices (H200, Xeon), so their times can't be compared"
    ]
    assert device_warnings({("a", None, 1): other, ("b", None, 1): trained([3.0], 4.0)}) == []


def test_a_study_without_rates_compares_the_cases_as_they_are(tmp_path, tiny_run, fake_training):
    file = write_study(tmp_path, tiny_run, rates=[], tuning_seeds=[], seeds=[1, 2])
    plan = read_study(file)
    rates = best_rates(plan, {})
    runs = train(
        tmp_path / "save", plan.measured_runs(rates), [{}, {}], Progress(plan.measured_runs(rates), arm_costs(plan))
    )
    results = study_results(plan, rates, runs, arm_costs(plan))
    assert (results["chosen"], results["tuning"]) == (None, None)
    assert [case["rate"] for case in results["cases"]] == [5e-3, 5e-3]
    assert study_sentences(results) == []


def test_the_sentence_says_more_or_less_time_and_who_finished():
    case = {"name": "slw", "rate": 3e-3, "mean_final_valid_loss": 2.5, "seeds": 5, "reached": 5, "diverged": 0}
    other = {**case, "name": "constant", "mean_final_valid_loss": 2.6}
    tuning = {"cost": {"runs": 4, "tokens": 400, "flops": None, "seconds": 3600.0, "trainings": 4.0}}

    def sentence(ratio, interval, chosen="slw", finished=5):
        cases = [{**each, "time": {"ratio": ratio, "interval": interval}} for each in (case, other)]
        results = {"cases": cases, "chosen": chosen, "reference": "constant", "target": 2.6, "finished": finished}
        return study_sentences({**results, "clock": "CPU", "tuning": tuning})[1]

    start = "On 5 other seeds it ends at 2.500, and 5 of 5 runs reach constant's mean final loss of 2.600"
    assert sentence(4.0, [3.0, 5.0]) == f"{start}, in 4.0x less CPU time (95% interval: 3.0x to 5.0x)."
    assert sentence(0.5, [0.5, 0.5]) == f"{start}, in 2.0x the CPU time of a whole run of it."
    assert sentence(0.0, [0.0, 1.0]) == f"{start}."
    assert sentence(4.0, None, finished=2) == f"{start} (2 of its runs finished), in 4.0x less CPU time."
    assert "reach constant's mean final loss of 2.600." in sentence(1.1, [0.0, 1.2], chosen="constant")


# --- a real study


def has_started(save, count, process):
    """Return whether so many runs of a study have made a step, or the study has ended."""
    logs = [path for path in save.rglob("runlog.jsonl") if path.stat().st_size]
    return len(logs) >= count or process.poll() is not None


@pytest.mark.slow
def test_a_killed_study_ends_as_an_uninterrupted_one(tmp_path, tiny_run):
    run = {**tiny_run, "training": {**tiny_run["training"], "log_sample_ids": False}}
    file = write_study(tmp_path, run, rates=[2e-3, 5e-3], tuning_seeds=[11], seeds=[1])
    command = [sys.executable, "-m", "seqlen_curriculum", "study", str(file), "--jobs", "2", "--save"]
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True, cwd=ROOT)
    assert whole.returncode == 0, whole.stderr
    save = tmp_path / "killed"
    for started, survive in ((2, True), (5, False)):  # in the first part, then in the second
        process = subprocess.Popen([*command, str(save)], cwd=ROOT)
        wait_until(partial(has_started, save, started, process), "the study hung", seconds=300)
        assert process.poll() is None
        process.kill()
        process.wait()
        for lock in save.rglob("*.launch"):
            if is_locked(lock) and not survive:
                os.killpg(group_of(lock), signal.SIGKILL)
    killed = subprocess.run([*command, str(save)], capture_output=True, text=True, cwd=ROOT)
    assert killed.returncode == 0, killed.stderr
    first, second = (read_json(folder / "report" / "report.json")["study"] for folder in (tmp_path / "whole", save))
    for one, other in zip(first["cases"], second["cases"], strict=True):
        assert one["final_valid_loss"] == other["final_valid_loss"]
        assert one["rate"] == other["rate"]
    assert first["clock"] == "CPU"
    assert read_json(tmp_path / "whole" / "tuned.json") == read_json(save / "tuned.json")
