"""What runs came to, and how they compare with the first of them, as one JSON-able object: the paper's Tables 1 to 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seqlen_curriculum import fields
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.analysis.seed_groups import over_seeds
from seqlen_curriculum.analysis.sentences import outcome

__all__ = ["MADE_BY", "report"]

MADE_BY = "seqlen-curriculum report"
"""Stands at the beginning of every file of a report, so that no other file is taken for one."""
_LISTED = 10

Point = dict[str, Any]


def report(runs: Sequence[Run]) -> dict[str, Any]:
    """The runs' numbers; the first run is what the others are compared with.

    ``made_by``; ``outcome``, sentences; ``reference`` {``run``, ``valid_ppl``}, the first run's best, None without its
    evaluation; ``runs``, a list of what ``_one`` tells of each; ``seeds``, of ``over_seeds``; ``config`` {``differing``
    [{``key``, ``values``, one a run}], ``shared`` [{``key``, ``value``}]}, of the runs whose folder holds a ``run.json``.
    Hours are those of training and evaluation, without what lies between launches.
    """
    told = [_one(run) for run in runs]
    best = told[0]["best"]
    for one, run in zip(told, runs, strict=True):
        one["end_ratio"] = _ratios(told[0]["end"], one["end"])
        one["reached"] = run.reached(best)
        one["reached_ratio"] = _ratios(best, one["reached"])
    found = {
        "made_by": MADE_BY,
        "reference": {"run": runs[0].name, "valid_ppl": best["valid_ppl"]} if best else None,
        "runs": told,
        "seeds": over_seeds(runs, told),
        "config": _config(runs),
    }
    return {"made_by": MADE_BY, "outcome": outcome(found), **found}


def _one(run: Run) -> dict[str, Any]:
    """A run by itself: its ``end``, ``final`` and ``best`` evaluation as points (step, tokens, hours), and the rest."""
    points = run.points
    seconds = sum(record["seconds"] for record in run.steps)
    first, last = run.steps[0], run.steps[-1]
    return {
        "name": run.name,
        "first_step": run.records[0]["step"],
        "end": run.end,
        "train_tokens": run.budget,
        "finished": run.finished,
        "training_hours": seconds / 3600,
        "tokens_per_second": run.tokens_per_second,
        "seqlen": [first["seqlen"], last["seqlen"]],
        "loss": last["loss"],
        "final": points[-1] if points else None,
        "best": min(points, key=lambda point: point["valid_loss"]) if points else None,
        "stability": _stability(run),
        "skipped_steps": run.skipped_steps,
        "rollbacks": run.rollbacks,
        "launches": run.info.get("launches"),
    }


def _ratios(reference: Point | None, point: Point | None) -> dict[str, float | None] | None:
    """How many times fewer of each ``point`` took than ``reference``, as Table 2 has it in brackets."""
    if reference is None or point is None:
        return None
    return {
        name: reference[name] / point[name] if point[name] else None for name in ("step", "consumed_tokens", "hours")
    }


def _stability(run: Run) -> dict[str, Any]:
    """``stability``'s summary, its spikes and fluctuations counted; of more than 20 spikes the first and largest 10."""
    found = run.stability
    spikes, fluctuations = found["spikes"], found["fluctuations"]
    listed = spikes
    if len(spikes) > 2 * _LISTED:
        largest = sorted(spikes[_LISTED:], key=lambda spike: spike["ratio"])[-_LISTED:]
        listed = sorted([*spikes[:_LISTED], *largest], key=lambda spike: spike["step"])
    return {**found, "spikes": len(spikes), "spikes_listed": listed, "fluctuations": len(fluctuations)}


def _config(runs: Sequence[Run]) -> dict[str, Any]:
    flat = [dict(fields.flat(run.config)) for run in runs]
    known = [config for config in flat if config]
    keys = list(dict.fromkeys(key for config in known for key in config))
    differing = [key for key in keys if any(config.get(key) != known[0].get(key) for config in known)]
    shared = [{"key": key, "value": known[0][key]} for key in keys if key not in differing]
    return {
        "differing": [{"key": key, "values": [config.get(key) for config in flat]} for key in differing],
        "shared": shared,
    }
