"""The report of a study: its tables, plots of all measured runs, and the sentences that they support."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.analysis import formats
from seqlen_curriculum.analysis.report import report
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.analysis.study_tables import fewer
from seqlen_curriculum.analysis.write_report import check_folder, write_report
from seqlen_curriculum.errors import DivergenceError
from seqlen_curriculum.files import replace_text
from seqlen_curriculum.study.plan import Arm, StudyPlan
from seqlen_curriculum.study.results import (
    Runs,
    best_arm,
    clock_of,
    compared,
    mean_final_loss,
    tuning_cost,
    tuning_results,
)
from seqlen_curriculum.tuning.cost import Cost

__all__ = [
    "device_warnings",
    "edge_warnings",
    "measured_runs",
    "reference_arm",
    "study_report",
    "study_results",
    "study_sentences",
    "write_page",
    "write_tuned",
]


def study_results(
    plan: StudyPlan, rates: Mapping[str, float | None], runs: Runs, costs: Mapping[str, Cost]
) -> dict[str, Any]:
    """Return the results of a study whose runs have all ended.

    - ``reference``: the case that the others are compared with; ``target``: the mean final validation loss of its runs that
      finished, ``finished`` of them
    - ``clock``: "CPU" or "wall-clock"
    - ``cases``: the result of ``compared``
    - ``chosen``: the case with the lowest loss on the tuning seeds; None in a study without rates
    - ``tuning``: None without rates, else the ``tried`` rates, ``cases`` [{``name``, ``rates``}] and ``cost``

    Raises DivergenceError if the reference has no finished run to compare with.
    """
    reference = reference_arm(plan, rates, runs)
    theirs = [runs[reference.name, rates[reference.name], seed] for seed in plan.seeds]
    finished = [run.over_tokens() for run in theirs if run.final_loss is not None]
    if not finished:
        raise DivergenceError(f"reference: {reference.name} diverged on all seeds; give lower rates")
    target = mean_final_loss(finished)
    clock, chosen = clock_of(runs.values()), best_arm(plan, plan.arms, runs) if plan.rates else None
    tuning = {
        "tried": plan.rates,
        "seeds": plan.tuning_seeds,
        "cases": [{"name": arm.name, "rates": tuning_results(plan, arm, runs)} for arm in plan.arms],
        "cost": tuning_cost(plan, runs, costs, reference.name, clock),
    }
    return {
        "reference": reference.name,
        "target": target,
        "finished": len(finished),
        "clock": "CPU" if clock == "cpu_seconds" else "wall-clock",
        "cases": compared(plan, rates, reference.name, runs, clock, target),
        "chosen": chosen.name if chosen else None,
        "tuning": tuning if plan.rates else None,
    }


def reference_arm(plan: StudyPlan, rates: Mapping[str, float | None], runs: Runs) -> Arm:
    """Return the arm that others are compared with: the best-tuned one of those that ``plan.reference`` names.

    Raises DivergenceError if they diverged at every rate.
    """
    references = [arm for arm in plan.references() if arm.name in rates]
    if not references:
        raise DivergenceError(f"reference: {plan.reference} diverged at every rate; give lower rates")
    return (best_arm(plan, references, runs) if plan.rates else None) or references[0]


def study_report(runs: Sequence[Run], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report of the measured ``runs``, those of the reference first, with the results under ``study``."""
    numbers = report(runs)
    return {**numbers, "outcome": [*study_sentences(results), *numbers["outcome"]], "study": dict(results)}


def measured_runs(plan: StudyPlan, rates: Mapping[str, float | None], runs: Runs, reference: str) -> list[Run]:
    """Return the runs of the comparison, those of the reference first, without those that diverged in the first step."""
    names = sorted(rates, key=lambda name: name != reference)
    measured = [runs[name, rates[name], seed].run for name in names for seed in plan.seeds]
    return [run for run in measured if run.steps]


def write_page(runs: Sequence[Run], numbers: dict[str, Any], folder: Path) -> Path:
    """Write the report ``numbers`` of ``runs`` to ``folder`` and return the path of the page."""
    check_folder(folder)
    folder.mkdir(exist_ok=True)
    return write_report(runs, folder, numbers=numbers)


def write_tuned(plan: StudyPlan, results: Mapping[str, Any], folder: Path) -> Path | None:
    """Write ``tuned.json``, the configuration of the chosen case at its best rate, and return its path; None without one."""
    if results["chosen"] is None:
        return None
    arm = next(arm for arm in plan.arms if arm.name == results["chosen"])
    rate = next(case["rate"] for case in results["cases"] if case["name"] == arm.name)
    path, own_seed = folder / "tuned.json", {"training": arm.raw["training"]}
    replace_text(path, json.dumps({**plan.run(arm, rate, plan.seeds[0]).raw, **own_seed}, indent=2) + "\n")
    return path


def study_sentences(results: Mapping[str, Any]) -> list[str]:
    """Return sentences about the case that tuning has chosen, its success on other seeds, and the cost of tuning."""
    if results["tuning"] is None:
        return []
    cases = {case["name"]: case for case in results["cases"]}
    chosen, reference = cases[results["chosen"]], results["reference"]
    name, loss = chosen["name"], chosen["mean_final_valid_loss"]
    rate = formats.significant(chosen["rate"])
    sentences = [f"{name} at learning rate {rate} has the lowest mean final validation loss on the tuning seeds."]
    ends = f"ends at {formats.plain(loss)}" if loss is not None else f"diverges {chosen['diverged']} times"
    target = f"{reference}'s mean final loss of {formats.plain(results['target'])}"
    if results["finished"] < chosen["seeds"]:
        target += f" ({results['finished']} of its runs finished)"
    reached = f"{chosen['reached']} of {chosen['seeds']} runs"
    sentence = f"On {chosen['seeds']} other seeds it {ends}, and {reached} reach {target}"
    sentences.append(f"{sentence}{'' if name == reference else _less_time(chosen['time'], results['clock'])}.")
    finished = [case for case in results["cases"] if case["mean_final_valid_loss"] is not None]
    best = min(finished, key=lambda case: float(case["mean_final_valid_loss"]), default=None)
    if best is not None and len(cases) > 1:
        lower = (
            f"{best['name']} has the lowest mean loss on these seeds, {formats.plain(best['mean_final_valid_loss'])}."
        )
        sentences.append("It has the lowest mean loss on these seeds too." if best["name"] == name else lower)
    return [*sentences, _tuning_sentence(results)]


def _less_time(time: Mapping[str, Any], clock: str) -> str:
    ratio, interval = time["ratio"], time["interval"]
    if not ratio:
        return ""
    if ratio < 1:
        return f", in {formats.ratio(1 / ratio)} the {clock} time of a whole run of it"
    ends = f" (95% interval: {fewer(interval[0])} to {fewer(interval[1])})" if interval else ""
    return f", in {formats.ratio(ratio)} less {clock} time{ends}"


def _tuning_sentence(results: Mapping[str, Any]) -> str:
    cost = results["tuning"]["cost"]
    flops = f"{cost['flops']:.3g} FLOPs, " if cost["flops"] is not None else ""
    amounts = f"{formats.compact(cost['tokens'])} tokens, {flops}{formats.duration(cost['seconds'] / 3600)}"
    amounts += f" of {results['clock']} time"
    share = f"{cost['trainings']:.1f} times the tokens of one run of {results['reference']}"
    return f"Tuning took {cost['runs']} runs, {share}: {amounts}."


def device_warnings(runs: Runs) -> list[str]:
    """Return a warning if runs were trained on different devices."""
    devices = sorted({run.device for run in runs.values()} - {""})
    if len(devices) < 2:
        return []
    return [f"runs were trained on different devices ({', '.join(devices)}), so their times can't be compared"]


def edge_warnings(plan: StudyPlan, rates: Mapping[str, float | None], runs: Runs) -> list[str]:
    """Return a warning for each case whose best rate is the smallest or largest tried, and for each that diverged."""
    lines = []
    for arm in plan.arms if plan.rates else []:
        rate = rates.get(arm.name)
        if rate is None:
            lines.append(f"{arm.name}: diverged at every rate, so it is not compared; give lower rates")
        elif len(plan.rates) > 1 and rate in (min(plan.rates), max(plan.rates)):
            end, direction = ("smallest", "smaller") if rate == min(plan.rates) else ("largest", "larger")
            lines.append(f"{arm.name}: its best rate, {rate:g}, is the {end} one tried; add {direction} rates")
        failed = [entry["rate"] for entry in tuning_results(plan, arm, runs) if entry["diverged"] and rate is not None]
        if failed:
            lines.append(
                f"{arm.name}: diverged at {', '.join(f'{value:g}' for value in failed)}, which counts as worst"
            )
    return lines
