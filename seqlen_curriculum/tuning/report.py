"""What a search found and what it cost: in words for a terminal, and as a page with the perplexities of all probes."""

from __future__ import annotations

from pathlib import Path

from seqlen_curriculum.analysis.read_run import read_run
from seqlen_curriculum.analysis.write_report import check_folder, write_report
from seqlen_curriculum.tuning.cost import cost_of
from seqlen_curriculum.tuning.search import Candidate, Outcome, Space
from seqlen_curriculum.tuning.study import ProbeResult, Study

__all__ = ["describe_cost", "describe_costs", "describe_finding", "describe_outcome", "describe_space", "write_page"]


def describe_space(space: Space) -> str:
    """What will be searched."""
    lengths, totals = ", ".join(map(str, space.lengths)), f"{space.totals[0]:,} to {space.totals[-1]:,}"
    beginning = f"{space.beginning_steps:,} steps with T {space.first_total:,}"
    return (
        f"min_difficulty    {lengths}: the first that is stable over {beginning}\n"
        f"T                 {totals} in {len(space.totals)} values: the largest stable over {space.probe_steps:,} steps"
    )


def describe_costs(tuning: Study) -> str:
    """What a probe of each T costs at most, from the first length."""
    space, full = tuning.space, tuning.full_cost()
    lines = ["", f"{'T':>12} {'steps':>8} {'tokens':>15} {'of training':>12} {'of compute':>11}"]
    probes = [(space.first_total, space.beginning_steps), *((total, space.probe_steps) for total in space.totals)]
    for total, most_steps in probes:
        config = tuning.run_of(Candidate(space.lengths[0], total)).config
        steps = min(most_steps, config.timeline().steps)
        cost = cost_of(config, 1, steps)
        shares = f"{cost.tokens / full.tokens:>12.2%} {cost.flops / full.flops:>11.2%}"
        lines.append(f"{total:>12,} {steps:>8,} {cost.tokens:>15,} {shares}")
    return "\n".join(lines)


def describe_finding(finding: ProbeResult) -> str:
    """One line of a probe that is through."""
    (length, total), trial = finding.probe.candidate, finding.trial
    assert trial is not None
    if trial.stable:
        how = f"stable over {trial.step:,} steps"
    elif trial.ratio is None:
        how = f"diverged after step {trial.step:,}"
    else:
        how = f"fluctuates at step {trial.step:,}"
    ratio = f", perplexity at most {trial.ratio:.3f} times its best before" if trial.ratio is not None else ""
    return f"probe {finding.number}: min_difficulty {length}, T {total:,}: {how}{ratio}"


def describe_cost(tuning: Study) -> str:
    """What all probes cost, against the training they tune."""
    spent, full = tuning.cost(), tuning.full_cost()
    shares = f"{spent.tokens / full.tokens:.1%} of the training's; with evaluations {spent.flops / full.flops:.1%}"
    return f"cost              {spent.tokens:,} tokens, {shares} of its compute; {tuning.seconds:,.0f} s"


def describe_outcome(tuning: Study, outcome: Outcome) -> str:
    """The answer, and what it means."""
    if outcome.best is None:
        return "result            none found"
    length, total = outcome.best
    told = f"result            min_difficulty {length}, total_curriculum_step {total:,}"
    if not outcome.complete:
        return f"{told}: the largest that was stable when the budget ended"
    largest = f": the largest T that --most-of-run {tuning.settings.most_of_run:g} allows"
    return told + (largest if total == tuning.space.totals[-1] else "")


def write_page(tuning: Study) -> Path | None:
    """A report of all probes, named by their verdicts, in the folder ``report``; None if there is nothing to show."""
    last = {finding.probe.candidate: finding for finding in tuning.findings}
    runs = [read_run(run.save, _name(last[candidate])) for candidate, run in tuning.runs().items()]
    begun = [run for run in runs if run.steps]
    if not begun:
        return None
    folder = tuning.save / "report"
    check_folder(folder)
    folder.mkdir(exist_ok=True)
    return write_report(begun, folder)


def _name(finding: ProbeResult) -> str:
    (length, total), trial = finding.probe.candidate, finding.trial
    verdict = "stable" if trial and trial.stable else "fluctuates"
    return f"min {length}, T {total}: {verdict}"
