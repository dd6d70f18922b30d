"""The curves of a run, from its log alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import DataError
from seqlen_curriculum.runlog import read_runlog

__all__ = ["draw_run", "load_run", "summarise"]

Records = list[dict[str, Any]]


def load_run(save: Path) -> tuple[Records, Records]:
    """(training records, evaluation records) of the run in the folder ``save``. Raises DataError without a step."""
    path = save / "runlog.jsonl"
    records = list(read_runlog(path)) if path.exists() else []
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise DataError(f"{path}: no training step here yet; give the --save folder of a run that has started")
    return steps, [record for record in records if "valid_loss" in record]


def summarise(steps: Records, evaluations: Records) -> str:
    """The run in a few lines for a terminal."""
    seconds = sum(record["seconds"] for record in steps)
    from_the_start = steps[0]["step"] == 1
    timed = sum(record["seconds"] for record in (steps if from_the_start else steps[1:]))
    tokens = steps[-1]["consumed_tokens"] - (0 if from_the_start else steps[0]["consumed_tokens"])
    speed = f", {tokens / timed:,.0f} tokens/s" if timed else ""
    lines = [
        f"steps            {steps[-1]['step']:,}",
        f"consumed tokens  {steps[-1]['consumed_tokens']:,}",
        f"seqlen           {steps[0]['seqlen']} to {steps[-1]['seqlen']}",
        f"training loss    {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}",
        f"training time    {seconds:,.0f} s{speed}",
    ]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        lines.append(
            f"validation loss  {first['valid_loss']:.3f} at step {first['step']:,} to {last['valid_loss']:.3f} at step "
            f"{last['step']:,} (perplexity {last['valid_ppl']:.1f}), always at full length"
        )
    return "\n".join(lines)


def draw_run(steps: Records, evaluations: Records, path: Path) -> None:
    """Losses, seqlen and learning rate against consumed tokens, and the losses against steps; a picture by suffix."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, x_name in ((axes[0, 0], "consumed_tokens"), (axes[0, 1], "step")):
        axis.plot(
            _column(steps, x_name), _column(steps, "loss"), lw=0.8, alpha=0.6, label="training, at today's length"
        )
        axis.plot(
            _column(evaluations, x_name), _column(evaluations, "valid_loss"), lw=2, label="validation, full length"
        )
        axis.set(xlabel=x_name.replace("_", " "), ylabel="loss (nats a token)")
        axis.legend()
    for axis, name, label in ((axes[1, 0], "seqlen", "seqlen (tokens)"), (axes[1, 1], "lr", "learning rate")):
        axis.plot(_column(steps, "consumed_tokens"), _column(steps, name), drawstyle="steps-pre")
        axis.set(xlabel="consumed tokens", ylabel=label)
        axis.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _column(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records]
