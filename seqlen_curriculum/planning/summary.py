"""The milestones of a run as numbers, text and a plot. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.muon import MuonGroups, planned_groups, trains_by_muon
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.bucket_use import bucket_use, describe_bucket_use
from seqlen_curriculum.schedule.timeline import Timeline
from seqlen_curriculum.schedule.token_lr import TokenRate

__all__ = ["compare", "compute_use", "data_use", "describe", "draw", "milestones", "plan"]

_LEFT_OVER = {"dropped_tokens": "dropped", "leftover_tokens": "read later"}
"""The leftover tokens: key in a plan, and description."""

_STEP, _TOKENS, _SEQLEN, _RATE, _ROWS = (
    "step",
    "consumed tokens",
    "sequence length (tokens)",
    "learning rate",
    "rows per step",
)
_DRAWSTYLES = {_SEQLEN: "steps-pre", _RATE: "default", _ROWS: "steps-pre"}
"""Axes from top to bottom. Lengths and rows are drawn as steps."""


def plan(config: RunConfig, at: Iterable[int] = ()) -> dict[str, Any]:
    """Return the run as one JSON-able object; ``at`` adds steps to ``milestones``. Raises ConfigError.

    Tokens are target tokens of all ranks.

    - ``steps, consumed_tokens, full_length_step, full_batch_step, lengths`` (number of lengths), ``shapes`` (number of pairs
      of rows and tokens per row), ``milestones [{step, seqlen, rows, consumed_tokens, lr}]``.
    - With a data section: ``sample_tokens``, and ``dropped_tokens`` or ``leftover_tokens``. If its rows are pieces of
      documents, ``pieces`` instead, as ``bucket_use`` returns them.
    - In half precision: ``gradient_dtype``, in which gradients accumulate and reduce.
    - With a model section: ``parameters, flops, flops_of_full_length`` (the same tokens at full length), or ``uncounted``,
      the reason why they aren't known.
    - With Muon: ``muon {muon, adam, left_out}``, the numbers of parameters by optimizer and the matrices left to Adam.
    - With ``training.seqlen_bucket``: ``without_seqlen_bucket {steps, lengths, flops}``.
    """
    timeline = config.timeline()
    rate = config.plan.learning_rate()
    full_length = config.data.seq_length if config.data else max(timeline.lengths())
    full_length_step = timeline.first_step_at(full_length)
    full_batch_step = timeline.first_step_of_samples(timeline.global_batch)
    reached = [step for step in (full_length_step, full_batch_step) if step is not None]
    summary: dict[str, Any] = {
        "steps": timeline.steps,
        "consumed_tokens": timeline.consumed_tokens(timeline.steps),
        "full_length_step": full_length_step,
        "full_batch_step": full_batch_step,
        "lengths": len(timeline.lengths()),
        "shapes": len(timeline.shapes()),
        "milestones": milestones(timeline, rate, [*at, *reached]),
    }
    if config.keys.is_half:
        summary["gradient_dtype"] = config.keys.gradient_dtype
    if config.buckets:
        summary["pieces"] = bucket_use(config.buckets, timeline)
    elif config.data:
        summary |= data_use(timeline, config.data.seq_length, config.data.leftovers == "recycle")
    if config.model:
        summary |= compute_use(timeline, config.model, full_length)
        optimizer = config.keys.optimizer
        if optimizer and trains_by_muon(optimizer.type) and (groups := planned_groups(config.model)):
            summary["muon"] = groups._asdict()
    if config.training and config.training.seqlen_bucket:
        without = plan(replace(config, training=config.training.model_copy(update={"seqlen_bucket": None})))
        compared = [name for name in ("steps", "lengths", "flops") if name in without]
        summary["without_seqlen_bucket"] = {name: without[name] for name in compared}
    return summary


def milestones(timeline: Timeline, rate: TokenRate | None, at: Iterable[int] = ()) -> list[dict[str, Any]]:
    """Return ``{step, seqlen, rows, consumed_tokens, lr}`` of the key steps of a run and of the steps ``at``.

    Key steps are the first, the last, the end of the learning rate warmup, the last step before the decay, and every 10 % of
    the budget. Raises ConfigError for a step outside the run.
    """
    asked = set(at)
    outside = sorted(step for step in asked if not 1 <= step <= timeline.steps)
    if outside:
        raise ConfigError(f"--at: {outside[0]} is not a step of this run; give steps from 1 to {timeline.steps}")
    # Without 0 and steps after the run: 10 % of a small budget may be 0 tokens, and a long warmup ends after the run.
    tenths = {timeline.steps_to(timeline.train_tokens * tenth // 10) for tenth in range(1, 10)}
    phases = {timeline.steps_to(rate.warmup_tokens)} if rate else set()
    if rate and rate.decay.start > rate.warmup_tokens:
        phases.add(timeline.steps_to(rate.decay.start + 1) - 1)  # the last step at the constant rate
    steps = {step for step in {1, timeline.steps} | tenths | phases if 1 <= step <= timeline.steps} | asked
    return [_milestone(timeline, rate, step) for step in sorted(steps)]


def _milestone(timeline: Timeline, rate: TokenRate | None, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "seqlen": timeline.seqlen(step),
        "rows": timeline.rows(step),
        "consumed_tokens": timeline.consumed_tokens(step),
        "lr": rate(step) if rate else None,
    }


def data_use(timeline: Timeline, seq_length: int, recycle: bool) -> dict[str, int]:
    """Return the tokens of the samples that a run reads, ``seq_length`` each, and those that it doesn't train on."""
    # 4 samples of 1024 tokens, truncated to 256: 4096 tokens, 1024 of them trained on and 3072 left over.
    read = timeline.consumed_samples(timeline.steps) * seq_length
    left_over = read - timeline.consumed_tokens(timeline.steps)
    return {"sample_tokens": read, "leftover_tokens" if recycle else "dropped_tokens": left_over}


def compute_use(timeline: Timeline, model: ModelConfig, full_length: int) -> dict[str, Any]:
    """Return the parameters of a model, the training FLOPs of a run, and those of the same tokens at full length."""
    if model.uncounted:
        return {"uncounted": model.uncounted}
    # A token at a short length needs fewer attention FLOPs, so the sum is over lengths.
    lengths, tokens = timeline.tokens_by_length()
    flops = float(np.sum(tokens * model.flops_per_token(lengths)))
    full = float(np.sum(tokens)) * model.flops_per_token(full_length)
    return {"parameters": model.parameter_count(), "flops": flops, "flops_of_full_length": full}


def describe(summary: dict[str, Any]) -> str:
    """Format a plan for a terminal: facts, then a table of milestones."""
    rows = [f"{'step':>10} {'seqlen':>7} {'rows':>6} {'consumed tokens':>18} {'lr':>12}"]
    for m in summary["milestones"]:
        lr = "DeepSpeed's" if m["lr"] is None else f"{m['lr']:.4e}"
        rows.append(f"{m['step']:>10,} {m['seqlen']:>7,} {m['rows']:>6,} {m['consumed_tokens']:>18,} {lr:>12}")
    pieces = ["", describe_bucket_use(summary["pieces"])] if "pieces" in summary else []
    return "\n".join([*_facts(summary), "", *rows, *pieces])


def _facts(summary: dict[str, Any]) -> list[str]:
    full = summary["full_length_step"]
    lines = [
        f"steps             {summary['steps']:,}",
        f"consumed tokens   {summary['consumed_tokens']:,}",
        f"full length       {'never reached' if full is None else f'from step {full:,}'}",
        f"lengths used      {summary['lengths']}",
    ]
    if len({milestone["rows"] for milestone in summary["milestones"]}) > 1:
        lines.append(_rows_line(summary))
    for key, what in _LEFT_OVER.items():
        if key in summary:
            tokens, left_over = summary["sample_tokens"], summary[key]
            lines.append(f"tokens of samples {tokens:,}, {what} {left_over:,} ({left_over / tokens:.1%})")
    if "flops" in summary:
        ratio = summary["flops"] / summary["flops_of_full_length"]
        lines.append(
            f"compute           {summary['flops']:.3g} FLOPs, {ratio:.3f} of the same tokens at full length "
            f"({summary['parameters']:,} parameters)"
        )
    if "uncounted" in summary:
        lines.append(f"compute           unknown: {summary['uncounted']}")
    if "muon" in summary:
        lines.append(f"optimizer         {MuonGroups(**summary['muon']).describe()}")
    if "gradient_dtype" in summary:
        lines.append(f"gradients         accumulated and reduced in {summary['gradient_dtype']}")
    if "without_seqlen_bucket" in summary:
        without = summary["without_seqlen_bucket"]
        flops = f", {without['flops']:.3g} FLOPs" if "flops" in without else ""
        lines.append(f"without bucket    {without['steps']:,} steps, {without['lengths']} lengths used{flops}")
    return lines


def _rows_line(summary: dict[str, Any]) -> str:
    first, last = summary["milestones"][0]["rows"], summary["milestones"][-1]["rows"]
    full = summary["full_batch_step"]
    if full is None:
        reached = " (the full batch is never reached)"
    elif full == 1:  # rows change only because samples are segmented
        reached = ""
    else:
        reached = f" (from step {full:,})"
    return f"rows of a step    {first:,} to {last:,}{reached}, {summary['shapes']} shapes (rows, tokens per row)"


def compare(plans: Mapping[str, dict[str, Any]]) -> str:
    """Format plans by name for a terminal, one line each; with ``on_ranks`` also the estimated hours."""
    width = max(map(len, plans))
    head = (
        f"{'':{width}} {'steps':>9} {'tokens':>17} {'full length at':>14} {'lengths':>7} {'left over':>9} {'FLOPs':>9}"
    )
    hours = {name: summary.get("on_ranks", {}).get("hours") for name, summary in plans.items()}
    lines = [head + (f" {'hours':>9}" if any(hours.values()) else "")]
    for name, summary in plans.items():
        full = summary["full_length_step"]
        full_at = "never" if full is None else f"{full:,}"
        counts = f"{summary['steps']:>9,} {summary['consumed_tokens']:>17,} {full_at:>14} {summary['lengths']:>7}"
        shares = [f"{summary[key] / summary['sample_tokens']:.1%}" for key in _LEFT_OVER if key in summary]
        flops = f"{summary['flops']:.3g}" if "flops" in summary else ""
        estimate = f" {hours[name]:>9,.2f}" if hours[name] else ""
        lines.append(f"{name:{width}} {counts} {''.join(shares):>9} {flops:>9}{estimate}")
    return "\n".join(lines)


def draw(configs: Mapping[str, RunConfig], path: Path) -> None:
    """Plot sequence length, learning rate and changing rows of runs against steps and consumed tokens.

    All runs share the axes. The suffix of ``path`` selects the file format.
    """
    from matplotlib.figure import Figure  # slow to import and only needed here

    runs = {name: _curves(config) for name, config in configs.items()}
    labels = [label for label in _DRAWSTYLES if any(label in run for run in runs.values())]
    if all(run[_ROWS].min() == run[_ROWS].max() for run in runs.values()):
        labels.remove(_ROWS)
    figure = Figure(figsize=(10, 3 * len(labels)), layout="constrained")
    axes = figure.subplots(len(labels), 2, sharex="col", squeeze=False)  # (labels, x axes)
    for row, label in zip(axes, labels, strict=True):
        for axis, xlabel in zip(row, (_STEP, _TOKENS), strict=True):
            for name, run in runs.items():
                if label in run:
                    axis.plot(run[xlabel], run[label], drawstyle=_DRAWSTYLES[label], label=name, lw=1.2, alpha=0.8)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.set(ylabel=label, xlabel=xlabel)
    if len(runs) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    else:
        (run,) = runs.values()
        first, last = run[_ROWS][0], run[_ROWS][-1]
        rows = f"{last:,}" if first == last else f"{first:,} to {last:,}"
        figure.suptitle(f"{run[_STEP][-1]:,} steps, {run[_TOKENS][-1]:,} tokens, {rows} rows per step")
    figure.savefig(path)


def _curves(config: RunConfig) -> dict[str, NDArray[Any]]:
    """Return the values to plot by axis label, each (n,), at up to 2,000 steps of a run."""
    timeline = config.timeline()
    rate = config.plan.learning_rate()
    # Always includes the first and the last step. A run of fewer than 2,000 steps has each step once.
    steps = np.unique(np.linspace(1, timeline.steps, 2000).astype(np.int64))
    curves: dict[str, NDArray[Any]] = {
        _STEP: steps,
        _TOKENS: timeline.consumed_tokens(steps),
        _SEQLEN: timeline.seqlen(steps),
        _ROWS: timeline.rows(steps),
    }
    if rate:
        curves[_RATE] = rate(steps)
    return curves
