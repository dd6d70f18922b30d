"""The throughput of Hugging Face's Trainer: what is trained and how it is counted, on a fake clock and in a short run."""

import json
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from helpers.settings import changed

pytest.importorskip("accelerate")

from seqlen_curriculum.analysis.benchmark import describe_trainer
from seqlen_curriculum.cli import benchmark as command
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.integrations import trainer_benchmark
from seqlen_curriculum.integrations.trainer_benchmark import _Case, _Clock, _records


@pytest.fixture
def run_file(tiny_run, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(changed(tiny_run, train_micro_batch_size_per_gpu=2)))
    return str(path)


def test_blocks_of_steps_are_timed_by_case(monkeypatch):
    # Step 1 ends at second 1, step 2 at 1 + 2, step 3 at 1 + 2 + 3, and so on; the CPU needs half of it.
    ends = iter([number * (number + 1) / 2 for number in range(1, 100)])
    current = [0.0]
    monkeypatch.setattr(trainer_benchmark.time, "perf_counter", lambda: current[0])
    monkeypatch.setattr(trainer_benchmark.time, "process_time", lambda: current[0] / 2)
    clock = _Clock([_Case(8, False), _Case(8, True)], steps=2)
    clock.trainer = SimpleNamespace(balances=None)
    balanced = []
    for step in range(12):  # three rounds of two cases, of which the first round is a warmup
        state = SimpleNamespace(global_step=step)
        clock.on_step_begin(None, state, None)
        balanced.append(clock.trainer.balances)
        current[0], state.global_step = next(ends), step + 1
        clock.on_step_end(SimpleNamespace(device=torch.device("cpu")), state, None)
    assert balanced == [False, False, True, True] * 3
    plain, other = clock.blocks(2)
    assert [time.wall for time in plain] == [5 + 6, 9 + 10]
    assert [time.wall for time in other] == [7 + 8, 11 + 12]
    assert [time.cpu for time in other] == [7.5, 11.5]


def test_records_count_the_tokens_of_a_block():
    cases = [_Case(8, False), _Case(8, True), _Case(32, False), _Case(32, True)]
    seconds = [[4.0, 2.0, 2.0], [1.0, 1.0, 1.0], [4.0, 4.0, 4.0], [5.0, 5.0, 5.0]]
    blocks = [[trainer_benchmark._Time(wall, wall / 4) for wall in walls] for walls in seconds]
    records = _records(cases, blocks, block_rows=16, micro_batch=2, rows=8, full=32)
    # 16 rows of 8 tokens in 2 seconds are 64 tokens/s; 16 rows of 32 tokens in 4 seconds are 128.
    assert [record["tokens_per_second"] for record in records] == [64, 128, 128, 102.4]
    assert [record["of_full_length"] for record in records] == [0.5, 1, 1, 0.8]
    assert [record["micro_batch_rows"] for record in records] == [2, 8, 2, 2]
    assert records[0]["cpu_seconds_per_million_tokens"] == 0.5 / 128 * 1e6
    text = describe_trainer(
        {"device": "a GPU", "precision": "bf16", "parameters": 1234, "versions": {"torch": "2"}, "trainer": records}
    )
    assert text.startswith("a GPU, bf16, 1,234 parameters, torch 2\n")
    assert "| 8 | 2 | 64 (0.50) | 3906.2 | 8 | 128 (1.00) | 1953.1 |" in text


def test_the_command_trains_every_length(run_file, monkeypatch, capsys, tmp_path):
    seen, clock = [], count()
    monkeypatch.setattr(trainer_benchmark.time, "perf_counter", lambda: float(next(clock)))
    step = trainer_benchmark.SequenceLengthWarmupTrainer._balanced

    def recorded(trainer, held):
        micro_batches = step(trainer, held)
        seen.append((trainer.state.global_step, [tuple(batch["input_ids"].shape) for batch in micro_batches]))
        return micro_batches

    monkeypatch.setattr(trainer_benchmark.SequenceLengthWarmupTrainer, "_balanced", recorded)
    command.main(["trainer", run_file, "--lengths", "8", "--rounds", "1", "--steps", "1", "--device", "cpu", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["device"].startswith("CPU, ")
    assert [(record["seqlen"], record["kind"]) for record in result["trainer"]] == [
        (seqlen, kind) for seqlen in (8, 32) for kind in ("plain", "balanced")
    ]
    # Two rounds of four steps of 8 rows: every second step is balanced, of one micro-batch at 8 and of four at 32.
    assert seen == [(step, [(8, 8)] if step % 4 == 1 else [(2, 32)] * 4) for step in (1, 3, 5, 7)]
    # The fake clock counts one second per block.
    assert [record["tokens_per_second"] for record in result["trainer"]] == [64, 64, 256, 256]


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--lengths", "64"], r"--lengths \[64\]"), (["--steps", "0"], "--steps: 0"), (["--rounds", "0"], "--rounds: 0")],
)
def test_bad_flags_are_named(run_file, words, named):
    with pytest.raises(ConfigError, match=named):
        command.main(["trainer", run_file, *words])
