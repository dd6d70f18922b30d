"""The results of a study as one JSON object: the best rates, and the cases compared over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.analysis.bootstrap import bootstrap_interval
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.study.plan import Arm, StudyPlan
from seqlen_curriculum.tuning.cost import Cost

__all__ = ["Trained", "best_arm", "best_rates", "compared", "tuning_cost", "tuning_results"]

Column = NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """A run that has ended, and its costs up to each of its evaluations."""

    run: Run

    @property
    def final_loss(self) -> float | None:
        """The validation loss after the last step; None if it diverged before."""
        return float(self.run.evaluations[-1]["valid_loss"]) if self.run.finished else None

    @property
    def uses_cpu_time(self) -> bool:
        """True if its time is CPU time: the run was on a CPU and its log has this time."""
        launches = self.run.info.get("launches") or [{}]
        on_cpu = launches[-1].get("device", {}).get("accelerator") is None
        return on_cpu and all("cpu_seconds" in step for step in self.run.steps)

    @cached_property
    def seconds(self) -> Column:
        """Seconds of training steps before each evaluation, (evaluations,): CPU time if known, else wall-clock time."""
        key = "cpu_seconds" if self.uses_cpu_time else "seconds"
        return self._before_evaluations([step.get(key) or 0 if "loss" in step else 0 for step in self.run.records])

    @cached_property
    def tokens(self) -> Column:
        """Tokens before each evaluation, (evaluations,)."""
        return self.run.series("valid_loss").tokens

    def _before_evaluations(self, seconds: Sequence[float]) -> Column:
        elapsed = np.cumsum(np.asarray(seconds, dtype=np.float64))
        # The log lacks the steps that a rollback has undone. Their time was spent before the step after its checkpoint.
        steps = np.array([record["step"] for record in self.run.records])
        for rollback in self.run.rollbacks or ():
            elapsed += np.where(steps > rollback["returned_to"], rollback.get("seconds", 0), 0)
        at_evaluations = np.array(["valid_loss" in record for record in self.run.records], dtype=bool)
        return np.asarray(elapsed[at_evaluations])

    def until(self, loss: float, costs: Column) -> float:
        """Return the cost at the first evaluation whose loss is at most ``loss``; infinity if there is none."""
        reached = np.flatnonzero(self.run.series("valid_loss").values <= loss)
        return float(costs[reached[0]]) if len(reached) else math.inf


Runs = Mapping[tuple[str, float | None, int], Trained]
"""Runs that have ended, by arm, rate and seed."""


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


def tuning_cost(plan: StudyPlan, runs: Runs, costs: Mapping[str, Cost], reference: str) -> dict[str, Any]:
    """Return the ``tokens``, ``flops`` (None if unknown) and ``seconds`` of all tuning runs, and their number as ``runs``.

    ``trainings`` is how many times the tokens of one run of the arm ``reference`` they are.
    """
    tuning = plan.tuning_runs()
    total = sum((costs[run.arm.name] for run in tuning), Cost())
    trained = [runs[run.arm.name, run.rate, run.seed] for run in tuning]
    return {
        "runs": len(tuning),
        "tokens": total.tokens,
        "flops": None if math.isnan(total.flops) else total.flops,
        "seconds": sum(float(each.seconds[-1]) for each in trained if len(each.seconds)),
        "trainings": total.tokens / costs[reference].tokens,
    }


@dataclass(frozen=True)
class Reference:
    """The runs to compare with, one per seed of the study; None for a seed on which the reference diverged."""

    runs: list[Trained | None]

    def target(self, chosen: NDArray[np.intp]) -> float:
        """Return the mean final loss over the runs ``chosen``, NaN if none has finished."""
        losses = [run.final_loss for run in (self.runs[n] for n in chosen) if run is not None]
        return statistics.mean([loss for loss in losses if loss is not None]) if losses else math.nan

    def ratio(self, others: Sequence[Trained], cost: str, chosen: NDArray[np.intp]) -> float:
        """Return how many times less ``cost`` than a whole reference run ``others`` take to reach its mean final loss.

        The median of the reference's runs over the median of the others, for the seeds ``chosen``: 0 if at least half never
        reach it, NaN if no reference run has finished.
        """
        target = self.target(chosen)
        if math.isnan(target):
            return math.nan
        whole = [float(getattr(run, cost)[-1]) for run in (self.runs[n] for n in chosen) if run is not None]
        needed = statistics.median(others[n].until(target, getattr(others[n], cost)) for n in chosen)
        return statistics.median(whole) / needed if needed else math.nan


def compared(plan: StudyPlan, rates: Mapping[str, float | None], reference: str, runs: Runs) -> list[dict[str, Any]]:
    """Return one entry per arm in ``rates``, compared with the arm ``reference`` on the seeds of the study.

    Each has ``name``, ``rate``, the final losses and stability of its runs, ``reached`` of ``seeds``, and ``tokens`` and
    ``seconds`` as {``ratio``, ``interval``}, in which 0 is never.
    """
    theirs = [runs[reference, rates[reference], seed] for seed in plan.seeds]
    baseline = Reference([run if run.final_loss is not None else None for run in theirs])
    everyone = np.arange(len(plan.seeds))
    target = baseline.target(everyone)
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
                "reached": sum(run.until(target, run.tokens) < math.inf for run in ours),
                "tokens": _reduction(baseline, ours, "tokens", everyone),
                "seconds": _reduction(baseline, ours, "seconds", everyone),
            }
        )
    return entries


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


def _reduction(baseline: Reference, ours: Sequence[Trained], cost: str, everyone: NDArray[np.intp]) -> dict[str, Any]:
    ratio = baseline.ratio(ours, cost, everyone)
    interval = bootstrap_interval(lambda chosen: baseline.ratio(ours, cost, chosen), len(everyone))
    return {"ratio": None if math.isnan(ratio) else ratio, "interval": interval and list(interval)}
