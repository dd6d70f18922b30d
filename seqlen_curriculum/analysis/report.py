"""The results of runs, compared with the first run, as one JSON object: the paper's Tables 1 to 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seqlen_curriculum.analysis.bucket_use import pieces_read
from seqlen_curriculum.analysis.machine import machine_use
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.analysis.seed_groups import over_seeds
from seqlen_curriculum.analysis.sentences import outcome
from seqlen_curriculum.analysis.stability import listed_spikes

__all__ = ["MADE_BY", "compare_settings", "report", "summary_of"]

MADE_BY = "seqlen-curriculum report"
"""The mark at the start of every file of a report. A file without it is never overwritten."""

Point = dict[str, Any]


def report(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the numbers of the runs, compared with the first run.

    - ``made_by``: ``MADE_BY``
    - ``outcome``: two sentences
    - ``reference``: {``run``, ``valid_ppl``}, the first run's best perplexity, or None if it has no evaluation
    - ``runs``: one ``summary_of`` per run, with ``end_ratio``, ``reached`` and ``reached_ratio``
    - ``seeds``: the result of ``over_seeds``
    - ``config``: the result of ``compare_settings``

    Hours are training and evaluation time, without the gaps between launches.
    """
    summaries = [summary_of(run) for run in runs]
    best = summaries[0]["best"]
    for summary, run in zip(summaries, runs, strict=True):
        summary["end_ratio"] = _ratios(summaries[0]["end"], summary["end"])
        summary["reached"] = run.reached(best)
        summary["reached_ratio"] = _ratios(best, summary["reached"])
    numbers = {
        "reference": {"run": runs[0].name, "valid_ppl": best["valid_ppl"]} if best else None,
        "runs": summaries,
        "seeds": over_seeds(runs, summaries),
        "config": compare_settings(runs),
    }
    return {"made_by": MADE_BY, "outcome": outcome(numbers), **numbers}


def summary_of(run: Run) -> dict[str, Any]:
    """Return the numbers of one run. ``end`` and the evaluations ``final`` and ``best`` have step, tokens and hours."""
    points, measures = run.points, run.stability
    first, last = run.steps[0], run.steps[-1]
    # The report counts spikes and fluctuations instead of listing them: there may be thousands.
    counts = {key: len(measures[key]) for key in ("spikes", "fluctuations")}
    return {
        "name": run.name,
        "first_step": run.records[0]["step"],
        "end": run.end,
        "train_tokens": run.budget,
        "finished": run.finished,
        "training_hours": sum(record["seconds"] for record in run.steps) / 3600,
        "tokens_per_second": run.tokens_per_second,
        "machine": machine_use(run.records),
        "pieces": pieces_read(run),
        "seqlen": [first["seqlen"], last["seqlen"]],
        "loss": last["loss"],
        "final": points[-1] if points else None,
        "best": min(points, key=lambda point: point["valid_loss"]) if points else None,
        "stability": {**measures, **counts, "spikes_listed": listed_spikes(measures["spikes"])},
        "skipped_steps": run.skipped_steps,
        "rollbacks": run.rollbacks,
        "launches": run.info.get("launches"),
    }


def _ratios(reference: Point | None, point: Point | None) -> dict[str, float | None] | None:
    """Return how many times fewer steps, tokens and hours ``point`` took than ``reference`` (Table 2's brackets)."""
    if reference is None or point is None:
        return None
    # 400 tokens of the reference over 100 of the run: 4.0x fewer. Below 1 the run took more.
    return {key: reference[key] / point[key] if point[key] else None for key in ("step", "consumed_tokens", "hours")}


def compare_settings(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the settings that differ and those that are shared among the runs of known configuration.

    ``differing`` [{``key``, ``values``, one per run, None if unknown}], ``shared`` [{``key``, ``value``}].
    """
    # A run without run.json would make every setting differ. It is not compared, and its value in each list is None.
    known = [run.settings for run in runs if run.settings]
    keys = list(dict.fromkeys(key for settings in known for key in settings))
    differing = [key for key in keys if any(settings.get(key) != known[0].get(key) for settings in known)]
    return {
        "differing": [{"key": key, "values": [run.settings.get(key) for run in runs]} for key in differing],
        "shared": [{"key": key, "value": known[0][key]} for key in keys if key not in differing],
    }
