"""Run logs as TensorBoard's event files, read back with TensorBoard's own reader."""

import builtins

import numpy as np
import pytest
from helpers.synthetic_runs import BASE

from seqlen_curriculum import ConfigError
from seqlen_curriculum.analysis.event_files import check_event_folders, write_event_files
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.cli.report import main
from seqlen_curriculum.run_folder.run_log import RunLog

STARTED = "2026-01-02T03:04:05+00:00"
START = 1767323045  # date -d 2026-01-02T03:04:05Z +%s
MOMENTS = ("variance_norm", "variance_max", "momentum_norm", "momentum_max")
MACHINE = ("data_seconds", "checkpoint_seconds", "mfu", "peak_memory_bytes")
RUN = Run(
    "runs/a",
    [
        {**record, **{key: 0.5 + n for n, key in enumerate((*MOMENTS, *MACHINE))}} if record["step"] == 3 else record
        for record in BASE.records
    ]
    + [{"step": 5, "seqlen": 8, "rows": 4, "consumed_tokens": 500, "skipped": True}],
    {"launches": [{"started": STARTED}]},
)


def events(folder):
    """{tag: [(wall time, step, value)]} of an event file."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    return {
        tag: [(event.wall_time, event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def expected(run, start):
    """The same, from the log."""
    found, elapsed = {}, 0.0
    for record in run.records:
        elapsed += record.get("seconds", 0)
        valid = "valid_loss" in record
        for key, value in record.items():
            left_out = ("step", "rows", "consumed_tokens", "skipped", "seconds" if valid else "")
            if key in left_out or record.get("skipped"):
                continue
            at = (pytest.approx(start + elapsed), record["step"], float(np.float32(value)))
            found.setdefault(f"{'Valid' if valid else 'Train'}/{key}", []).append(at)
    return found


@pytest.mark.needs("tensorboard")
def test_every_value_of_the_log_is_in_the_event_files(tmp_path):
    other = Run("b", BASE.records)
    check_event_folders(tmp_path, ["runs/a", "b"])
    write_event_files([RUN, other], tmp_path)
    assert events(tmp_path / "runs/a") == expected(RUN, START)
    assert events(tmp_path / "b") == expected(other, 0)


def write_log(run):
    run.mkdir(parents=True)
    log = RunLog(run / "runlog.jsonl")
    for record in BASE.records:
        log.write(record)
    log.close()


@pytest.mark.needs("tensorboard")
def test_event_files_of_runs_with_one_name_stay_in_the_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for run in ("1/x", "2/x"):
        write_log(tmp_path / run)
    main(["../1/x", str(tmp_path / "2/x"), "--tensorboard", "events"])
    found = sorted(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*tfevents*"))
    assert found == ["here/events/1/x", "here/events/2/x"]


@pytest.mark.needs("tensorboard")
def test_events_are_never_added_to_others(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "events"
    write_log(run)
    main([str(run), "--tensorboard", str(out)])
    assert f"event files      {out}" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in (out / "run").iterdir()}
    with pytest.raises(ConfigError, match=r"--tensorboard .*run holds event files already; delete it"):
        main([str(run), "--tensorboard", str(out)])
    assert {path.name: path.read_bytes() for path in (out / "run").iterdir()} == before
    assert len(before) == 1


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"tensorboard is not installed; pip install 'seqlen-curriculum\[monitor\]'"):
        check_event_folders(tmp_path / "events", ["a"])
    assert not (tmp_path / "events").exists()
