"""The cost of a study by arithmetic, before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from seqlen_curriculum.analysis import formats
from seqlen_curriculum.analysis.cells import Table
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.from_config import with_buckets
from seqlen_curriculum.errors import SeqlenCurriculumError
from seqlen_curriculum.study.plan import PlannedRun, StudyPlan
from seqlen_curriculum.tuning.cost import Cost, cost_of

__all__ = ["arm_costs", "cost_table", "run_cost", "total_cost"]


def arm_costs(plan: StudyPlan) -> dict[str, Cost]:
    """Return the cost of one training of each arm by name, including its evaluations."""
    # Neither the rate nor the seed changes the lengths.
    return {arm.name: run_cost(plan.run(arm, None, plan.seeds[0]).config) for arm in plan.arms}


def run_cost(config: RunConfig, last_step: int | None = None) -> Cost:
    """Return the cost of a training up to ``last_step``, or of a whole one."""
    try:  # only the FLOPs of a decomposed run depend on its corpora
        config = with_buckets(config)
    except SeqlenCurriculumError:  # not made yet; without --dry-run this is an error
        assert config.train_tokens is not None
        return Cost(config.train_tokens, math.nan)
    return cost_of(config, 1, config.timeline().steps if last_step is None else last_step)


def total_cost(runs: Sequence[PlannedRun], costs: dict[str, Cost]) -> Cost:
    """Return the cost of ``runs`` together."""
    return sum((costs[run.arm.name] for run in runs), Cost())


def cost_table(plan: StudyPlan, costs: dict[str, Cost]) -> Table:
    """Return one row per arm, and a total: the runs, and the tokens and FLOPs of each."""
    tuning, measured = plan.tuning_runs(), plan.measured_runs({arm.name: None for arm in plan.arms})
    rows = []
    for arm in plan.arms:
        counts = [sum(run.arm is arm for run in runs) for runs in (tuning, measured)]
        rows.append([arm.name, *map(str, counts), *_amounts(costs[arm.name])])
    total = total_cost([*tuning, *measured], costs)
    rows.append(["all runs together", str(len(tuning)), str(len(measured)), *_amounts(total)])
    head = ["Case", "Tuning runs", "Measured runs", "Tokens each", "FLOPs each"]
    return Table(f"{len(tuning) + len(measured):,} runs", head, rows)


def _amounts(cost: Cost) -> list[str]:
    return [formats.count(cost.tokens), "unknown" if math.isnan(cost.flops) else f"{cost.flops:.3g}"]
