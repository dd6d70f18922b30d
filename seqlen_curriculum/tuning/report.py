"""The result and the cost of a search, as text for a terminal and as a page with the perplexities of all probes."""

from __future__ import annotations

import math
from pathlib import Path

from seqlen_curriculum.analysis.read_run import read_run
from seqlen_curriculum.analysis.write_report import check_folder, write_report
from seqlen_curriculum.tuning.cost import Cost, cost_of
from seqlen_curriculum.tuning.search import Candidate, Outcome, Space
from seqlen_curriculum.tuning.study import ProbeResult, Study

__all__ = ["describe_cost", "describe_costs", "describe_outcome", "describe_result", "describe_space", "write_page"]


def describe_space(space: Space) -> str:
    """Return a description of the search space."""
    lengths, totals = ", ".join(map(str, space.lengths)), f"{space.totals[0]:,} to {space.totals[-1]:,}"
    beginning = f"{space.beginning_steps:,} steps with T {space.first_total:,}"
    return (
        f"min_difficulty    {lengths}: the first that is stable over {beginning}\n"
        f"T                 {totals} in {len(space.totals)} values: the largest stable over {space.probe_steps:,} steps"
    )


def describe_costs(study: Study) -> str:
    """Return a table of the maximum cost of a probe for each T, with the first length."""
    space, full = study.space, study.full_cost()
    lines = ["", f"{'T':>12} {'steps':>8} {'tokens':>15} {'of training':>12} {'of compute':>11}"]
    probes = [(space.first_total, space.beginning_steps), *((total, space.probe_steps) for total in space.totals)]
    for total, most_steps in probes:
        config = study.run_of(Candidate(space.lengths[0], total)).config
        steps = min(most_steps, config.timeline().steps)
        cost = cost_of(config, 1, steps)
        shares = f"{cost.tokens / full.tokens:>12.2%} {_of_compute(cost, full, 2):>11}"
        lines.append(f"{total:>12,} {steps:>8,} {cost.tokens:>15,} {shares}")
    return "\n".join(lines)


def describe_result(result: ProbeResult) -> str:
    """Return one line for a finished probe."""
    (length, total), trial = result.probe.candidate, result.trial
    assert trial is not None
    if trial.stable:
        verdict = f"stable over {trial.step:,} steps"
    elif trial.ratio is None:
        verdict = f"diverged after step {trial.step:,}"
    else:
        verdict = f"fluctuates at step {trial.step:,}"
    ratio = f", perplexity at most {trial.ratio:.3f} times the best before" if trial.ratio is not None else ""
    return f"probe {result.number}: min_difficulty {length}, T {total:,}: {verdict}{ratio}"


def describe_cost(study: Study) -> str:
    """Return the cost of all probes, compared with the training they tune."""
    spent, full = study.cost(), study.full_cost()
    compute = _of_compute(spent, full, 1)
    shares = f"{spent.tokens / full.tokens:.1%} of the training's tokens; with evaluations {compute}"
    return f"cost              {spent.tokens:,} tokens, {shares} of its compute; {study.seconds:,.0f} s"


def _of_compute(cost: Cost, full: Cost, digits: int) -> str:
    share = cost.flops / full.flops
    return "unknown" if math.isnan(share) else f"{share:.{digits}%}"


def describe_outcome(study: Study, outcome: Outcome) -> str:
    """Return the result, and the reason if it is limited."""
    if outcome.best is None:
        return "result            none found"
    length, total = outcome.best
    answer = f"result            min_difficulty {length}, total_curriculum_step {total:,}"
    if not outcome.complete:
        return f"{answer}: the largest that was stable when the budget ended"
    if total == study.space.totals[-1]:
        return f"{answer}: the largest T that --most-of-run {study.settings.most_of_run:g} allows"
    return answer


def write_page(study: Study) -> Path | None:
    """Write a report of all probes, named by their verdicts, to the folder ``report``. None if there are no probes."""
    # A schedule may be probed twice in one run folder, at the beginning and for longer. The last verdict counts.
    last_trials = {result.probe.candidate: result.trial for result in study.results}
    runs = []
    for candidate, probe_run in study.runs().items():
        trial = last_trials[candidate]
        verdict = "stable" if trial and trial.stable else "fluctuates"
        run = read_run(probe_run.save, f"min {candidate.min_difficulty}, T {candidate.total_steps}: {verdict}")
        if run.steps:
            runs.append(run)
    if not runs:
        return None
    folder = study.save / "report"
    check_folder(folder)
    folder.mkdir(exist_ok=True)
    return write_report(runs, folder)
