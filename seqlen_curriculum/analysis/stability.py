"""How stable a run was, from its log alone: the measures of the paper's Tables 1 and 3.

The loss ratio of a step is its training loss over the least of all earlier steps. Under a curriculum that compares losses
at different lengths, so the same is told of the validation perplexity, which is always at full length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.run_folder.ratios import perplexity_ratios, ratios_to_best
from seqlen_curriculum.schedule.schedule_config import SIGNIFICANT

__all__ = ["SPIKE", "describe_stability", "stability"]

SPIKE = 1.2
"""A step of a larger loss ratio is a spike (Table 1)."""
_VARIANCES = ("variance_norm", "variance_max")


def stability(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Training and evaluation records of a run (``load_run``) as one JSON-able object.

    ``steps, spikes`` [{step, seqlen, lr, loss, ratio}], ``spike_share`` of all steps, ``max_loss_ratio`` and its
    ``max_loss_ratio_step`` (None for a single step); ``evaluations, fluctuations`` [{step, valid_ppl, ratio}],
    ``max_perplexity_ratio``; and where the records hold Adam's variance, ``correlations`` {``variance_norm``,
    ``variance_max``: {r, p, steps}} of Pearson between it and the loss ratio.
    """
    ratios = ratios_to_best([record["loss"] for record in steps])
    # From the loss: the perplexity in the log is cut off at exp(20).
    perplexity = perplexity_ratios([record["valid_loss"] for record in evaluations])
    told = ("step", "seqlen", "lr", "loss")
    spikes = [
        {**{name: record[name] for name in told}, "ratio": float(ratio)}
        for record, ratio in zip(steps, ratios, strict=True)
        if ratio > SPIKE
    ]
    fluctuations = [
        {"step": record["step"], "valid_ppl": record["valid_ppl"], "ratio": float(ratio)}
        for record, ratio in zip(evaluations, perplexity, strict=True)
        if ratio > SIGNIFICANT
    ]
    return {
        "steps": len(steps),
        "spikes": spikes,
        "spike_share": len(spikes) / len(steps),
        "max_loss_ratio": _largest(ratios),
        "max_loss_ratio_step": steps[int(np.nanargmax(ratios))]["step"] if len(steps) > 1 else None,
        "evaluations": len(evaluations),
        "fluctuations": fluctuations,
        "max_perplexity_ratio": _largest(perplexity),
        "correlations": _correlations(steps, ratios),
    }


def _largest(ratios: NDArray[np.float64]) -> float | None:
    return float(np.nanmax(ratios)) if len(ratios) > 1 else None


def _correlations(steps: Sequence[dict[str, Any]], ratios: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """Pearson's r and its p-value over the steps that hold a variance; none where one of the two never changes."""
    found = {}
    for name in _VARIANCES:
        pairs = [
            (float(ratio), float(record[name]))
            for record, ratio in zip(steps, ratios, strict=True)
            if record.get(name) is not None and not math.isnan(ratio)
        ]
        if len(pairs) < 3 or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
            continue
        from scipy.stats import pearsonr  # slow to import, and only needed here

        result = pearsonr(*zip(*pairs, strict=True))
        found[name] = {"r": float(result.statistic), "p": float(result.pvalue), "steps": len(pairs)}
    return found


def describe_stability(summary: dict[str, Any]) -> str:
    """The summary as lines for a terminal."""
    if summary["max_loss_ratio"] is None:
        return "loss ratio       needs two steps"
    count, share = len(summary["spikes"]), summary["spike_share"]
    lines = [
        f"loss ratio       over {SPIKE} at {count:,} of {summary['steps']:,} steps ({share:.2%}), at most "
        f"{summary['max_loss_ratio']:.3f} at step {summary['max_loss_ratio_step']:,}"
    ]
    if summary["max_perplexity_ratio"] is not None:
        count, most = len(summary["fluctuations"]), summary["max_perplexity_ratio"]
        of = f"{summary['evaluations']:,} evaluations"
        lines.append(f"perplexity ratio over {SIGNIFICANT} at {count:,} of {of}, at most {most:.3f}")
    for name, one in summary["correlations"].items():
        told = f"p = {one['p']:.2g}, {one['steps']:,} steps"
        lines.append(f"Pearson's r      {one['r']:.2f} of loss ratio and {name} ({told})")
    return "\n".join(lines)
