"""What the README says can be done is done: its configuration, its example, its commands."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from helpers.command import slw
from helpers.launching import forked, launch
from helpers.settings import changed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_loop_trains(tmp_path):
    # lengths 8, 16, 16, 24, ... 64 of 8 rows: 5,952 tokens in 20 steps, then 512 a step to 15,000
    status, output = launch(tmp_path / "log", "examples/own_loop.py", ranks=2, launcher=forked)
    assert status == 0, output
    assert re.search(r"(\d+) steps, 15\d\d\d tokens, last length 64, loss \d", output)


def test_the_benchmark_of_data_finds_and_reads(tmp_path):
    sizes = ["--find-tokens", "1e7", "--read-tokens", "2e5", "--rounds", "1", "--folder", str(tmp_path)]
    config = [
        "--config",
        "configs/tiny_cpu.json",
        "--set",
        "data.leftovers=recycle",
        "--out",
        str(tmp_path / "records.json"),
    ]
    result = slw("benchmark", "data", *config, *sizes, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "10,000,000 tokens" in result.stdout
    records = json.loads((tmp_path / "records.json").read_text())
    assert [record["seqlen"] for record in records["reading"]] == [8, 16, 32, 64, 128, 256]
    ways = {"milliseconds", "gather_milliseconds", "pread_milliseconds"}
    assert all(record[state].keys() == ways for record in records["reading"] for state in ("warm", "cold"))
    assert [path.name for path in tmp_path.iterdir()] == ["records.json"]  # its files are gone


def test_the_benchmark_of_the_loop_trains_the_same_in_both(tmp_path, tiny_run):
    config, records = tmp_path / "run.json", tmp_path / "record.json"
    config.write_text(json.dumps(changed(tiny_run, model__dropout=0.0)))
    arguments = ["--config", config, "--rounds", 2, "--steps", 3, "--out", records]
    status, output = launch(tmp_path / "log", "scripts/benchmark.py", "loop", *arguments, launcher=forked)
    assert status == 0, output
    record = json.loads(records.read_text())
    assert record["loss_difference"] == 0  # the same training, or the comparison means nothing
    # Steps 4 to 9 of 8 rows: three of 12 tokens, three of 16, by 8 + 24 t / 20 down to a multiple of 4.
    assert record["step_tokens"] == 8 * (3 * 12 + 3 * 16) / 6
    assert record["cpu_ratio"] > 0
    assert "times the CPU time of a bare loop" in output


def test_the_benchmark_measures_every_length_and_draws_it(tmp_path):
    # In a pipeline, where rows that stay while their length changes would go wrong unless the stages are message.
    sizes = [
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.vocab_size=128",
        "train_batch_size=16",
        "pipeline.stages=2",
    ]
    sets = [part for size in sizes for part in ("--set", size)]
    outputs = ["--out", tmp_path / "records.json", "--png", tmp_path / "picture.png"]
    kinds = ["--kinds", "fixed", "balanced", "segment", "window"]
    arguments = ["--config", "configs/throughput_cpu.json", "--lengths", 8, 200, "--rounds", 1, *kinds, *sets, *outputs]
    status, output = launch(
        tmp_path / "log", "scripts/benchmark.py", "throughput", *arguments, ranks=2, launcher=forked
    )
    assert status == 0, output
    records = json.loads((tmp_path / "records.json").read_text())["throughput"]
    rows = [(record["seqlen"], record["kind"], record["micro_batch_rows"]) for record in records]
    # 16 rows, 1024 tokens a micro-batch, 2 micro-batches at least: 5 rows of 200 would fit, 4 divide
    # 64 segments of 8 are 1024 rows in micro-batches of 128; of 200 there are 2 a sample, 32 in all
    assert rows[:4] == [(8, "fixed", 2), (8, "balanced", 8), (8, "segment", 128), (8, "window", 2)]
    assert rows[4:8] == [(200, "fixed", 2), (200, "balanced", 4), (200, "segment", 4), (200, "window", 2)]
    assert rows[8:] == [(512, kind, 2) for kind in ("fixed", "balanced", "segment", "window")]
    assert records[8]["of_full_length"] == 1.0
    assert all(record["tokens_per_second"] > 0 for record in records)
    assert all(record["moments_of_step"] > 0 for record in records)
    assert "| 200 | 2 |" in output
    assert "measuring Adam's variance and momentum once: " in output
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_file_that_is_named_exists():
    names = set(re.findall(r"(?:scripts|configs|examples|docs)/[\w./]+\.\w+", README))
    names |= {f"configs/paper/{name}.json" for name in re.findall(r"`(gpt[23]_[\w.]+)`", README)}
    assert len(names) > 12
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
