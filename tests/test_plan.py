"""plan.py: the paper's Table 2 from the shipped files, in under a second, as text, JSON and a picture."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command import slw
from helpers.launching import limit
from helpers.wrong_files import changed

from seqlen_curriculum import ConfigError, RunConfig
from seqlen_curriculum.planning.summary import describe, plan

ROOT = Path(__file__).parent.parent


def run_plan(*arguments):
    return slw("plan", *arguments, cwd=ROOT)


@pytest.mark.parametrize(
    ("name", "steps", "at", "tokens", "full"),
    [
        ("gpt2_117m_bsz512_seqlen1k_slw60k", 330_000, 200_000, 89e9, 60_000),
        ("gpt2_117m_bsz4k_seqlen1k_slw30k", 52_500, 37_000, 92e9, 30_000),
        ("gpt2_117m_bsz512_seqlen2k_slw110k", 205_000, 122_500, 71e9, 110_000),
        ("gpt2_1.5b_bsz512_seqlen1k_slw270k", 428_000, 360_000, 122e9, 270_000),
        ("gpt2_1.5b_bsz4k_seqlen1k_slw45k", 58_800, 50_000, 121e9, 45_000),
        ("gpt2_1.5b_bsz4k_seqlen1k_shortformer20k", 55_000, 55_000, 157e9, 20_001),
        ("gpt2_1.5b_bsz4k_seqlen1k_bszwarmup", 58_800, 58_800, 157e9, 1),
        ("gpt2_117m_bsz512_seqlen1k", 300_000, 300_000, 157e9, 1),
        ("gpt2_117m_bsz4k_seqlen1k", 37_500, 37_500, 157e9, 1),
        ("gpt2_117m_bsz512_seqlen2k", 150_000, 150_000, 157e9, 1),
        ("gpt2_1.5b_bsz512_seqlen1k", 300_000, 300_000, 157e9, 1),
        ("gpt2_1.5b_bsz4k_seqlen1k", 37_500, 37_500, 157e9, 1),
    ],
)
def test_table_2_from_the_shipped_files(name, steps, at, tokens, full):
    summary = plan(RunConfig.load(ROOT / "configs" / "paper" / f"{name}.json"), at=[at])
    digits = -3 if steps > 400_000 else -2  # 428K is printed without decimals
    assert round(summary["steps"], digits) == steps
    assert summary["full_length_step"] == full
    (milestone,) = (m for m in summary["milestones"] if m["step"] == at)
    assert round(milestone["consumed_tokens"], -9) == tokens
    assert summary["milestones"][-1]["lr"] == 1e-5
    assert summary["sample_tokens"] == summary["consumed_tokens"] + summary["dropped_tokens"]


def test_the_plan_lists_the_last_stable_step():
    wsd = {"type": "TokenWSDLR", "params": {"warmup_steps": 3, "decay_tokens": 40_000}}
    config = RunConfig.from_dict(changed(scheduler=wsd))
    lr = {milestone["step"]: milestone["lr"] for milestone in plan(config)["milestones"]}
    rate, tokens = config.plan.learning_rate(), config.timeline().consumed_tokens
    (last,) = (step for step in lr if tokens(step) <= 60_000 < tokens(step + 1))
    assert lr[last] == 1e-3 > rate(last + 1)
    assert list(lr.values())[-1] == 0


@pytest.mark.parametrize(
    ("name", "rows", "rate", "least_rate", "decay_tokens", "tokens", "lengths"),
    [
        ("gpt3_125m_bsz256_300b", (16, 256), 6e-4, 6e-5, 260e9, 300e9, (2048, 2048)),
        ("gpt3_125m_bsz2k_30b_lr30x", (16, 2048), 1.8e-2, 0, 30e9, 30e9, (2048, 2048)),
        ("gpt3_125m_bsz2k_30b_lr40x_slw11.5k", (2048, 2048), 2.4e-2, 0, 30e9, 30e9, (72, 2048)),
    ],
)
def test_the_recipes_of_table_4_from_the_shipped_files(name, rows, rate, least_rate, decay_tokens, tokens, lengths):
    config = RunConfig.load(ROOT / "configs" / "paper" / f"{name}.json")
    timeline = config.timeline()
    lr = config.plan.learning_rate()
    assert (timeline.rows(1), timeline.rows(timeline.steps)) == rows
    assert (timeline.seqlen(1), timeline.seqlen(timeline.steps)) == lengths
    assert timeline.consumed_tokens(timeline.steps - 1) < tokens <= timeline.consumed_tokens(timeline.steps)
    warm = timeline.steps_to(375_000_000)
    assert lr(warm - 1) < lr(warm) == pytest.approx(rate, rel=1e-3)
    assert lr(timeline.steps_to(int(decay_tokens))) == pytest.approx(least_rate)
    if rows[0] < rows[1]:
        full = timeline.first_step_of_samples(rows[1])
        assert timeline.consumed_tokens(full - 1) >= 4e9 > timeline.consumed_tokens(full - 2)
    else:
        assert timeline.first_step_at(2048) == 11_500


def test_segments_and_recycling():
    base = {
        "train_batch_size": 2,
        "curriculum_learning": {
            "enabled": True,
            "method": "segment",
            "min_difficulty": 3,
            "max_difficulty": 10,
            "schedule_type": "fixed_discrete",
            "schedule_config": {"difficulty": [3, 6, 10], "max_step": [2, 3]},
        },
        "data": {"train": ["a"], "seq_length": 10, "leftovers": "recycle"},
        "training": {"train_tokens": 75},
    }
    summary = plan(RunConfig.from_dict(base))
    # 2 samples a step: 18, 18, 12, 20, 20 tokens of 20
    assert (summary["steps"], summary["consumed_tokens"], summary["full_length_step"]) == (5, 88, 4)
    assert (summary["sample_tokens"], summary["leftover_tokens"], summary["shapes"]) == (100, 12, 3)
    assert "dropped_tokens" not in summary
    text = describe(summary)
    assert "tokens of samples 100, read later 12 (12.0%)" in text
    assert "rows of a step    6 to 2, 3 shapes" in text


def test_json_on_the_command_line():
    started = time.perf_counter()
    result = run_plan("configs/paper/gpt2_117m_bsz512_seqlen1k_slw60k.json", "--json", "--at", 200_000, 5)
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - started < limit(5)  # it takes half a second; a loaded machine may take more
    summary = json.loads(result.stdout)
    assert (summary["steps"], summary["consumed_tokens"]) == (330_000, 157_286_662_144)
    milestones = {m["step"]: m for m in summary["milestones"]}
    assert set(milestones[5]) == {"step", "seqlen", "rows", "consumed_tokens", "lr"}
    assert milestones[200_000]["consumed_tokens"] == 89_129_222_144
    assert summary["gradient_dtype"] == "fp32"  # though the file asks for fp16


def test_text_and_picture(tmp_path):
    picture = tmp_path / "new folder" / "plan.png"
    result = run_plan("configs/tiny_cpu.json", "--png", picture, "--set", "training.train_tokens=2e6")
    assert result.returncode == 0, result.stderr
    assert "consumed tokens   2,00" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plans_side_by_side(tmp_path):
    files = [f"configs/paper/gpt2_117m_bsz512_seqlen1k{name}.json" for name in ("", "_slw60k")]
    result = run_plan("--compare", *files, "--png", tmp_path / "plans.png")
    assert result.returncode == 0, result.stderr
    _, constant, warmup = result.stdout.splitlines()
    assert constant.split()[:5] == ["gpt2_117m_bsz512_seqlen1k", "300,000", "157,286,400,000", "1", "1"]
    assert warmup.split()[:6] == [
        "gpt2_117m_bsz512_seqlen1k_slw60k",
        "330,000",
        "157,286,662,144",
        "60,000",
        "128",
        "9.1%",
    ]
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")
    result = run_plan("--compare", *files, "--json", "--at", 5)
    assert [plan_["steps"] for plan_ in json.loads(result.stdout).values()] == [300_000, 330_000]
    for arguments, status, problem in (
        ([], 2, "FILE, --config, --compare: one of these is required"),
        ([files[0], "--compare", *files], 2, "--compare: not allowed with FILE"),
        (["--compare", *files, files[0]], 1, "is given twice; name each once"),
    ):
        result = run_plan(*arguments)
        assert (result.returncode, problem in result.stderr) == (status, True), result.stderr


def test_compute_by_hand():
    config = RunConfig.load(
        ROOT / "configs" / "paper" / "gpt2_117m_bsz512_seqlen1k.json",
        ["training.train_tokens=1048576", "scheduler.params.warmup_steps=1"],
    )
    summary = plan(config)
    # two steps of 512 x 1024 tokens; 6 N + 12 layers x hidden x seqlen each, N without the 1024 x 768 positions
    by_hand = 1_048_576 * (6 * (124_475_904 - 1024 * 768) + 12 * 12 * 768 * 1024)
    assert summary["flops"] == summary["flops_of_full_length"] == by_hand
    assert summary["parameters"] == 124_475_904


def test_the_mixed_run_of_figure_2():
    summary = plan(
        RunConfig.load(ROOT / "configs" / "paper" / "gpt2_1.5b_bsz4k_seqlen1k_mixed.json"), at=[900, 1000, 1900, 1901]
    )
    asked = [m for m in summary["milestones"] if m["step"] in (900, 901, 1000, 1900, 1901)]
    assert [m["seqlen"] for m in asked] == [128, 1024, 1024, 128, 1024]
    assert asked[2]["consumed_tokens"] == 4096 * (900 * 128 + 100 * 1024)
    assert (summary["lengths"], summary["full_length_step"]) == (2, 901)


def test_a_batch_size_warmup_is_shown_and_warned_of_only_with_a_curriculum(tmp_path):
    warmup = 'batch_size_warmup={"start": 8, "increment": 8, "tokens": 1e6}'
    picture = tmp_path / "plan.png"
    result = run_plan("configs/tiny_cpu.json", "--set", warmup, "--png", picture)
    assert result.returncode == 0, result.stderr
    assert "rows of a step    8 to 32 (from step " in result.stdout
    assert result.stderr.startswith("warning: batch_size_warmup and curriculum_learning are both on")
    assert picture.read_bytes().startswith(b"\x89PNG")
    alone = run_plan("configs/tiny_cpu.json", "--set", warmup, "--set", "curriculum_learning.enabled=false", "--json")
    assert alone.stderr == ""
    summary = json.loads(alone.stdout)
    assert (summary["lengths"], summary["shapes"]) == (1, 4)
    full = next(m for m in summary["milestones"] if m["step"] == summary["full_batch_step"])
    assert full["rows"] == 32
    short = run_plan("configs/tiny_cpu.json", "--set", warmup, "--set", "training.train_tokens=500000")
    assert "rows of a step    8 to 16 (the full batch is never reached)" in short.stdout


def test_a_bucket_is_compared_with_the_run_without():
    config = RunConfig.load(ROOT / "configs" / "tiny_cpu.json", ["training.seqlen_bucket=64"])
    plain = plan(RunConfig.load(ROOT / "configs" / "tiny_cpu.json"))
    summary = plan(config)
    assert (summary["lengths"], plain["lengths"]) == (4, 32)  # 64, 128, 192, 256; 8 to 256 in eights
    assert summary["without_seqlen_bucket"] == {name: plain[name] for name in ("steps", "lengths", "flops")}
    text = describe(summary)
    assert f"without bucket    {plain['steps']:,} steps, 32 lengths used, {plain['flops']:.3g} FLOPs" in text
    assert "without_seqlen_bucket" not in plain


def test_a_run_that_ends_before_full_length_says_so():
    schedule = {"total_curriculum_step": 9000, "difficulty_step": 8}
    sets = ["training.train_tokens=100000", f"curriculum_learning.schedule_config={json.dumps(schedule)}"]
    result = run_plan("configs/tiny_cpu.json", "--set", sets[0], "--set", sets[1])
    assert result.returncode == 0, result.stderr
    assert "full length       never reached" in result.stdout


def test_compute_is_compared_with_the_full_length_of_the_data():
    sets = ["curriculum_learning.max_difficulty=128"]
    summary = plan(RunConfig.load(ROOT / "configs" / "tiny_cpu.json", sets))
    model = RunConfig.load(ROOT / "configs" / "tiny_cpu.json").model
    assert summary["full_length_step"] is None
    assert summary["flops_of_full_length"] == summary["consumed_tokens"] * model.flops_per_token(256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "nowhere.json: can't be read"),
        (["configs/tiny_cpu.json", "--set", "model.preset=gpt3-1b"], "did you mean 'gpt3-1.3b'?"),
        (["configs/tiny_cpu.json", "--at", "0"], "--at: 0 is not a step"),
        (["configs/tiny_cpu.json", "--at", "611"], "--at: 611 is not a step of this run; give steps from 1 to 610"),
        (["configs/tiny_cpu.json", "--png", "plan.foo"], "--png plan.foo: not the name of an image file"),
        (["configs/tiny_cpu.json", "--png", "/dev/null/plan.png"], "--png /dev/null: can't be written to"),
    ],
)
def test_mistakes_are_reported_in_one_line(arguments, message):
    result = run_plan(*arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_without_a_budget_can_not_be_planned():
    with pytest.raises(ConfigError, match="training: section required"):
        plan(RunConfig.from_dict({"train_batch_size": 8, "data": {"train": ["corpus"], "seq_length": 8}}))


def test_help_loads_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['plan.py', '--help']\n"
        "try: runpy.run_path('scripts/plan.py', run_name='__main__')\n"
        "except SystemExit: print(sorted({'torch', 'deepspeed', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.endswith("[]\n"), result.stdout + result.stderr
