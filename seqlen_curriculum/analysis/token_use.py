"""What the ways of cutting make of a run's corpora, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw_data_use"]


def draw_data_use(summary: dict[str, Any], path: Path) -> None:
    """Tokens trained on, recycled and dropped by each of ``ways``; epochs of each of ``sources`` against steps.

    ``summary`` is ``seqlen_curriculum.data.inspection.token_use.account``'s; a picture by suffix.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(11, 4), layout="constrained")
    bars, epochs = figure.subplots(1, 2)
    _draw_ways(bars, summary["ways"])
    for source in summary["sources"]:
        steps = source["epoch_steps"]
        last = [(summary["steps"], source["epochs"])] if len(steps) >= source["epochs"] else []  # else not all are told
        points = [*((step, epoch) for epoch, step in enumerate(steps)), *last]
        epochs.plot(*zip(*points, strict=True), marker=".", label=source["name"])
    epochs.set(xlabel="step", ylabel="epochs read", title="this run's sources")
    epochs.legend(fontsize="small")
    for axis in (bars, epochs):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _draw_ways(axis: Any, ways: list[dict[str, Any]]) -> None:
    """A bar a way, from the top in the order of the table."""
    names = [f"{way['method']}, {way['leftovers']}{' *' if way['configured'] else ''}" for way in ways]
    fresh = [way["trained_tokens"] - way["recycled_tokens"] for way in ways]
    left = [0] * len(ways)
    parts = {"trained on, fresh": fresh}
    parts |= {
        label: [way[key] for way in ways]
        for label, key in (("trained on, recycled", "recycled_tokens"), ("dropped", "dropped_tokens"))
    }
    for label, values in parts.items():
        axis.barh(names, values, left=left, label=label)
        left = [before + value for before, value in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="tokens", title="same budget by method and leftovers (* is this file's)")
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)  # below: bars fill the axis
