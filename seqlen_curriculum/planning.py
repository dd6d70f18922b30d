"""A run before it starts: its milestones as numbers, as text and as a picture. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.timeline import Timeline
from seqlen_curriculum.schedule.token_lr import TokenCosine

__all__ = ["compare", "data_use", "describe", "draw", "plan"]

_AGAINST = ("step", "consumed tokens")
_FATES = {"dropped_tokens": "dropped", "leftover_tokens": "read later"}


def plan(config: RunConfig, at: Iterable[int] = ()) -> dict[str, Any]:
    """The run as one JSON-able object; ``at`` adds steps to ``milestones``. Tokens are target tokens of all ranks.

    ``steps, consumed_tokens, full_length_step, full_batch_step, lengths`` (how many), ``shapes`` (how many pairs of rows
    and their tokens), ``milestones [{step, seqlen, rows, consumed_tokens, lr}]``, and where the file says enough:
    ``sample_tokens`` and ``dropped_tokens`` or ``leftover_tokens`` of them (data section), ``parameters, flops,
    flops_of_full_length`` (model section; the latter is the same budget at constant full length), ``without_seqlen_bucket
    {steps, lengths, flops}``. Raises ConfigError.
    """
    timeline = config.timeline()
    rate = config.plan.learning_rate()
    full_length = config.data.seq_length if config.data else max(timeline.lengths())
    full_steps = {
        "full_length_step": timeline.first_step_at(full_length),
        "full_batch_step": timeline.first_step_of_samples(timeline.global_batch),
    }
    steps = sorted({*_key_steps(timeline, rate), *filter(None, full_steps.values()), *_asked(at, timeline)})
    summary: dict[str, Any] = {
        "steps": timeline.steps,
        "consumed_tokens": timeline.consumed_tokens(timeline.steps),
        **full_steps,
        "lengths": len(timeline.lengths()),
        "shapes": len(timeline.shapes()),
        "milestones": [_milestone(timeline, rate, step) for step in steps],
    }
    if config.data:
        summary |= data_use(timeline, config.data.seq_length, config.data.leftovers == "recycle")
    if config.model:
        summary |= _compute(timeline, config.model, full_length)
    if config.training and config.training.seqlen_bucket:
        without = plan(replace(config, training=config.training.model_copy(update={"seqlen_bucket": None})))
        summary["without_seqlen_bucket"] = {
            name: without[name] for name in ("steps", "lengths", "flops") if name in without
        }
    return summary


def _key_steps(timeline: Timeline, rate: TokenCosine | None) -> set[int]:
    """First and last step, end of the LR warmup, and every tenth of the budget."""
    tenths = {timeline.steps_to(timeline.train_tokens * tenth // 10) for tenth in range(1, 10)}
    warmup = {timeline.steps_to(rate.warmup_tokens)} if rate else set()
    return {step for step in {1, timeline.steps} | tenths | warmup if 1 <= step <= timeline.steps}


def _asked(steps: Iterable[int], timeline: Timeline) -> set[int]:
    asked = set(steps)
    outside = sorted(step for step in asked if not 1 <= step <= timeline.steps)
    if outside:
        raise ConfigError(f"--at: {outside[0]} is not a step of this run; its steps are 1 to {timeline.steps}")
    return asked


def _milestone(timeline: Timeline, rate: TokenCosine | None, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "seqlen": timeline.seqlen(step),
        "rows": timeline.rows(step),
        "consumed_tokens": timeline.consumed_tokens(step),
        "lr": rate(step) if rate else None,
    }


def data_use(timeline: Timeline, seq_length: int, recycle: bool) -> dict[str, int]:
    """Each sample stands for ``seq_length`` tokens; what a cut leaves over is dropped, or read later."""
    read = timeline.consumed_samples(timeline.steps) * seq_length
    left = read - timeline.consumed_tokens(timeline.steps)
    return {"sample_tokens": read, "leftover_tokens" if recycle else "dropped_tokens": left}


def _compute(timeline: Timeline, model: ModelConfig, full_length: int) -> dict[str, float]:
    """Training FLOPs of the run, and of as many tokens at full length."""
    lengths, tokens = timeline.tokens_by_length()
    flops = float(np.sum(tokens * model.flops_per_token(lengths)))
    full = float(np.sum(tokens)) * model.flops_per_token(full_length)
    return {"parameters": model.parameter_count(), "flops": flops, "flops_of_full_length": full}


def describe(summary: dict[str, Any]) -> str:
    """The plan as text for a terminal."""
    full = summary["full_length_step"]
    lines = [
        f"steps             {summary['steps']:,}",
        f"consumed tokens   {summary['consumed_tokens']:,}",
        f"full length       {'never reached' if full is None else f'from step {full:,}'}",
        f"lengths used      {summary['lengths']}",
    ]
    if summary["milestones"][0]["rows"] != summary["milestones"][-1]["rows"]:
        lines.append(_rows_line(summary))
    if "sample_tokens" in summary:
        fate, left = next((fate, summary[key]) for key, fate in _FATES.items() if key in summary)
        lines.append(
            f"tokens of samples {summary['sample_tokens']:,}, {fate} {left:,} ({left / summary['sample_tokens']:.1%})"
        )
    if "flops" in summary:
        ratio = summary["flops"] / summary["flops_of_full_length"]
        lines.append(
            f"compute           {summary['flops']:.3g} FLOPs, {ratio:.3f} of the same tokens at full length "
            f"({summary['parameters']:,} parameters)"
        )
    if "without_seqlen_bucket" in summary:
        without = summary["without_seqlen_bucket"]
        flops = f", {without['flops']:.3g} FLOPs" if "flops" in without else ""
        lines.append(f"without bucket    {without['steps']:,} steps, {without['lengths']} lengths used{flops}")
    return "\n".join([*lines, "", *_table(summary["milestones"])])


def _rows_line(summary: dict[str, Any]) -> str:
    first, last = (summary["milestones"][index]["rows"] for index in (0, -1))
    full = summary["full_batch_step"]
    reached = {None: " (the full batch is never reached)", 1: ""}.get(full, f" (from step {full or 0:,})")
    return f"rows of a step    {first:,} to {last:,}{reached}, {summary['shapes']} shapes of rows and their tokens"


def _table(milestones: Sequence[dict[str, Any]]) -> list[str]:
    rows = [f"{'step':>10} {'seqlen':>7} {'rows':>6} {'consumed tokens':>18} {'lr':>12}"]
    for m in milestones:
        lr = "DeepSpeed's" if m["lr"] is None else f"{m['lr']:.4e}"
        rows.append(f"{m['step']:>10,} {m['seqlen']:>7,} {m['rows']:>6,} {m['consumed_tokens']:>18,} {lr:>12}")
    return rows


def compare(plans: Mapping[str, dict[str, Any]]) -> str:
    """Plans by name, a line each, as text for a terminal."""
    width = max(map(len, plans))
    return "\n".join([f"{'':{width}}" + _COMPARED, *(f"{name:{width}}{_compared(one)}" for name, one in plans.items())])


_COMPARED = f" {'steps':>9} {'tokens':>17} {'full length at':>14} {'lengths':>7} {'left over':>9} {'FLOPs':>9}"


def _compared(summary: dict[str, Any]) -> str:
    full = summary["full_length_step"]
    at = "never" if full is None else f"{full:,}"
    left = next((summary[key] / summary["sample_tokens"] for key in _FATES if key in summary), None)
    share = "" if left is None else f"{left:.1%}"
    flops = f"{summary['flops']:.3g}" if "flops" in summary else ""
    counts = f" {summary['steps']:>9,} {summary['consumed_tokens']:>17,} {at:>14} {summary['lengths']:>7}"
    return f"{counts} {share:>9} {flops:>9}"


def draw(configs: Mapping[str, RunConfig], path: Path) -> None:
    """Seqlen, learning rate and changing rows against steps and consumed tokens, over each other; a picture by suffix."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    runs = {name: _curves(config) for name, config in configs.items()}
    rising = any(rows[0] != rows[-1] for rows in (run["rows of a step"][0] for run in runs.values()))
    drawn = {label: style for run in runs.values() for label, (_, style) in run.items() if style}
    labels = {label: style for label, style in drawn.items() if rising or label != "rows of a step"}
    figure = Figure(figsize=(10, 3 * len(labels)), layout="constrained")
    axes = figure.subplots(len(labels), 2, sharex="col", squeeze=False)
    for row, (label, style) in zip(axes, labels.items(), strict=True):
        for axis, against in zip(row, _AGAINST, strict=True):
            for name, run in runs.items():
                if label in run:
                    axis.plot(run[against][0], run[label][0], drawstyle=style, label=name, lw=1.2, alpha=0.8)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.set(ylabel=label, xlabel=against)
    if len(runs) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    else:
        figure.suptitle(_title(next(iter(configs.values()))))
    figure.savefig(path)


def _curves(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """Values by name, at up to 2,000 steps of a run, and how they are drawn."""
    timeline = config.timeline()
    rate = config.plan.learning_rate()
    steps = np.unique(np.linspace(1, timeline.steps, 2000).astype(np.int64))
    rows = timeline.rows(steps)
    curves: dict[str, tuple[Any, str]] = {"step": (steps, ""), "consumed tokens": (timeline.consumed_tokens(steps), "")}
    curves["seqlen (tokens)"] = (timeline.seqlen(steps), "steps-pre")
    if rate:
        curves["learning rate"] = (rate(steps), "default")
    curves["rows of a step"] = (rows, "steps-pre")
    return curves


def _title(config: RunConfig) -> str:
    timeline = config.timeline()
    first, last = timeline.rows(1), timeline.rows(timeline.steps)
    rising = f"{first:,} to " if first != last else ""
    return (
        f"{timeline.steps:,} steps, {timeline.consumed_tokens(timeline.steps):,} tokens, {rising}{last:,} rows a step"
    )
