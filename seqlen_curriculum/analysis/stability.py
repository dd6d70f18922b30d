"""Training stability measured from a run's log, as in the paper's Tables 1 and 3.

The loss ratio of a step is its training loss over the lowest loss of all earlier steps. Under a curriculum it compares
losses at different lengths, so the same ratio of validation perplexity, always at full length, is reported too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.analysis.correlation import pearson
from seqlen_curriculum.run_folder.ratios import perplexity_ratios, ratios_to_best
from seqlen_curriculum.schedule.schedule_config import SIGNIFICANT

__all__ = ["SPIKE", "correlations", "describe_stability", "listed_spikes", "stability"]

SPIKE = 1.2
"""A step with a larger loss ratio is a spike (Table 1)."""


def stability(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the measures of training and evaluation records (of ``load_run``) as one JSON object.

    - ``steps``: their number; ``spikes``: [{step, seqlen, lr, loss, ratio}]; ``spike_share``: fraction of the steps
    - ``max_loss_ratio``, ``max_loss_ratio_step``: None if no step has a ratio, as for a single step
    - ``evaluations``: their number; ``fluctuations``: [{step, valid_ppl, ratio}]; ``max_perplexity_ratio``
    - ``correlations``: the result of ``correlations``
    """
    ratios = ratios_to_best([record["loss"] for record in steps])
    # Computed from the loss, because the log's perplexity is cut off at exp(20).
    perplexity = perplexity_ratios([record["valid_loss"] for record in evaluations])
    spikes = _records_above(SPIKE, steps, ratios, ("step", "seqlen", "lr", "loss"))
    known = not np.isnan(ratios).all()
    return {
        "steps": len(steps),
        "spikes": spikes,
        "spike_share": len(spikes) / len(steps),
        "max_loss_ratio": float(np.nanmax(ratios)) if known else None,
        "max_loss_ratio_step": steps[int(np.nanargmax(ratios))]["step"] if known else None,
        "evaluations": len(evaluations),
        "fluctuations": _records_above(SIGNIFICANT, evaluations, perplexity, ("step", "valid_ppl")),
        "max_perplexity_ratio": float(np.nanmax(perplexity)) if len(evaluations) > 1 else None,
        "correlations": correlations(steps, ratios),
    }


def _records_above(
    limit: float, records: Sequence[dict[str, Any]], ratios: NDArray[np.float64], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """Return ``keys`` and ``ratio`` of the records whose ratio is above ``limit``."""
    return [
        {**{key: record[key] for key in keys}, "ratio": float(ratio)}
        for record, ratio in zip(records, ratios, strict=True)
        if ratio > limit
    ]


def listed_spikes(spikes: Sequence[dict[str, Any]], half: int = 10) -> Sequence[dict[str, Any]]:
    """Return the first ``half`` spikes and the ``half`` largest others, in order of their steps."""
    if len(spikes) <= 2 * half:
        return spikes
    largest = sorted(spikes[half:], key=lambda spike: float(spike["ratio"]))[-half:]
    return sorted([*spikes[:half], *largest], key=lambda spike: int(spike["step"]))


def correlations(steps: Sequence[dict[str, Any]], ratios: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """Return Pearson's r between Adam's variance and the loss ratio, its p-value, and the number of steps with both.

    The result is {``variance_norm``: {``r``, ``p``, ``steps``}, ``variance_max``: ...}. A measure is left out if fewer than
    three steps have it, or if it or the loss ratio is constant.
    """
    measured = {}
    for name in ("variance_norm", "variance_max"):
        pairs = [
            (float(ratio), float(record[name]))
            for record, ratio in zip(steps, ratios, strict=True)
            if record.get(name) is not None and not math.isnan(ratio)
        ]
        # r of two points is always 1 or -1, and a constant has no correlation.
        loss_ratios, variances = [ratio for ratio, _ in pairs], [variance for _, variance in pairs]
        if len(pairs) < 3 or len(set(loss_ratios)) == 1 or len(set(variances)) == 1:
            continue
        r, p = pearson(loss_ratios, variances)
        measured[name] = {"r": r, "p": p, "steps": len(pairs)}
    return measured


def describe_stability(summary: dict[str, Any]) -> str:
    """Return the measures as lines for a terminal."""
    if summary["max_loss_ratio"] is None:
        return "loss ratio       needs two steps with losses above 0"
    spikes, share = len(summary["spikes"]), summary["spike_share"]
    lines = [
        f"loss ratio       over {SPIKE} at {spikes:,} of {summary['steps']:,} steps ({share:.2%}), at most "
        f"{summary['max_loss_ratio']:.3f} at step {summary['max_loss_ratio_step']:,}"
    ]
    if summary["max_perplexity_ratio"] is not None:
        fluctuations, evaluations = len(summary["fluctuations"]), summary["evaluations"]
        lines.append(
            f"perplexity ratio over {SIGNIFICANT} at {fluctuations:,} of {evaluations:,} evaluations, at most "
            f"{summary['max_perplexity_ratio']:.3f}"
        )
    for name, correlation in summary["correlations"].items():
        lines.append(
            f"Pearson's r      {correlation['r']:.2f} of loss ratio and {name} "
            f"(p = {correlation['p']:.2g}, {correlation['steps']:,} steps)"
        )
    return "\n".join(lines)
