"""What is searched for a run, and what steps of it cost: by hand."""

import numpy as np
import pytest
from helpers.settings import changed

from seqlen_curriculum import ConfigError, RunConfig
from seqlen_curriculum.tuning.cost import cost_of
from seqlen_curriculum.tuning.space import Settings, scheduled, space_of, warmup_steps


def test_the_space_counts_in_warmups(tiny_run):
    # The warmup is 5 steps. The whole run as a ramp from 8 to 32 in steps of 4 is some 60 steps.
    space = space_of(tiny_run, Settings(resolution=2, most_of_run=1))
    longest = space.totals[-1]
    assert RunConfig.from_dict(scheduled(tiny_run, 8, total_curriculum_step=longest)).timeline().steps == longest
    assert space.totals == tuple(sorted(max(1, round(longest / 2**number)) for number in range(5)))
    assert space.totals[0] == pytest.approx(5, rel=0.5)
    assert space.first_total == min(space.totals, key=lambda total: max(total / 20, 20 / total))
    assert (space.beginning_steps, space.probe_steps, space.eval_interval) == (5, 15, 1)
    assert space.lengths == (8, 16)
    shorter = space_of(tiny_run, Settings(most_of_run=0.5, beginning_warmups=0.5, probe_warmups=2.5, min_difficulty=5))
    assert shorter.totals[-1] < longest
    assert (shorter.beginning_steps, shorter.probe_steps) == (3, 13)
    assert shorter.lengths == (8, 16)  # 5 in multiples of 4, doubled as long as it is below 32


@pytest.mark.parametrize(
    ("warmup", "steps"),
    [
        ({"warmup_steps": 5}, 5),
        ({"warmup_samples": 17}, 3),  # of 8 rows
        ({"warmup_tokens": 257}, 2),  # of 8 rows of 32
        ({}, None),
    ],
)
def test_a_warmup_in_steps_of_full_length(tiny_run, warmup, steps):
    assert warmup_steps(RunConfig.from_dict(changed(tiny_run, scheduler__params=warmup))) == steps


def test_a_schedule_keeps_what_is_not_tuned(tiny_run):
    root = {"total_curriculum_tokens": 999, "difficulty_step": 4, "root_degree": 2}
    raw = changed(tiny_run, curriculum_learning__schedule_type="fixed_root", curriculum_learning__schedule_config=root)
    block = scheduled(raw, 16, total_curriculum_step=7)["curriculum_learning"]
    assert block["schedule_config"] == {"total_curriculum_step": 7, "difficulty_step": 4, "root_degree": 2}
    assert (block["min_difficulty"], block["max_difficulty"], block["schedule_type"]) == (16, 32, "fixed_root")
    assert raw["curriculum_learning"]["min_difficulty"] == 8  # the caller's stays


@pytest.mark.parametrize("switched_off", [True, False])
def test_a_run_without_a_curriculum_gets_the_papers(tiny_run, switched_off):
    raw = changed(tiny_run, curriculum_learning__enabled=False)
    if not switched_off:
        del raw["curriculum_learning"]
    block = scheduled(raw, 8, total_curriculum_step=7)["curriculum_learning"]
    assert block == {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 32,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 7, "difficulty_step": 8},
    }


MISTAKES = {
    "no warmup": ({"scheduler__params": {}}, {}, "scheduler.params: .*--warmup-steps"),
    "discrete": (
        {
            "curriculum_learning__schedule_type": "fixed_discrete",
            "curriculum_learning__schedule_config": {"difficulty": [8, 32], "max_step": [4]},
        },
        {},
        "schedule_type: 'fixed_discrete' has no T to search",
    ),
    "adaptive": ({"curriculum_learning__schedule_type": "adaptive"}, {}, "'adaptive' has no T to search"),
    "length": ({}, {"min_difficulty": 32}, "--min-difficulty: 32 is not below the longest length 32"),
    "ratio": ({}, {"ratio": 1.0}, "--ratio: 1.0 is not valid"),
    "share": ({}, {"most_of_run": 1.5}, "--most-of-run: 1.5 is not valid"),
    "warmups": ({}, {"probe_warmups": -1}, "--probe-warmups: -1 is not valid"),
    "interval": ({}, {"eval_interval": 3}, "--eval-interval: 3 leaves fewer than two evaluations .* in 5 steps"),
    "rows": ({}, {"eval_rows": 0}, "--eval-rows: 0 is not valid"),
}


@pytest.mark.parametrize(("changes", "settings", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_can_not_be_searched_is_refused(tiny_run, changes, settings, message):
    with pytest.raises(ConfigError, match=message):
        space_of(changed(tiny_run, **changes), Settings(**settings))


def test_the_cost_of_steps_by_hand(tiny_run):
    # Steps 3 to 7 are 8 rows of 8 + 12 + 12 + 12 + 16; 4 rows are evaluated after 3 and 6
    config = RunConfig.from_dict(changed(tiny_run, training__eval_interval=3, training__eval_rows=4))
    cost, flops = cost_of(config, 3, 7), config.model.flops_per_token
    assert config.timeline().seqlen(np.arange(1, 8)).tolist() == [8, 8, 8, 12, 12, 12, 16]
    assert cost.tokens == 8 * (8 + 12 + 12 + 12 + 16)
    trained = 8 * (8 * flops(8) + 36 * flops(12) + 16 * flops(16))
    assert cost.flops == pytest.approx(trained + 2 * 4 * 32 * flops(32) / 3, rel=1e-12)
    assert cost_of(config, 8, 7).tokens == 0
    steps = config.timeline().steps  # 46: 15 evaluations, and one more at the end
    assert cost_of(config, steps, 999).flops == pytest.approx(8 * 32 * flops(32) + 4 * 32 * flops(32) / 3, rel=1e-12)
