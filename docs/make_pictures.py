"""Draw the pictures of docs/concepts.md from small configurations. Needs neither torch nor a corpus.

Run:  python docs/make_pictures.py            # writes docs/images/*.svg, the same bytes on every call
      python docs/make_pictures.py OTHER_FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from seqlen_curriculum import RunConfig
from seqlen_curriculum.schedule.shortening import Shortening

IMAGES = Path(__file__).parent / "images"
INK, BLUE, ORANGE, GREEN, GREY, LIGHT = "#1f2328", "#0a66c2", "#c2560a", "#2e7d32", "#9aa0a6", "#e8eaed"
STYLE = {
    "svg.hashsalt": "seqlen-curriculum",  # the same ids on every call
    "svg.fonttype": "none",  # text as text: small, and searchable
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
}

RAMP = {"total_curriculum_step": 100, "difficulty_step": 8}
SCHEDULES: dict[str, dict[str, Any]] = {
    "fixed_linear": RAMP,
    "fixed_root": {**RAMP, "root_degree": 2},
    "fixed_discrete": {"difficulty": [32, 256], "max_step": [80]},
    "fixed_mixed": {"difficulty": [32, 256], "steps": [18, 2]},
    "adaptive": RAMP,
    "custom": {"function": "make_pictures:doubling", "difficulty_step": 8},
}
"""``schedule_config`` by ``schedule_type``; all other keys are those of ``run_file``."""
FLUCTUATIONS = (30, 60)
"""Steps at which the adaptive schedule's validation perplexity is assumed to exceed ``perplexity_ratio``."""


def doubling(step: int) -> int:
    """Return 8 for the first 25 steps, then twice as much every 25 steps: the example of a custom schedule."""
    return 8 * 2 ** ((step - 1) // 25)


def run_file(schedule_type: str = "fixed_linear", **changes: Any) -> dict[str, Any]:
    """Return a run of 16 rows, lengths 8 to 256 and 500,000 tokens; ``changes`` are keys of ``curriculum_learning``."""
    curriculum = {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 256,
        "schedule_type": schedule_type,
        "schedule_config": SCHEDULES[schedule_type],
        **changes,
    }
    return {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
        "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 20, "min_lr": 1e-4}},
        "curriculum_learning": curriculum,
        "data": {"train": ["corpus/text"], "seq_length": 256},
        "training": {"train_tokens": 500_000, "eval_interval": 10},
    }


def load(schedule_type: str = "fixed_linear", **changes: Any) -> RunConfig:
    return RunConfig.from_dict(run_file(schedule_type, **changes))


def draw_schedule(schedule_type: str) -> Figure:
    """Draw the length of every step, by step and by consumed tokens."""
    plan = load(schedule_type).plan
    if schedule_type == "adaptive":
        plan = plan.holding(*FLUCTUATIONS)
    steps = np.arange(1, plan.steps + 1)
    figure = Figure(figsize=(7.2, 2.2), layout="constrained")
    by_step, by_tokens = figure.subplots(1, 2, sharey=True)
    by_step.step(steps, plan.timeline.seqlen(steps), where="mid", color=BLUE)
    by_tokens.step(plan.timeline.consumed_tokens(steps) / 1000, plan.timeline.seqlen(steps), where="pre", color=BLUE)
    for number, step in enumerate(FLUCTUATIONS if schedule_type == "adaptive" else ()):
        label = None if number else "perplexity above 1.3 x its best"
        by_step.axvline(step, color=ORANGE, lw=1, ls=":", label=label)
    if schedule_type == "adaptive":
        by_step.legend(loc="lower right", frameon=False, fontsize=8)
    by_step.set(
        xlabel="step", ylabel="sequence length (tokens)", ylim=(0, 270), xlim=(0, None), yticks=range(0, 257, 64)
    )
    by_tokens.set(xlabel="consumed tokens (thousands)", xlim=(0, None))
    return figure


def draw_method(method: str, seq_length: int = 16, seqlen: int = 6) -> Figure:
    """Draw a sample, the rows that are made of it, and which tokens each token attends to."""
    shortening = Shortening(method, seq_length)  # type: ignore[arg-type]
    used = shortening.used_tokens_per_sample(seqlen)
    # The block that a token belongs to, whether it is a row of its own (segment) or a window inside one row.
    blocks = [token // seqlen if method != "truncate" else 0 for token in range(used)]
    shades = [BLUE, GREEN, ORANGE]
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    tokens, attention = figure.subplots(1, 2, width_ratios=(2, 1))
    _cells(tokens, 2.2, [shades[block] for block in blocks] + [LIGHT] * (seq_length - used), range(seq_length))
    tokens.text(-0.3, 2.7, "sample", ha="right", va="center")
    tokens.text(-0.3, 0.5, "trained on", ha="right", va="center")
    row_tokens = shortening.tokens_per_row(seqlen)
    for row in range(shortening.rows_per_sample(seqlen)):
        inside = range(row * row_tokens, (row + 1) * row_tokens)
        _cells(tokens, -1.2 * row, [shades[blocks[token]] for token in inside], inside)
    if used < seq_length:
        tokens.text((used + seq_length) / 2, 3.5, "left over", ha="center", va="bottom", color=INK)
    tokens.set(xlim=(-3.6, seq_length + 0.2), ylim=(-1.6, 4.3), aspect="equal")
    tokens.axis("off")
    image = np.ones((used, used, 3))
    for query in range(used):
        for key in range(query + 1):
            if blocks[query] == blocks[key]:
                image[query, key] = matplotlib.colors.to_rgb(shades[blocks[query]])
    attention.imshow(image)  # a small PNG inside the SVG; one element per square would take 80 KB
    attention.set(xlabel="attends to token", ylabel="token", xticks=[], yticks=[])
    return figure


def _cells(axis: Any, bottom: float, colours: list[str], tokens: range) -> None:
    """Draw one square for each of the ``tokens`` of a sample, with its number in it."""
    for column, (colour, token) in enumerate(zip(colours, tokens, strict=True)):
        axis.add_patch(matplotlib.patches.Rectangle((column, bottom), 1, 1, fc=colour, ec="white", lw=1))
        ink = INK if colour == LIGHT else "white"
        axis.text(column + 0.5, bottom + 0.48, str(token), ha="center", va="center", fontsize=7, color=ink)


def draw_learning_rate() -> Figure:
    """Draw the rate by tokens and that of the same cosine counted in steps; and the three token-wise schedules."""
    plan = load().plan
    steps = np.arange(1, plan.steps + 1)
    # A constant length of the same number of steps: there, counting steps and counting tokens is the same.
    constant = run_file(min_difficulty=256) | {"training": {"train_tokens": plan.steps * 16 * 256, "eval_interval": 10}}
    figure = Figure(figsize=(7.2, 2.2), layout="constrained")
    against_steps, against_tokens = figure.subplots(1, 2, sharey=True)
    against_steps.plot(steps, _rates(run_file(), steps), color=BLUE, label="cosine by tokens")
    against_steps.plot(steps, _rates(constant, steps), color=ORANGE, ls="--", label="cosine by steps")
    tokens = plan.timeline.consumed_tokens(steps) / 1000
    for kind, more, colour in (
        ("TokenCosineLR", {}, BLUE),
        ("TokenLinearLR", {}, GREEN),
        ("TokenWSDLR", {"decay_tokens": 150_000}, ORANGE),
    ):
        params = {"warmup_steps": 20, "min_lr": 1e-4, **more}
        rates = _rates(run_file() | {"scheduler": {"type": kind, "params": params}}, steps)
        against_tokens.plot(tokens, rates, color=colour, label=kind)
    for axis, label, place in (
        (against_steps, "step", "lower center"),
        (against_tokens, "consumed tokens (thousands)", "lower left"),
    ):
        axis.set(xlabel=label, xlim=(0, None), ylim=(0, None))
        axis.legend(frameon=False, fontsize=8, loc=place)
    against_steps.set_ylabel("learning rate")
    return figure


def _rates(file: dict[str, Any], steps: Any) -> Any:
    """Return the learning rates of ``steps`` of the run of ``file``."""
    rate = RunConfig.from_dict(file).plan.learning_rate()
    assert rate is not None
    return rate(steps)


def draw_batch() -> Figure:
    """Draw the rows of a micro-batch by length, and the rows of a step with and without batch growth."""
    plan = load().plan
    grown = load(batch_growth=True, min_tokens_per_step=2048).plan
    lengths = np.asarray(plan.timeline.lengths())
    micro = [plan.micro_batch_rows(16, int(length)) for length in lengths]
    figure = Figure(figsize=(7.2, 2.2), layout="constrained")
    balanced, growth = figure.subplots(1, 2)
    balanced.plot(lengths, micro, ".-", color=BLUE, ms=4, lw=1, label='"balanced"')
    balanced.plot(lengths, np.full_like(lengths, 2), "--", color=GREY, lw=1, label='"fixed"')
    balanced.set(xlabel="sequence length (tokens)", ylabel="rows per micro-batch", ylim=(0, 17.5), xlim=(0, None))
    balanced.legend(frameon=False, fontsize=8)
    for run, colour, style, label in (
        (grown, BLUE, "-", "with batch_growth"),
        (plan, GREY, "--", "without"),
    ):
        steps = np.arange(1, run.steps + 1)
        growth.step(steps, run.timeline.rows(steps), style, where="mid", color=colour, label=label)
    growth.set(xlabel="step", ylabel="rows per step", ylim=(0, None), xlim=(0, None))
    growth.legend(frameon=False, fontsize=8)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    **{f"schedule_{name}.svg": partial(draw_schedule, name) for name in SCHEDULES},
    **{f"method_{name}.svg": partial(draw_method, name) for name in ("truncate", "segment", "window")},
    "learning_rate.svg": draw_learning_rate,
    "batch.svg": draw_batch,
}
"""What draws each picture, by its file name."""


def main(folder: Path = IMAGES, names: Iterable[str] = PICTURES) -> None:
    """Write the pictures of these names. The metadata has no date, so the same picture is always the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name in names:
            PICTURES[name]().savefig(folder / name, facecolor="white", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
