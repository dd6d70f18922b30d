"""Run files with random faults: each is planned, or refused by an error of ours, within two seconds and 500 MB."""

import json
import math
from collections import Counter

import pytest
from helpers.bounds import Bounds, check_message
from helpers.mutated_runs import bases, mutated_run

from seqlen_curriculum import RunConfig
from seqlen_curriculum.errors import SeqlenCurriculumError
from seqlen_curriculum.planning import ranks, summary


def check_plan(config, plan):
    """Check what holds for the plan of any run."""
    json.dumps(plan, allow_nan=False)
    timeline, budget = config.timeline(), config.training.train_tokens
    assert timeline.consumed_tokens(timeline.steps - 1) < budget <= timeline.consumed_tokens(timeline.steps)
    tokens = 0
    for step in range(1, min(timeline.steps, 50) + 1):
        seqlen = timeline.seqlen(step)
        assert (
            config.curriculum is None or config.curriculum.min_difficulty <= seqlen <= config.curriculum.max_difficulty
        )
        tokens += timeline.rows(step) * int(config.shortening.tokens_per_row(seqlen))
        assert tokens == timeline.consumed_tokens(step), step
    rates = [milestone["lr"] for milestone in plan["milestones"] if milestone["lr"] is not None]
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates), rates


def use(file, overrides, world_size):
    """Plan the run of a file as ``slw plan`` does, and write it as a run does."""
    config = RunConfig.load(file, overrides)
    lines = config.warnings()
    again = RunConfig.from_dict(json.loads(json.dumps(config.as_file(), allow_nan=False)))
    assert again.settings() == config.settings()
    if config.training is None:
        return lines
    plan = summary.plan(config)
    summary.describe(plan)
    check_plan(config, plan)
    config = config.for_ranks(world_size)
    summed = ranks.on_ranks(config, ranks.RankFlags(ranks=world_size))
    ranks.describe_ranks(summed)
    return [*lines, *ranks.rank_warnings(config, summed)]


def try_run(number, runs, folder, bounds):
    """Return ``plan`` or the class of the error of the mutated run with this number."""
    content, overrides, world_size = mutated_run(number, runs)
    file = folder / "run.json"
    file.write_bytes(content)
    try:
        with bounds.applied():
            messages, outcome = use(file, overrides, world_size), "plan"
    except SeqlenCurriculumError as error:
        messages, outcome = [str(error)], type(error).__name__
    for message in messages:
        check_message(message)
    return outcome


def try_runs(numbers, tiny_run, folder):
    runs, bounds, outcomes = bases(tiny_run), Bounds(), Counter()
    for number in numbers:
        try:
            outcomes[try_run(number, runs, folder, bounds)] += 1
        except BaseException as error:
            content, *rest = mutated_run(number, runs)
            error.add_note(f"run {number}: {rest} {content[:3_000]!r}")
            raise
    bounds.report(outcomes)
    return outcomes


def test_a_few(tiny_run, tmp_path):
    outcomes = try_runs(range(400), tiny_run, tmp_path)
    assert outcomes["plan"] > 50  # a fuzz whose files are all refused early tests little
    assert outcomes["ConfigError"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("share", range(20))
def test_100_000(share, tiny_run, tmp_path):
    try_runs(range(5_000 * share, 5_000 * (share + 1)), tiny_run, tmp_path)
