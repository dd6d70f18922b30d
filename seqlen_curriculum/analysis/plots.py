"""Which plots a report has, in its order, and which runs each of them shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.analysis.stability import SPIKE

__all__ = ["PLOTS", "SUMMARY", "Plot"]


@dataclass(frozen=True)
class Plot:
    """One plot: a key of the records, or what ``Run.series`` makes of them, of every run that has it."""

    name: str
    title: str
    of: str
    against: str = "step"
    """``step``, ``tokens`` or ``hours``."""
    label: str = ""
    group: str = ""
    note: str = ""
    log: bool = False
    stays: bool = False
    """Whether a value holds until it changes."""
    line: float | None = None
    """A level to draw across."""
    beside: str = ""
    """A second key, drawn with ``of`` for the most unstable run alone, each over its largest value (Figure 1(g), (h))."""
    changing: bool = False
    """Whether the plot is only worth its place where a run's values change."""

    @property
    def marks_rollbacks(self) -> bool:
        """Whether the steps at which runs went back are shown."""
        return self.of in ("loss", "loss_ratio") and self.against == "step" and not self.beside

    def runs(self, runs: Sequence[Run]) -> list[Run]:
        """Those of ``runs`` that have the values; for ``beside`` the most unstable of them."""
        having = [run for run in runs if all(len(run.series(name).values) for name in (self.of, self.beside) if name)]
        if self.beside and having:
            return [max(having, key=lambda run: float(run.series(self.of).values.max()))]
        changing = any(len(set(run.series(self.of).values.tolist())) > 1 for run in having) if self.changing else True
        return having if changing else []

    def top(self, runs: Sequence[Run]) -> float | None:
        """Where the axis of a validation perplexity ends; None where nothing is cut off.

        What follows a run's first descent to thrice its best is all in view: there the curves differ.
        """
        if self.of != "valid_ppl":
            return None
        columns = [run.series(self.of).values for run in self.runs(runs)]
        top = 1.05 * max(float(values[int((values <= 3 * values.min()).argmax()) :].max()) for values in columns)
        return top if top < max(float(values.max()) for values in columns) else None


def _perplexity(against: str, word: str) -> Plot:
    options: dict[str, Any] = {
        "label": "perplexity",
        "group": "cost",
        "log": True,
        "note": "At full length.",
    }
    return Plot(f"perplexity_{against}", f"Validation perplexity against {word}", "valid_ppl", against, **options)


def _loss(against: str, word: str) -> Plot:
    note = "At each step's own length: no guide to quality while lengths grow."
    return Plot(f"loss_{against}", f"Training loss against {word}", "loss", against, "nats a token", "stability", note)


def _adam(of: str, title: str, label: str) -> Plot:
    return Plot(of, title, of, label=label, group="stability", log=True)


def _beside(of: str, title: str, note: str) -> Plot:
    title, label = f"Loss ratio beside {title}", "of its largest"
    return Plot(f"ratio_{of}", title, "loss_ratio", label=label, group="stability", beside=of, note=note)


PLOTS = (
    _perplexity("step", "steps"),
    _perplexity("tokens", "tokens"),
    _perplexity("hours", "time"),
    _loss("step", "steps"),
    _loss("tokens", "tokens"),
    Plot(
        "loss_ratio",
        "Loss ratio",
        "loss_ratio",
        label="loss over the least before",
        group="stability",
        note=f"A step above the dashed line, {SPIKE}, is a spike.",
        line=SPIKE,
    ),
    _adam("variance_norm", "Adam's variance: norm", "l1 norm"),
    _adam("variance_max", "Adam's variance: largest element", "largest element"),
    _adam("momentum_norm", "Adam's momentum: norm", "l1 norm"),
    _adam("momentum_max", "Adam's momentum: largest element", "largest element"),
    _beside("variance_norm", "the variance's norm", "The run of the largest loss ratio."),
    _beside("variance_max", "the variance's largest element", "The run of the largest loss ratio."),
    Plot("seqlen", "Sequence length", "seqlen", label="tokens", group="schedule", stays=True),
    Plot("rows", "Rows of a step", "rows", label="rows", group="schedule", stays=True, changing=True),
    Plot("lr", "Learning rate", "lr", label="learning rate", group="schedule"),
    Plot(
        "tokens_per_second",
        "Speed",
        "tokens_per_second",
        label="tokens/s",
        group="schedule",
        note="Of training alone; a point is the mean of equally many steps.",
    ),
)
SUMMARY = (
    Plot("losses_tokens", "Loss against tokens", "loss", "tokens", "nats a token"),
    Plot("losses_step", "Loss against steps", "loss", "step", "nats a token"),
    Plot("seqlen_tokens", "Sequence length", "seqlen", "tokens", "tokens", stays=True),
    Plot("lr_tokens", "Learning rate", "lr", "tokens", "learning rate"),
)
"""The four of the picture of a run."""
