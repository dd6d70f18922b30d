"""What a step reports to the log, the terminal and the monitors. No engine."""

import builtins
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.settings import changed

from seqlen_curriculum import RunConfig
from seqlen_curriculum.run_folder.run_log import read_run_log
from seqlen_curriculum.training import progress, utilization
from seqlen_curriculum.training.monitors import Monitors
from seqlen_curriculum.training.progress import Progress
from seqlen_curriculum.training.telemetry import Telemetry
from seqlen_curriculum.training.utilization import Utilization, precision_of, utilization_of

NO_MONITOR = SimpleNamespace(enabled=False)


@pytest.fixture
def config(tiny_run):
    return RunConfig.from_dict(tiny_run)


@pytest.fixture(autouse=True)
def rank_0(monkeypatch):
    monkeypatch.setattr(progress.dist, "get_rank", lambda: 0)


def step_record(timeline, step, **changes):
    record = {
        "step": step,
        "seqlen": timeline.seqlen(step),
        "rows": timeline.rows(step),
        "consumed_tokens": timeline.consumed_tokens(step),
        "loss": 5.0,
        "lr": 0.1,
        "grad_norm": 1.0,
        "seconds": 0.5,
    }
    return {**record, **changes}


def engine(fp16=False, bf16=False, autocast=None):
    return SimpleNamespace(
        fp16_enabled=lambda: fp16,
        bfloat16_enabled=lambda: bf16,
        torch_autocast_enabled=lambda: autocast is not None,
        torch_autocast_dtype=lambda: autocast,
    )


def test_mfu_by_hand(config):
    # 8 rows of 16 tokens in half a second, on devices of 1 GFLOP/s together
    flops = config.model.flops_per_token(16)
    assert Utilization(config.model, 1e9).mfu(16, 128, 0.5) == flops * 128 / 0.5 / 1e9
    assert Utilization(config.model, None).mfu(16, 128, 0.5) is None


def test_the_peak_is_that_of_all_cards_at_the_precision_of_the_engine(config, monkeypatch):
    monkeypatch.setattr(utilization, "card_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(utilization.dist, "get_world_size", lambda: 8)
    assert utilization_of(engine(bf16=True), config.model).peak_flops == pytest.approx(8 * 312e12)
    assert utilization_of(engine(), config.model).peak_flops == pytest.approx(8 * 19.5e12)
    monkeypatch.undo()
    assert utilization_of(engine(), config.model).peak_flops is None  # a CPU


def test_precision():
    assert precision_of(engine(fp16=True)) == "fp16"
    assert precision_of(engine(bf16=True)) == "bf16"
    assert precision_of(engine(autocast=torch.bfloat16)) == "bf16"
    assert precision_of(engine()) == "fp32"
    torch.set_float32_matmul_precision("high")
    try:
        assert precision_of(engine()) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_memory_of_a_device_is_that_since_the_last_step(monkeypatch):
    calls = []
    device = SimpleNamespace(
        device_name=lambda: "cuda",
        max_memory_allocated=lambda: calls.append("read") or 7,
        reset_peak_memory_stats=lambda: calls.append("reset"),
    )
    monkeypatch.setattr(utilization, "get_accelerator", lambda: device)
    assert utilization.peak_memory_bytes() == 7
    assert calls == ["read", "reset"]


def test_memory_of_a_process_on_a_cpu():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    assert utilization.peak_memory_bytes() == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_records_gain_what_the_step_made_of_the_machine(config, tmp_path):
    timeline = config.timeline()
    telemetry = Telemetry(tmp_path / "log", NO_MONITOR, 2, timeline, Utilization(config.model, 1e12))
    telemetry.step(step_record(timeline, 3))
    with telemetry.saving():
        pass
    telemetry.step(step_record(timeline, 4, data_seconds=0.125))
    telemetry.skipped_step({"step": 5, "consumed_tokens": timeline.consumed_tokens(5), "skipped": True})
    telemetry.step(step_record(timeline, 6))
    telemetry.close()
    third, fourth, fifth, sixth = read_run_log(tmp_path / "log")
    for record in (third, fourth, sixth):
        tokens = 8 * record["seqlen"]
        assert record["mfu"] == config.model.flops_per_token(record["seqlen"]) * tokens / 0.5 / 1e12
        assert record["peak_memory_bytes"] > 2**20
    assert ["checkpoint_seconds" in record for record in (third, fourth, fifth, sixth)] == [False, True, False, False]
    assert fourth["checkpoint_seconds"] >= 0
    assert fourth["data_seconds"] == 0.125


def test_other_ranks_report_nothing(config, tmp_path, capsys):
    telemetry = Telemetry(None, NO_MONITOR, 0, config.timeline(), Utilization(config.model, None))
    with telemetry.saving():
        telemetry.step(step_record(config.timeline(), 1))
    telemetry.close()
    assert capsys.readouterr() == ("", "")


def test_a_log_file_gets_lines_with_the_time(config, capsys, monkeypatch):
    timeline, clock = config.timeline(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = Progress(0, timeline)
    for step, now in ((1, 100.0), (2, 129.0), (3, 131.0), (4, 132.0), (timeline.steps, 133.0)):
        clock[0] = now
        shown.step(step_record(timeline, step, mfu=0.25, peak_memory_bytes=3 * 2**30, data_seconds=0.05), 64)
    shown.close()
    text = capsys.readouterr().err
    assert "\r" not in text
    assert [re.search(r" step (\d+)/", line)[1] for line in text.splitlines()] == ["1", "3", str(timeline.steps)]
    first = text.splitlines()[0]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d step 1/46, seqlen 8, tokens 64/", first)
    assert "128 tokens/s" in first  # 64 in half a second
    assert first.endswith("MFU 25%, 3.0 GiB, data 10%")


def test_a_terminal_has_a_bar(config, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    timeline = config.timeline()
    shown = Progress(0, timeline)
    shown.step(step_record(timeline, 1, mfu=None), 64)
    progress.log_rank0("a message")
    shown.close()
    assert "\r" in terminal.getvalue()
    assert "\ra message\n" in terminal.getvalue()
    assert "1/46" in terminal.getvalue()
    assert "MFU" not in terminal.getvalue()


def master(**monitors):
    names = ("tb_monitor", "wandb_monitor", "csv_monitor", "comet_monitor")
    return SimpleNamespace(**dict.fromkeys(names) | monitors)


def test_csv_files_are_opened_once_and_continued(tmp_path, monkeypatch):
    opened = []
    real = builtins.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path.name) or real(path, *a, **k))
    for first in (1, 4):  # a second launch
        monitors = Monitors(master(csv_monitor=SimpleNamespace(log_dir=str(tmp_path))), ["Train"])
        for step in range(first, first + 3):
            monitors.write("Train", {"loss": step / 8}, step, 100 * step)
        if first == 4:
            text = (tmp_path / "Train_loss.csv").read_text()  # before it is closed: a kill loses no step
        monitors.close()
    assert sorted(opened) == sorted(["Train_loss.csv", "Train-by-tokens_loss.csv"] * 2 + ["Train_loss.csv"])
    assert text.splitlines() == ["step,loss", *(f"{step},{step / 8}" for step in range(1, 7))]
    by_tokens = (tmp_path / "Train-by-tokens_loss.csv").read_text().splitlines()
    assert by_tokens == ["step,loss", *(f"{100 * step},{step / 8}" for step in range(1, 7))]


def test_other_monitors_get_both_axes_in_one_call():
    calls = []
    monitors = Monitors(master(tb_monitor=SimpleNamespace(write_events=calls.append)), ["Train"])
    monitors.write("Train", {"loss": 2.0, "lr": 0.5}, 3, 300)
    assert calls == [
        [
            ("Train/loss", 2.0, 3),
            ("Train/lr", 0.5, 3),
            ("Train-by-tokens/loss", 2.0, 300),
            ("Train-by-tokens/lr", 0.5, 300),
        ]
    ]


def test_hang_seconds_is_no_setting_that_identifies_a_run(tiny_run):
    longer = RunConfig.from_dict(changed(tiny_run, training__hang_seconds=30))
    assert longer.settings() == RunConfig.from_dict(tiny_run).settings()
