"""The report's arithmetic by hand, and what of long logs is drawn."""

import json
import math
import re

import numpy as np
import pytest
from helpers.synthetic_runs import BASE, synthetic
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.analysis import formats
from seqlen_curriculum.analysis.page import page
from seqlen_curriculum.analysis.report import report
from seqlen_curriculum.analysis.run import Run, Series
from seqlen_curriculum.analysis.seed_groups import seed_groups, shared_name
from seqlen_curriculum.analysis.tables import ReportTables

FAST = synthetic("fast", [4.0, 3.0, 2.0, 1.0], {2: 1.9, 4: 2.1}, seconds=9.0, tokens=50)
SLOW = synthetic("slow", [4.0] * 5, {5: 2.2})


def test_the_comparison_by_hand():
    found = report([BASE, FAST, SLOW])
    base, fast, slow = found["runs"]
    assert found["reference"] == {"run": "base", "valid_ppl": math.exp(2.0)}
    # base is best at step 4: 400 tokens, 4 x 36 s + 2 x 9 s = 162 s = 0.045 h
    assert base["reached"] == base["best"] == base["final"]
    assert (base["reached"]["step"], base["reached"]["consumed_tokens"]) == (4, 400)
    assert base["reached"]["hours"] == pytest.approx(0.045)
    assert set(base["reached_ratio"].values()) == {1.0}
    # fast is as good at step 2: 100 tokens, 2 x 9 s + 9 s = 27 s, a sixth of 162
    assert fast["reached"]["hours"] == pytest.approx(0.0075)
    assert fast["reached_ratio"] == {"step": 2.0, "consumed_tokens": 4.0, "hours": pytest.approx(6.0)}
    assert (fast["best"]["step"], fast["final"]["step"]) == (2, 4)
    # at its end: 200 tokens, 4 x 9 s + 2 x 9 s = 54 s; 200 tokens in 36 s of training
    assert fast["end_ratio"] == {"step": 1.0, "consumed_tokens": 2.0, "hours": pytest.approx(3.0)}
    assert (fast["tokens_per_second"], fast["training_hours"]) == (pytest.approx(200 / 36), pytest.approx(0.01))
    assert (slow["reached"], slow["reached_ratio"]) == (None, None)
    # base: ratios 0.75, 3.9 / 3 = 1.3, 2 / 3: one spike of four steps
    assert (base["stability"]["spikes"], base["stability"]["spike_share"]) == (1, 0.25)
    assert base["stability"]["spikes_listed"][0]["ratio"] == pytest.approx(1.3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def columns(table):
    """The lines of a table for a terminal, split where two blanks or more part the columns."""
    return [re.split(r"  +", line) for line in table.as_text().splitlines()]


def test_the_outcome_in_two_sentences():
    numbers = report([BASE, FAST])
    comparison, spikes = numbers["outcome"]
    # 100 of 400 tokens and 27 of 162 s
    assert re.fullmatch(r"fast reached base's .* 7\.389 .* 25% .* 17% .*", comparison)
    assert re.search(r"1 of 2 runs.* base.* 1 in 4 steps", spikes)
    base, fast = (run["stability"] for run in numbers["runs"])
    assert (base["spikes"], base["steps"], base["max_loss_ratio"]) == (1, 4, pytest.approx(1.3))
    assert (fast["spikes"], fast["steps"]) == (0, 4)
    comparison, spikes = report([FAST, BASE])["outcome"]
    assert re.fullmatch(r"None of the other .* fast's .* 6\.686; .* base .* 7\.389\.", comparison)
    assert report([BASE, SLOW, FAST])["outcome"][0].startswith("fast reached base's")
    numbers = report([FAST])
    alone, spikes = numbers["outcome"]
    assert re.fullmatch(r"fast .* 6\.686 at step 2\.", alone)
    assert (numbers["runs"][0]["end"]["consumed_tokens"], numbers["runs"][0]["end"]["hours"] * 3600) == (200, 54)
    assert spikes.startswith("No loss spikes")


def test_the_comparison_for_a_terminal():
    caption, head, base, *others = columns(ReportTables(report([BASE, FAST, SLOW])).comparison())
    assert re.search(r"base's best validation perplexity of 7\.389 ", caption[0])
    assert head == ["Run", "Steps", "Tokens", "Time"]
    assert base == ["base", "4 (1.0x)", "400 (1.0x)", "2.7 min (1.0x)"]
    assert others == [["fast", "2 (2.0x)", "100 (4.0x)", "27.0 s (6.0x)"], ["slow", "never", "never", "never"]]


def test_pieces_read_by_length():
    config = {"data": {"order": "decomposed"}, "training": {"train_tokens": 80}}
    run = synthetic("pieces", [4.0, 3.0, 2.0, 1.0], {4: 2.0}, info={"config": config})
    for record, seqlen in zip(run.records[:4], [8, 4, 8, 8], strict=True):
        record |= {"seqlen": seqlen, "rows": 32 // seqlen}
    run.records[2]["skipped"] = run.records[2].pop("loss") > 0  # a skipped step has read its pieces
    numbers = report([BASE, run])
    assert [one["pieces"] for one in numbers["runs"]] == [
        None,
        [
            {"length": 4, "steps": 1, "rows": 8, "tokens": 32, "share": 0.25},
            {"length": 8, "steps": 3, "rows": 12, "tokens": 96, "share": 0.75},
        ],
    ]
    _, head, *rows = columns(ReportTables(numbers).pieces())
    assert head == ["Run", "Length", "Steps", "Pieces", "Tokens", "Share of tokens"]
    assert rows == [["pieces", "4", "1", "8", "32", "25.00%"], ["pieces", "8", "3", "12", "96", "75.00%"]]
    assert not ReportTables(report([BASE])).pieces().rows


def test_what_cannot_be_compared():
    without = synthetic("without", [4.0, 3.0], {})
    assert report([without, BASE])["outcome"][0].startswith("without has no evaluation")
    assert report([BASE, without])["outcome"][0].startswith("None of the other runs has reached base's")
    assert ReportTables(report([without, BASE])).comparison().rows == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.compact(157_286_400_000), "157B"),
        (formats.compact(4_001_792), "4.00M"),
        (formats.compact(999_600), "1.00M"),
        (formats.compact(512), "512"),
        (formats.tick(2_500), "2.5K"),
        (formats.tick(0.002), "0.002"),
        (formats.duration(37.2), "37.2 h"),
        (formats.duration(1.4), "84.0 min"),
        (formats.duration(0.02), "72.0 s"),
        (formats.significant(40.2468), "40.25"),
        (formats.significant(485_165_195.4), "485,165,195"),
        (formats.p_value(0.0), "< 1e-300"),
        (formats.share(0.0368), "3.68%"),
        (formats.setting([0.9, 0.95]), "[0.9, 0.95]"),
    ],
)
def test_numbers_read_well(text, expected):
    assert text == expected


def test_only_what_differs_is_listed_as_differing():
    def configured(name, config):
        return Run(name, BASE.records, {"config": config, "launches": []})

    ours = configured("a", {"lr": 0.1, "training": {"seed": 1, "train_tokens": 400}})
    theirs = configured("b", {"lr": 0.1, "training": {"seed": 2, "train_tokens": 400}, "extra": True})
    found = report([ours, theirs, BASE])
    assert found["config"]["differing"] == [
        {"key": "training.seed", "values": [1, 2, None]},
        {"key": "extra", "values": [None, True, None]},
    ]
    assert [entry["key"] for entry in found["config"]["shared"]] == ["lr", "training.train_tokens"]
    assert [one["finished"] for one in found["runs"]] == [True, True, False]
    assert "No run.json in a, b, base" in page(found, [ours, theirs, BASE])


def test_a_run_without_a_launch_leaves_its_column_empty():
    launch = {"started": "2026-01-01T00:00:00+00:00", "ranks": 2, "first_step": 1, "versions": {}, "device": {}}
    launched = Run("launched", BASE.records, {"config": {}, "launches": [launch]})
    bare = Run("bare", BASE.records, {"config": {}, "launches": []})
    assert columns(ReportTables(report([launched, bare])).conditions())[2:] == [["Ranks", "2", "–"]]


def test_a_run_has_finished_with_its_last_evaluation():
    def finished(records, **training):
        return Run("run", records, {"config": {"training": training}}).finished

    assert finished(BASE.records, train_tokens=400, eval_interval=2)
    assert not finished(BASE.records[:-1], train_tokens=400, eval_interval=2)
    assert finished(BASE.records[:-1], train_tokens=400, eval_interval=0)
    assert not finished(BASE.records, train_tokens=401)
    assert not finished(BASE.records)


def test_a_spike_of_one_step_in_400_000_is_drawn():
    values = np.full(400_000, 2.0)
    values[123_456] = 9.0
    values[300_001] = 1.0
    places = np.arange(1, 400_001, dtype=float)
    thin = Series(values, places, places, places).thinned()
    assert len(thin.values) <= 2002
    assert dict(zip(thin.step, thin.values, strict=True)) | {123_457: 9.0, 300_002: 1.0} == dict(
        zip(thin.step, thin.values, strict=True)
    )
    assert (thin.step[0], thin.step[-1]) == (1, 400_000)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=300), st.integers(2, 40))
def test_thinning_keeps_order_ends_least_and_largest(values, most):
    places = np.arange(len(values), dtype=float)
    thin = Series(np.array(values), places, places, places).thinned(most)
    assert len(thin.values) <= most + 2 or len(thin.values) == len(values)
    assert (thin.values.min(), thin.values.max()) == (min(values), max(values))
    assert (np.diff(thin.step) > 0).all()
    assert all(values[int(at)] == value for at, value in zip(thin.step, thin.values, strict=True))
    assert {0.0, len(values) - 1.0} <= set(thin.step.tolist())


def test_speed_by_hand():
    # 5 steps of 100 tokens in 36 s each; the third was passed over: its tokens and its time don't count
    run = synthetic("run", [4.0] * 5, {4: 2.0})
    passed_over = {"step": 3, "consumed_tokens": 300, "skipped": True}
    records = [passed_over if record["step"] == 3 else record for record in run.records]
    run = Run("run", records)
    assert run.tokens_per_second == pytest.approx(100 / 36)
    assert run.series("tokens_per_second").values == pytest.approx([100 / 36] * 4)
    assert run.series("tokens_per_second").step.tolist() == [1, 2, 4, 5]
    # where a log begins later, the tokens of its first step are not known
    assert Run("later", records[3:]).series("tokens_per_second").step.tolist() == [5]
    # of 1000 steps every point is the mean of five
    long = synthetic("long", [4.0] * 1000, {}).series("tokens_per_second")
    assert (len(long.values), long.step[0], long.step[-1]) == (200, 5, 1000)


def seeded(name, seed, losses, valid_losses, lr=1.0, **changes):
    budget = changes.pop("train_tokens", changes.get("tokens", 100) * len(losses))
    config = {"optimizer": {"params": {"lr": lr}}, "training": {"seed": seed, "train_tokens": budget}}
    return synthetic(name, losses, valid_losses, info={"config": config}, **changes)


SEEDS = [
    seeded("base-seed10", 1, [4.0, 3.0, 3.9, 2.0], {2: 2.5, 4: 2.0}),
    seeded("base-seed11", 2, [4.0, 3.0, 3.0, 2.0], {2: 2.5, 4: 2.2}),
    seeded("fast_seed1", 1, [4.0, 3.0, 2.0, 1.0], {2: 1.9, 4: 1.8}, lr=2.0, seconds=9.0, tokens=50, train_tokens=200),
    seeded("fast_seed2", 2, [4.0, 3.0, 2.0, 3.0], {2: 2.5, 4: 2.3}, lr=2.0, train_tokens=200),
    seeded("fast_seed3", 3, [4.0, 3.0], {2: 1.0}, lr=2.0, train_tokens=200),
]


def test_seeds_of_one_configuration_are_put_together_by_hand():
    base, fast = report(SEEDS)["seeds"]
    assert (base["name"], base["runs"]) == ("base", ["base-seed10", "base-seed11"])
    assert (base["spikes"], base["final_valid_loss"]) == ([1, 0], [2.0, 2.2])
    assert base["mean_final_valid_loss"] == pytest.approx(2.1)
    assert base["max_loss_ratio"] == [pytest.approx(1.3), pytest.approx(1.0)]
    assert (base["reached"], base["compared"], base["consumed_tokens_ratio"], base["hours_ratio"]) == (2, 2, 1.0, 1.0)
    # Seed 1 is as good as base's seed 1 at 100 of 400 tokens, after 27 of 162 s; seed 2 never; seed 3 has no counterpart.
    assert (fast["name"], fast["spikes"], fast["reached"], fast["compared"]) == ("fast", [0, 1, 0], 1, 2)
    assert (fast["consumed_tokens_ratio"], fast["hours_ratio"]) == (4.0, pytest.approx(6.0))
    assert fast["mean_final_valid_loss"] == pytest.approx((1.8 + 2.3 + 1.0) / 3)
    assert report(SEEDS[:1] + SEEDS[2:3])["seeds"] == []


def test_seeds_in_words_and_on_the_page():
    found = report(SEEDS)
    comparison, spikes = found["outcome"]
    assert re.fullmatch(r"Over seeds, fast .* 1\.700\.", comparison)
    assert re.search(r"2 of 5 runs.* 1 in 4 steps", spikes)
    _, _, base, fast = columns(ReportTables(found).comparison())
    assert base == ["base", "1, 0", "1.300, 1.000", "2.000, 2.200", "2.100", "2 of 2", "1.0x", "1.0x"]
    assert fast == ["fast", "0, 1, 0", "0.750, 1.500, 0.750", "1.800, 2.300, 1.000", "1.700", "1 of 2", "4.0x", "6.0x"]
    text = page(found, SEEDS)
    assert text.count('class="line"') == 2
    assert "fast (3 seeds)" in text
    for key in ("seeds/1/consumed_tokens_ratio", "seeds/1/spikes/1", "seeds/0/mean_final_valid_loss"):
        assert f'data-key="{key}"' in text


def test_a_run_of_unknown_configuration_is_no_seed_of_another():
    groups = seed_groups([BASE, FAST, *SEEDS[:2]])
    assert [(group.name, group.members) for group in groups] == [("base", [0]), ("fast", [1]), ("base-seed10", [2, 3])]


@pytest.mark.parametrize("separator", ["-seed", "_seed=", ".seed-", "/seed_", " seed ", "-"])
def test_the_name_of_a_group_has_no_seed(separator):
    for seeds in ((1, 2), (10, 11), (1, 12)):
        assert shared_name([f"slw.8{separator}{seed}" for seed in seeds]) == "slw.8"


def test_repeats_and_unfinished_runs_are_no_seeds_to_average():
    assert [len(group.members) for group in seed_groups([SEEDS[0], *SEEDS[:2]])] == [2, 1]
    on_the_way = seeded("fast_seed3", 3, [4.0], {1: 1.0}, lr=2.0, train_tokens=200)
    found = report([*SEEDS[:4], on_the_way])
    assert found["seeds"][1]["final_valid_loss"] == [1.8, 2.3, None]
    assert found["seeds"][1]["mean_final_valid_loss"] is None
    assert found["outcome"][0].startswith("Over seeds, base ")


ROLLED_BACK = {"step": 3, "loss": 9.0, "ratio": 3.0, "returned_to": 1, "skipped": [3, 4], "seconds": 18.0}


def test_what_a_rollback_cost_and_skipped_is_counted():
    """Steps of 36 s; step 2 and the evaluation after it came after 18 s that were given up; 3 and 4 are passed over."""
    run = synthetic("back", [4.0, 3.0], {2: 2.5}, rollbacks=[ROLLED_BACK])
    for step in (3, 4):
        skipped = {"step": step, "consumed_tokens": 100 * step, "seqlen": 8, "rows": 4, "skipped": True}
        run.records.append(skipped)
    (found,) = report([run])["runs"]
    assert found["end"] == {"step": 4, "consumed_tokens": 400, "hours": pytest.approx((36 + 18 + 36 + 9) / 3600)}
    assert (found["skipped_steps"], found["final"]["step"]) == (2, 2)
    assert found["final"]["hours"] == pytest.approx((36 + 18 + 36 + 9) / 3600)
    assert run.series("loss").hours.tolist() == pytest.approx([36 / 3600, 90 / 3600])
    assert (found["stability"]["spikes"], found["stability"]["steps"], len(found["rollbacks"])) == (0, 2, 1)
    assert re.search(r"rollbacks: 1", report([run])["outcome"][1])
