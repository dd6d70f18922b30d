"""Plot how each way of shortening samples uses a run's corpora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw_data_use"]


def draw_data_use(summary: dict[str, Any], path: Path) -> None:
    """Plot the tokens that each way trains on, recycles and drops, and the epochs of each source against steps.

    ``summary`` is the result of ``seqlen_curriculum.data.inspection.token_use.account``. The suffix of ``path`` sets the
    format.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(11, 4), layout="constrained")
    bars, epochs = figure.subplots(1, 2)
    _draw_ways(bars, summary["ways"])
    for source in summary["sources"]:
        points = [(step, epoch) for epoch, step in enumerate(source["epoch_steps"])]
        # 2.5 epochs start at 3 steps, and the run ends half an epoch after the third. Of very many epochs only the first
        # are listed, and the line ends at the last of those.
        if len(points) >= source["epochs"]:
            points.append((summary["steps"], source["epochs"]))
        epochs.plot([step for step, _ in points], [epoch for _, epoch in points], marker=".", label=source["name"])
    epochs.set(xlabel="step", ylabel="epochs read", title="sources of this run")
    epochs.legend(fontsize="small")
    for axis in (bars, epochs):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _draw_ways(axis: Any, ways: list[dict[str, Any]]) -> None:
    """Draw one bar per way, in the order of the table from the top."""
    names = [f"{way['method']}, {way['leftovers']}{' *' if way['configured'] else ''}" for way in ways]
    parts = {
        "trained on, fresh": [way["trained_tokens"] - way["recycled_tokens"] for way in ways],
        "trained on, recycled": [way["recycled_tokens"] for way in ways],
        "dropped": [way["dropped_tokens"] for way in ways],
    }
    left = [0] * len(ways)
    for label, tokens in parts.items():
        axis.barh(names, tokens, left=left, label=label)
        left = [begin + width for begin, width in zip(left, tokens, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="tokens", title="same budget by method and leftovers (*: this configuration)")
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)  # below: bars fill the axis
