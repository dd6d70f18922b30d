"""plan.py --ranks: what each rank does at every length and the estimated hours, by hand; and what it warns of."""

import json
from pathlib import Path

import pytest
from helpers.command import slw
from helpers.settings import changed

from seqlen_curriculum import ConfigError, RunConfig
from seqlen_curriculum.planning import ranks as planning_ranks
from seqlen_curriculum.planning.ranks import RankFlags, describe_ranks, fill_tokens, on_ranks, rank_warnings

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "configs" / "paper"
# 8 rows a step: 10 steps of 64 tokens a row, 5,120 in all, and 12 of 1024 make 103,424
RUN = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "curriculum_learning": {
        "enabled": True,
        "min_difficulty": 64,
        "max_difficulty": 1024,
        "schedule_type": "fixed_discrete",
        "schedule_config": {"difficulty": [64, 1024], "max_step": [10]},
    },
    "model": {"preset": "gpt2-117m"},
    "data": {"train": ["x"], "seq_length": 1024},
    "training": {"train_tokens": 103_424},
}
FLOPS = {seqlen: 6 * (124_475_904 - 1024 * 768) + 12 * 12 * 768 * seqlen for seqlen in (64, 1024)}  # of a token


def planned(ranks, run=RUN, **flags):
    config = RunConfig.from_dict(run).for_ranks(ranks)
    summary = on_ranks(config, RankFlags(ranks=ranks, **flags))
    return summary, rank_warnings(config, summary)


def run_plan(*arguments):
    return slw("plan", *arguments, cwd=ROOT)


def test_two_ranks_by_hand():
    summary, _ = planned(2, tflops=100)
    short, full = summary["lengths"]
    # a rank's 4 rows are one micro-batch at both lengths
    assert (short["seqlen"], short["rows"], short["tokens"], short["micro_batches"], short["steps"]) == (
        [64, 64],
        [4, 4],
        [256, 256],
        [1, 1],
        10,
    )
    assert (full["tokens"], full["micro_batch_tokens"], full["steps"]) == ([4096, 4096], [4096, 4096], 12)
    assert short["token_share"] == 5_120 / 103_424
    # 256 tokens take as long as the 2,816 that fill the device
    assert summary["fill_tokens"] == 2816
    assert short["speed"] == pytest.approx(256 / 2816)
    assert short["hours"] == pytest.approx(10 * 2816 * FLOPS[64] / 1e14 / 3600)
    assert full["hours"] == pytest.approx(12 * 4096 * FLOPS[1024] / 1e14 / 3600)
    assert summary["hours"] == pytest.approx(short["hours"] + full["hours"])
    ideal = (10 * 256 * FLOPS[64] + 12 * 4096 * FLOPS[1024]) / 1e14 / 3600
    assert summary["hours_at_full_speed"] == pytest.approx(ideal)
    # 103,424 tokens at full length take 12.6 steps, so 13
    assert summary["hours_of_full_length"] == pytest.approx(13 * 4096 * FLOPS[1024] / 1e14 / 3600)


def test_fixed_micro_batches_fill_a_device_no_better_for_being_many():
    # 8 rows in 2 micro-batches of 4: each takes as long as 2,816 tokens. Balanced, they are one of 512.
    summary, warnings = planned(1, changed(RUN, training__micro_batch="fixed"), tflops=100)
    assert summary["lengths"][0]["hours"] == pytest.approx(10 * 2 * 2816 * FLOPS[64] / 1e14 / 3600)
    assert 'training.micro_batch "balanced"' in warnings[0]
    balanced, _ = planned(1, tflops=100)
    assert balanced["lengths"][0]["hours"] == pytest.approx(10 * 2816 * FLOPS[64] / 1e14 / 3600)


@pytest.mark.parametrize(
    ("degrees", "tokens", "data_ranks"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, 4096, 2),  # two ranks do the work of a row each half
        ({"sequence_parallel_size": 2}, 2048, 2),  # each has half of a row's tokens
        ({"pipeline": {"stages": 2}}, 4096, 2),
        ({}, 2048, 4),
    ],
)
def test_ranks_that_share_a_model_share_its_work(degrees, tokens, data_ranks):
    run = {**changed(RUN, train_micro_batch_size_per_gpu=2), **degrees}
    summary, _ = planned(4, run, tflops=100)
    group = summary["lengths"][-1]
    assert (summary["data_ranks"], group["tokens"]) == (data_ranks, [tokens, tokens])
    # at full length nothing idles: four ranks do it in a quarter of the time of one
    assert group["hours"] == pytest.approx(12 * 8 * 1024 * FLOPS[1024] / 4e14 / 3600)


def test_full_length_is_full_speed_whatever_its_micro_batch():
    # 1 x 1024 tokens are fewer than the 2,816, but that is in the TFLOP/s that full length reaches
    summary, _ = planned(2, changed(RUN, train_micro_batch_size_per_gpu=1), tflops=100)
    assert summary["fill_tokens"] == 1024
    assert [group["speed"] for group in summary["lengths"]] == [pytest.approx(256 / 1024), 1.0]


def test_a_warmup_of_128_lengths_is_a_short_table_of_all_steps():
    config = RunConfig.load(PAPER / "gpt2_117m_bsz512_seqlen1k_slw60k.json").for_ranks(128)
    summary = on_ranks(config, RankFlags(ranks=128))
    groups = summary["lengths"]
    spans = [[8, 8], [16, 24], [32, 56], [64, 120], [128, 248], [256, 504], [512, 1016], [1024, 1024]]
    assert [group["seqlen"] for group in groups] == spans
    assert sum(group["steps"] for group in groups) == config.plan.steps
    assert sum(group["token_share"] for group in groups) == pytest.approx(1)
    assert sum(group["hours"] for group in groups) == pytest.approx(summary["hours"])
    assert [group["tokens"] for group in groups][::7] == [[32, 32], [4096, 4096]]
    assert len(describe_ranks(summary).splitlines()) == 3 + 2 + 8


def test_with_many_ranks_short_lengths_idle_and_a_batch_growth_as_advised_ends_it():
    path, sets = PAPER / "gpt2_117m_bsz512_seqlen1k_slw60k.json", []
    for expected in (1, 0):
        config = RunConfig.load(path, sets).for_ranks(128)
        warnings = rank_warnings(config, on_ranks(config, RankFlags(ranks=128, tflops=100)))
        assert len(warnings) == expected
        if warnings:
            assert (
                "lengths 8 to 1016 have too few tokens to fill a device (down to 32, where about 2,816 do)"
                in warnings[0]
            )
            floor = warnings[0].split("min_tokens_per_step ")[1]
            assert int(floor) == 2816 * 128
            sets = ["curriculum_learning.batch_growth=true", f"curriculum_learning.min_tokens_per_step={floor}"]


def test_only_what_the_run_can_change_is_advised():
    # 2 rows a step, then 4 from 8: a rank has one row at first
    warmup = {**RUN, "batch_size_warmup": {"start": 2, "increment": 2, "tokens": 90_000}}
    (warning,) = planned(2, {**warmup, "curriculum_learning": {"enabled": False}})[1]
    assert "at length 1024 have" in warning
    assert warning.endswith("Consider fewer ranks")
    short = changed(RUN, curriculum_learning__max_difficulty=256)
    short = changed(short, curriculum_learning__schedule_config__difficulty=[64, 256])
    (warning,) = planned(2, short)[1]
    assert warning.endswith("min_tokens_per_step 2048")  # 8 rows of 256, where 2 x 2,816 would be above every step


def test_few_ranks_are_not_warned_of():
    config = RunConfig.load(PAPER / "gpt2_1.5b_bsz512_seqlen1k_slw270k.json").for_ranks(8)
    assert rank_warnings(config, on_ranks(config, RankFlags(ranks=8, tflops=150))) == []
    (warning,) = rank_warnings(
        config, on_ranks(config, RankFlags(ranks=8, tflops=400))
    )  # 48 blocks need the host longer
    assert "Consider train_micro_batch_size_per_gpu above 4 or fewer ranks" in warning


def test_what_fills_a_device_by_hand():
    assert fill_tokens(1600, 0.0, 1.0) == 1352  # 132 x 128 x 128 / 1600 = 1351.7
    assert fill_tokens(768, 12 * 1.8e-3, FLOPS[1024] / 396e12) == 10_000  # 21.6 ms / 2.16 ns


def test_a_micro_batch_that_the_host_takes_longer_for_limits_the_assumed_speed():
    # 4 x 1024 tokens of 12 blocks take 21.6 ms, as measured; then each rank computes 4096 * 855e6 FLOPs in it
    summary, _ = planned(2)
    assert summary["tflops"] == pytest.approx(4096 * FLOPS[1024] / 21.6e-3 / 1e12)
    assert summary["fill_tokens"] == 4096
    assert summary["lengths"][-1]["speed"] == 1
    assert planned(2, tflops=300)[0]["tflops"] == 300


@pytest.mark.parametrize(
    ("degrees", "per_node", "ranks", "spans"),
    [
        ({"tensor_parallel": {"autotp_size": 4}}, 4, 8, False),
        ({"tensor_parallel": {"autotp_size": 4}}, 6, 8, True),
        ({"sequence_parallel_size": 4}, 2, 8, True),
        ({"sequence_parallel_size": 4}, 6, 4, False),  # one node
        ({"pipeline": {"stages": 4}}, 2, 8, False),  # stages may: they exchange little
    ],
)
def test_ranks_of_a_layer_on_several_nodes_are_warned_of(degrees, per_node, ranks, spans):
    _, warnings = planned(ranks, {**RUN, **degrees}, gpus_per_node=per_node)
    assert any(f"--gpus-per-node {per_node}" in warning for warning in warnings) is spans


def test_without_a_model_there_are_no_hours():
    summary, warnings = planned(2, {name: value for name, value in RUN.items() if name != "model"})
    assert (summary["hours"], summary["tflops"], summary["lengths"][0]["hours"], warnings) == (None, None, None, [])
    assert summary["lengths"][0]["tokens"] == [256, 256]
    assert "hours" not in describe_ranks(summary)
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    ("model", "precision", "tflops", "source"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 0.4 * 312, "NVIDIA A100-SXM4-80GB in bf16, the GPU of this machine"),
        ("Quadro 1000", "bf16", 0.4 * 989.4, "40% of the 989 of one NVIDIA H100 in bf16, the default"),
        (None, "fp16", 0.4 * 989.4, "NVIDIA H100 in fp16, the default"),
        (None, None, 0.4 * 67, "NVIDIA H100 in fp32, the default"),
    ],
)
def test_the_speed_is_that_of_the_card_present_or_an_h100s(monkeypatch, tmp_path, model, precision, tflops, source):
    monkeypatch.setattr(planning_ranks, "_DRIVER", tmp_path)
    if model:
        (tmp_path / "0000:3b:00.0").mkdir()
        (tmp_path / "0000:3b:00.0" / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 64\n")
    run = {name: value for name, value in changed(RUN, train_batch_size=32).items() if name != "bf16"}
    run["train_micro_batch_size_per_gpu"] = 16  # fewer rows would be limited by the host
    summary, _ = planned(2, {**run, **({precision: {"enabled": True}} if precision else {})})
    assert summary["tflops"] == pytest.approx(tflops)
    assert source in summary["tflops_source"]


def test_on_the_command_line_as_text_json_and_side_by_side():
    files = [PAPER / f"gpt2_117m_bsz512_seqlen1k{name}.json" for name in ("", "_slw60k")]
    text = run_plan(files[1], "--ranks", 128, "--tflops", 300)
    assert text.returncode == 0, text.stderr
    assert "ranks             128 on 16 nodes of 8, 128 data-parallel" in text.stdout
    assert "assumed speed     300 TFLOP/s per rank (--tflops)" in text.stdout
    assert text.stderr.startswith("warning: --ranks 128: some micro-batches at lengths 8 to 1016")
    summary = json.loads(run_plan(files[1], "--ranks", 128, "--tflops", 300, "--json").stdout)["on_ranks"]
    assert f"estimated hours   {summary['hours']:.2f}; {summary['hours_of_full_length']:.2f} for" in text.stdout
    head, *plans = run_plan("--compare", *files, "--ranks", 128, "--tflops", 300).stdout.splitlines()
    assert head.endswith("hours")
    assert [line.split()[-1] for line in plans] == [f"{summary[key]:.2f}" for key in ("hours_of_full_length", "hours")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", 3], "train_batch_size: 32 rows don't divide over 3 ranks; use a multiple of 3"),
        (["--ranks", 3, "--set", "sequence_parallel_size=2"], "sequence_parallel_size 2: doesn't divide the 3 ranks"),
        (["--ranks", 0], "--ranks: 0 is not valid"),
        (["--ranks", 2, "--gpus-per-node", 0], "--gpus-per-node: 0 is not valid"),
        (["--gpus-per-node", 4], "--gpus-per-node: 4 is only used with --ranks; give --ranks too"),
        (["--ranks", 2, "--tflops", 0], "--tflops: 0.0 is not valid"),
        (["--tflops", 300], "--tflops: 300.0 is only used with --ranks; give --ranks too"),
    ],
)
def test_mistakes_are_reported_in_one_line(arguments, message):
    result = run_plan("configs/tiny_cpu.json", *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_ranks_are_checked_before_anything_is_printed():
    with pytest.raises(ConfigError, match="8 rows don't divide over 3 ranks"):
        planned(3)
    assert run_plan("configs/tiny_cpu.json", "--ranks", 3).stdout == ""
