"""The results of a study as one JSON object: the best rates, and the cases compared over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.analysis.bootstrap import bootstrap_interval
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.study.cost import run_cost
from seqlen_curriculum.study.plan import Arm, StudyPlan
from seqlen_curriculum.tuning.cost import Cost

__all__ = [
    "Curve",
    "Runs",
    "Trained",
    "best_arm",
    "best_rates",
    "clock_of",
    "compared",
    "mean_final_loss",
    "reduction",
    "tuning_cost",
    "tuning_results",
]

Column = NDArray[np.float64]


class Curve(NamedTuple):
    """Validation losses of a run against a cost: tokens or seconds."""

    losses: Column
    """(evaluations,)."""
    costs: Column
    """The cost before each evaluation, (evaluations,)."""

    def until(self, loss: float) -> float:
        """Return the cost at the first evaluation whose loss is at most ``loss``; infinity if there is none."""
        reached = np.flatnonzero(self.losses <= loss)
        return float(self.costs[reached[0]]) if len(reached) else math.inf


@dataclass(frozen=True)
class Trained:
    """A run that has ended."""

    run: Run

    @property
    def final_loss(self) -> float | None:
        """The validation loss after the last step; None if it diverged before."""
        return float(self.run.evaluations[-1]["valid_loss"]) if self.run.finished else None

    @property
    def device(self) -> str:
        """The accelerator, or else the CPU, that trained it last; empty if unknown."""
        return self._machine.get("accelerator") or self._machine.get("cpu") or ""

    @property
    def has_cpu_time(self) -> bool:
        """True if it was trained on a CPU, and its log has the CPU time of all steps, also of those undone by rollbacks."""
        on_cpu = self._machine.get("accelerator") is None
        return on_cpu and not self.run.rollbacks and all("cpu_seconds" in step for step in self.run.steps)

    @property
    def _machine(self) -> Mapping[str, Any]:
        """The machine of the newest launch."""
        machine: Mapping[str, Any] = (self.run.info.get("launches") or [{}])[-1].get("device", {})
        return machine

    def over_tokens(self) -> Curve:
        """Return the losses against consumed tokens."""
        points = self.run.series("valid_loss")
        return Curve(points.values, points.tokens)

    def over_time(self, clock: str) -> Curve:
        """Return the losses against the time of training steps, by the key ``clock`` of their records."""
        evaluated = np.array(["valid_loss" in record for record in self.run.records], dtype=bool)
        return Curve(self.run.series("valid_loss").values, self.elapsed(clock)[evaluated])

    def elapsed(self, clock: str) -> Column:
        """Return the time of training steps up to each record."""
        records, step = self.run.records, self.run.ends[0]
        elapsed = np.cumsum([record.get(clock) or 0.0 if "loss" in record else 0.0 for record in records])
        # The log lacks the steps that a rollback has undone. Their time was spent before the step after its checkpoint.
        for rollback in self.run.rollbacks or ():
            elapsed += np.where(step > rollback["returned_to"], rollback.get("seconds", 0), 0)
        return elapsed


Runs = Mapping[tuple[str, float | None, int], Trained]
"""Runs that have ended, by arm, rate and seed."""


def clock_of(runs: Iterable[Trained]) -> str:
    """Return the key of a step's time: ``cpu_seconds`` if all ``runs`` have it, else ``seconds``."""
    return "cpu_seconds" if all(run.has_cpu_time for run in runs) else "seconds"


def tuning_results(plan: StudyPlan, arm: Arm, runs: Runs) -> list[dict[str, Any]]:
    """Return one entry per rate of ``arm``: its runs on the tuning seeds, and the mean loss (None if one diverged)."""
    return [
        {"rate": rate, **_stability_over([runs[arm.name, rate, seed] for seed in plan.tuning_seeds])}
        for rate in plan.rates
    ]


def _stability_over(runs: Sequence[Trained]) -> dict[str, Any]:
    """Return the final losses of runs of the same settings, and the measures of the paper's Tables 1 and 3."""
    losses = [trained.final_loss for trained in runs]
    known = [loss for loss in losses if loss is not None]
    measures = [trained.run.stability for trained in runs if trained.run.steps]
    ratios = [each["max_loss_ratio"] for each in measures if each["max_loss_ratio"] is not None]
    return {
        "final_valid_loss": losses,
        "mean_final_valid_loss": statistics.mean(known) if len(known) == len(losses) else None,
        "range": [min(known), max(known)] if known else None,
        "diverged": len(losses) - len(known),
        "spikes": [len(each["spikes"]) for each in measures],
        "max_loss_ratio": max(ratios, default=None),
    }


def best_rates(plan: StudyPlan, runs: Runs) -> dict[str, float | None]:
    """Return the rate with the lowest mean loss by the name of the arm, None in a study without rates.

    An arm that diverged at every rate is left out.
    """
    if not plan.rates:
        return {arm.name: None for arm in plan.arms}
    tried = {
        arm.name: [result for result in tuning_results(plan, arm, runs) if _mean(result) < math.inf]
        for arm in plan.arms
    }
    return {name: min(results, key=_mean)["rate"] for name, results in tried.items() if results}


def best_arm(plan: StudyPlan, arms: Sequence[Arm], runs: Runs) -> Arm | None:
    """Return the arm with the lowest mean loss on the tuning seeds at its best rate; None if all diverged."""
    losses = {arm.name: min(map(_mean, tuning_results(plan, arm, runs)), default=math.inf) for arm in arms}
    best = min(arms, key=lambda arm: losses[arm.name])
    return best if losses[best.name] < math.inf else None


def _mean(result: Mapping[str, Any]) -> float:
    loss = result["mean_final_valid_loss"]
    return math.inf if loss is None else float(loss)


def tuning_cost(plan: StudyPlan, runs: Runs, costs: Mapping[str, Cost], reference: str, clock: str) -> dict[str, Any]:
    """Return the ``tokens``, ``flops`` (None if unknown) and ``seconds`` of all tuning runs, and their number as ``runs``.

    ``trainings`` is how many times the tokens of one run of the arm ``reference`` they are. A run that diverged counts up
    to its last step.
    """
    tuning = plan.tuning_runs()
    trained = [runs[run.arm.name, run.rate, run.seed] for run in tuning]
    total = Cost()
    for run, found in zip(tuning, trained, strict=True):
        if found.final_loss is not None:
            total += costs[run.arm.name]
        elif found.run.records:
            total += run_cost(run.config, found.run.end["step"])
    return {
        "runs": len(tuning),
        "tokens": total.tokens,
        "flops": None if math.isnan(total.flops) else total.flops,
        "seconds": sum(float(found.elapsed(clock)[-1]) for found in trained if found.run.records),
        "trainings": total.tokens / costs[reference].tokens,
    }


def mean_final_loss(curves: Sequence[Curve | None]) -> float:
    """Return the mean of the last losses, NaN without curves; None is a run that diverged."""
    return statistics.mean(finals) if (finals := [float(curve.losses[-1]) for curve in curves if curve]) else math.nan


def reduction(theirs: Sequence[Curve | None], ours: Sequence[Curve]) -> float:
    """Return how many times less cost ``ours`` take to reach the mean final loss of ``theirs`` than a whole run of them.

    The median cost of whole reference runs over the median cost of ours: 0 if at least half never reach it, NaN if no
    reference run has finished. ``theirs`` has None for a run that diverged.
    """
    whole = [float(curve.costs[-1]) for curve in theirs if curve]
    loss = mean_final_loss(theirs)
    needed = statistics.median(curve.until(loss) for curve in ours)
    return statistics.median(whole) / needed if whole and needed else math.nan


def compared(
    plan: StudyPlan, rates: Mapping[str, float | None], reference: str, runs: Runs, clock: str, target: float
) -> list[dict[str, Any]]:
    """Return one entry per arm in ``rates``, compared with the arm ``reference`` on the seeds of the study.

    ``target`` is the mean final loss of the reference's runs.

    Each has ``name``, ``rate``, the final losses and stability of its runs, ``reached`` of ``seeds``, and ``tokens`` and
    ``time`` (by ``clock``) as {``ratio``, ``interval``}, in which 0 is never.
    """
    theirs = [runs[reference, rates[reference], seed] for seed in plan.seeds]
    entries = []
    for arm in plan.arms:
        if arm.name not in rates:
            continue
        ours = [runs[arm.name, rates[arm.name], seed] for seed in plan.seeds]
        entries.append(
            {
                "name": arm.name,
                "rate": plan.run(arm, rates[arm.name], 0).config.keys.lr,
                **_stability_over(ours),
                **_variance_over(ours),
                "seeds": len(ours),
                "reached": sum(run.over_tokens().until(target) < math.inf for run in ours),
                "tokens": _with_interval(theirs, ours, Trained.over_tokens),
                "time": _with_interval(theirs, ours, lambda run: run.over_time(clock)),
            }
        )
    return entries


def _with_interval(
    theirs: Sequence[Trained], ours: Sequence[Trained], curve: Callable[[Trained], Curve]
) -> dict[str, Any]:
    """Return the ``reduction`` of runs by ``curve``, and its bootstrap interval over seeds; None if unknown."""
    baseline = [curve(run) if run.final_loss is not None else None for run in theirs]
    others = [curve(run) for run in ours]
    ratio = reduction(baseline, others)
    # Runs of the same seed start from the same weights and read the same data, so both are drawn together.
    interval = bootstrap_interval(
        lambda chosen: reduction([baseline[n] for n in chosen], [others[n] for n in chosen]), len(others)
    )
    return {"ratio": None if math.isnan(ratio) else ratio, "interval": interval and list(interval)}


def _variance_over(runs: Sequence[Trained]) -> dict[str, Any]:
    """Return the largest values of Adam's variance over runs, and its mean correlations with the loss ratio."""
    known = [trained.run for trained in runs if trained.run.steps]
    largest, correlations = {}, {}
    for name in ("variance_norm", "variance_max"):
        values = [float(run.series(name).values.max()) for run in known if len(run.series(name).values)]
        largest[f"largest_{name}"] = max(values, default=None)
        measured = [run.stability["correlations"][name]["r"] for run in known if name in run.stability["correlations"]]
        correlations[name] = statistics.mean(measured) if measured else None
    return {**largest, "correlations": correlations}
