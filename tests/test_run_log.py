"""The log of a run survives kills, and the report reads it."""

import json
import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.command import slw

from seqlen_curriculum.analysis.drawing import draw_run
from seqlen_curriculum.analysis.read_run import load_run
from seqlen_curriculum.analysis.run import summarise
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.run_folder import run_log as runlog
from seqlen_curriculum.run_folder.run_log import RunLog, losses, read_run_log, records_after

ROOT = Path(__file__).parent.parent


def step_record(step, **changes):
    record = {
        "step": step,
        "seqlen": 8 * step,
        "rows": 4,
        "consumed_tokens": 16 * step * (step + 1),
        "loss": 5 - step / 10,
    }
    return {**record, "lr": 0.1, "grad_norm": 1.0, "seconds": 0.5, **changes}


def written(path, count):
    log = RunLog(path)
    for step in range(1, count + 1):
        log.write(step_record(step))
        if step % 2 == 0:
            log.write(
                {
                    "step": step,
                    "consumed_tokens": 16 * step * (step + 1),
                    "valid_loss": 4.0,
                    "valid_ppl": 54.6,
                    "seconds": 1,
                }
            )
    log.close()
    return path


def test_records_come_back_in_order(tmp_path):
    path = written(tmp_path / "runlog.jsonl", 4)
    assert [record["step"] for record in read_run_log(path)] == [1, 2, 2, 3, 4, 4]


def test_rewind_drops_later_records_and_a_torn_line(tmp_path):
    path = written(tmp_path / "runlog.jsonl", 4)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [record["step"] for record in read_run_log(path)][-1] == 4  # the torn line is not a record yet
    assert RunLog.rewind(path, 2) == 4
    assert [record["step"] for record in read_run_log(path)] == [1, 2, 2]
    assert RunLog.rewind(path, 2) == 0
    assert RunLog.rewind(tmp_path / "none.jsonl", 2) == 0


def test_bytes_that_are_no_text_do_not_stop_a_resume(tmp_path):
    path = written(tmp_path / "runlog.jsonl", 2)
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n")
    assert RunLog.rewind(path, 1) == 3


def test_rewind_counts_and_keeps_what_reading_every_line_would(tmp_path):
    path = written(tmp_path / "runlog.jsonl", 9)
    whole = path.read_bytes()
    for step in range(11):
        path.write_bytes(whole + b'{"step": 10, "lo')
        kept = [line for line in whole.splitlines(keepends=True) if json.loads(line)["step"] <= step]
        assert RunLog.rewind(path, step) == 14 - len(kept)  # 9 steps, 4 evaluations and the torn line
        assert path.read_bytes() == b"".join(kept)


def test_a_long_log_is_rewound_and_summed_without_being_held_in_memory(tmp_path):
    path, steps = tmp_path / "runlog.jsonl", 100_000
    with path.open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(step_record(step)) + "\n")
    assert path.stat().st_size > 12_000_000
    tracemalloc.start()
    least, count = math.inf, 0
    for loss in losses(path):
        least, count = min(least, loss), count + 1
    assert (least, count) == (5 - steps / 10, steps)
    assert sum(record["seconds"] for record in records_after(path, steps - 10)) == 5.0
    assert RunLog.rewind(path, steps - 10) == 10
    assert tracemalloc.get_traced_memory()[1] < 6_000_000
    tracemalloc.stop()
    assert RunLog.rewind(path, steps - 10) == 0


def test_losses_are_those_of_training_steps_in_whole_lines(tmp_path):
    path = written(tmp_path / "runlog.jsonl", 4)  # evaluations have a valid_loss
    log = RunLog(path)
    log.write({"step": 5, "seqlen": 40, "rows": 4, "consumed_tokens": 480, "skipped": True})
    log.write(step_record(6, loss=1e-05))
    log.write(step_record(7, loss=-2.5e16))
    log.write({"step": 8, "loss": 3})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 9, "loss": 2.5')
    expected = [record["loss"] for record in read_run_log(path) if "loss" in record]
    assert list(losses(path)) == expected
    assert expected[-3:] == [1e-05, -2.5e16, 3]


def test_a_write_cut_short_is_an_error(tmp_path):
    log = RunLog(tmp_path / "runlog.jsonl")
    whole = log._file
    log._file = SimpleNamespace(write=lambda line: whole.write(line[:5]), fileno=whole.fileno, close=whole.close)
    with pytest.raises(DataError, match=r"can't be written \(No space left"):
        log.write(step_record(1))
    log.close()
    assert RunLog.rewind(tmp_path / "runlog.jsonl", 0) == 1


def test_only_json_numbers_are_written(tmp_path):
    log = RunLog(tmp_path / "runlog.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        log.write(step_record(1, loss=float("nan")))
    log.close()


def test_a_damaged_line_is_an_error_with_its_number(tmp_path):
    path = written(tmp_path / "runlog.jsonl", 1)
    path.write_text("oops\n" + path.read_text())
    with pytest.raises(DataError, match=r"runlog\.jsonl: line 1 is not"):
        list(read_run_log(path))


def test_a_full_disk_is_reported_in_words(tmp_path):
    log = RunLog(tmp_path / "runlog.jsonl")
    log._file.close()
    log._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115  closed with the log
    with pytest.raises(DataError, match=r"runlog\.jsonl: can't be written"):
        log.write(step_record(1))
    log.close()


def test_summary_by_hand(tmp_path):
    written(tmp_path / "runlog.jsonl", 4)
    text = summarise(load_run(tmp_path))
    # lengths 8 to 32 of 4 rows: 32 + 64 + 96 + 128 = 320 tokens in 4 x 0.5 s
    assert "2 s, 160 tokens/s" in text
    assert "consumed tokens  320" in text
    assert "4.900 to 4.600" in text
    assert "4.000 at step 2 to 4.000 at step 4" in text


def test_skipped_steps_are_distinguished(tmp_path):
    log = RunLog(tmp_path / "runlog.jsonl")
    for step in range(1, 9):
        if step in (4, 5, 8):
            tokens = 16 * step * (step + 1)
            log.write({"step": step, "seqlen": 8 * step, "rows": 4, "consumed_tokens": tokens, "skipped": True})
        else:
            log.write(step_record(step))
    log.close()
    text = summarise(load_run(tmp_path))
    assert "steps            8, 3 of them skipped by rollbacks" in text
    assert "consumed tokens  1,152" in text
    # steps 1, 2, 3, 6 and 7 of 32 + 64 + 96 + 192 + 224 = 608 tokens in 5 x 0.5 s
    assert "2 s, 243 tokens/s" in text


def test_picture_of_a_run_without_evaluations(tmp_path):
    written(tmp_path / "runlog.jsonl", 1)
    draw_run([load_run(tmp_path)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_on_the_command_line(tmp_path):
    written(tmp_path / "runlog.jsonl", 4)
    result = slw("report", tmp_path, "--png", tmp_path / "curves.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "curves.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "runlog.jsonl"]
    assert json.loads((tmp_path / "runlog.jsonl").read_text().splitlines()[0])["step"] == 1


DAMAGES = {
    "launches of no list": ("run.json", '{"config": {}, "launches": 5}', "run.json: can't be read (launches: "),
    "a launch of nothing": ("run.json", '{"config": {}, "launches": [{}]}', "(launches.0.started: Field required)"),
    "no JSON": ("run.json", "{", "run.json: can't be read ("),
    "a rollback of nothing": ("rollbacks.json", "[{}]", "(0.step: Field required)"),
    "rollbacks of no list": ("rollbacks.json", "{}", "rollbacks.json: can't be read ("),
    "no seconds": ("runlog.jsonl", '{"step": 5, "loss": 2.0}', "the record of step 5 has seqlen None"),
    "a loss of NaN": ("runlog.jsonl", json.dumps({**step_record(5), "loss": math.nan}), "step 5 has loss nan"),
    "a step in words": ("runlog.jsonl", '{"step": "x"}', "is not a run log record"),
}


@pytest.mark.parametrize(("name", "text", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(tmp_path, name, text, message):
    written(tmp_path / "runlog.jsonl", 4)
    with (tmp_path / name).open("a") as file:
        file.write(text + "\n")
    with pytest.raises(DataError) as error:
        load_run(tmp_path)
    assert message in str(error.value)


def test_a_line_finished_while_the_log_is_read_is_not_taken_for_two(tmp_path, monkeypatch):
    path = tmp_path / "runlog.jsonl"
    whole = json.dumps(step_record(2)) + "\n"
    path.write_text(json.dumps(step_record(1)) + "\n" + whole[:30])
    parsed = runlog._parsed

    def finished_meanwhile(line):
        """The writer goes on once the reader has looked at the beginning of a line."""
        if not line.endswith("\n"):
            with path.open("a") as log:
                log.write(whole[30:])
        return parsed(line)

    monkeypatch.setattr(runlog, "_parsed", finished_meanwhile)
    assert [record["step"] for record in read_run_log(path)] == [1]
    monkeypatch.undo()
    with path.open("a") as log:
        log.write(whole[30:])
    assert [record["step"] for record in read_run_log(path)] == [1, 2]
