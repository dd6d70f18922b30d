"""The plots of a report, in order, and the runs that each of them shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seqlen_curriculum.analysis.run import Run, Series
from seqlen_curriculum.analysis.stability import SPIKE

__all__ = ["PLOTS", "SUMMARY", "Plot", "points_per_curve"]


@dataclass(frozen=True)
class Plot:
    """One plot of the values that ``Run.series(key)`` has, one curve per run."""

    name: str
    title: str
    key: str
    x: str = "step"
    """``step``, ``tokens`` or ``hours``."""
    label: str = ""
    """Label of the y axis."""
    group: str = ""
    """The section of the page: ``cost``, ``stability`` or ``schedule``."""
    note: str = ""
    log: bool = False
    from_zero: bool = False
    """True if the y axis starts at zero."""
    steps: bool = False
    """True for a step function, whose value holds until it changes."""
    threshold: float | None = None
    """The level of a horizontal line."""
    second_key: str = ""
    """The key of a second curve. Only the most unstable run is drawn, each curve over its maximum (Figure 1(g), (h))."""
    only_if_changing: bool = False
    """True to leave the plot out if no run's values change."""

    @property
    def keys(self) -> list[str]:
        """One or two keys of ``Run.series``."""
        return [self.key, self.second_key] if self.second_key else [self.key]

    @property
    def marks_rollbacks(self) -> bool:
        """True if the steps of rollbacks are marked."""
        return self.key in ("loss", "loss_ratio") and self.x == "step" and not self.second_key

    def runs(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs that have the values; with ``second_key`` only the most unstable of them."""
        logged = [run for run in runs if all(len(run.series(key).values) for key in self.keys)]
        if self.second_key and logged:
            return [max(logged, key=lambda run: float(run.series(self.key).values.max()))]
        if self.only_if_changing and all(len(set(run.series(self.key).values.tolist())) == 1 for run in logged):
            return []
        return logged

    def series(self, run: Run, key: str, most: int) -> Series:
        """Return at most ``most`` points of a curve, with every extreme; for a step function only its changes."""
        series = run.series(key)
        return (series.changes() if self.steps else series).thinned(most)


def points_per_curve(runs: Sequence[Run], total: int) -> int:
    """Return the points of one curve, 50 to 2000, so that all curves of a page have ``total`` together."""
    curves = sum(len(plot.keys) * len(plot.runs(runs)) for plot in PLOTS)
    return max(50, min(2000, total // max(1, curves)))


def _perplexity(x: str, against: str) -> Plot:
    title, note = f"Validation perplexity against {against}", "Evaluated at full length."
    return Plot(f"perplexity_{x}", title, "valid_ppl", x, "validation perplexity", "cost", note, log=True)


def _loss(x: str, against: str) -> Plot:
    title, note = (
        f"Training loss against {against}",
        "Measured at each step's sequence length, so it does not show quality while the length grows.",
    )
    return Plot(f"loss_{x}", title, "loss", x, "training loss (nats/token)", "stability", note)


def _adam(key: str, title: str, label: str) -> Plot:
    return Plot(key, title, key, label=label, group="stability", log=True)


def _loss_ratio_and(key: str, words: str) -> Plot:
    title, note = f"Loss ratio and {words}", "Shows the run with the largest loss ratio."
    label = "fraction of maximum"
    return Plot(f"ratio_{key}", title, "loss_ratio", "step", label, "stability", note, second_key=key, from_zero=True)


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
        label="loss ratio",
        group="stability",
        note=f"A step above the dashed line, {SPIKE}, is a spike.",
        threshold=SPIKE,
    ),
    _adam("variance_norm", "Adam's variance: norm", "L1 norm of sqrt(v)"),
    _adam("variance_max", "Adam's variance: largest element", "largest element of sqrt(v)"),
    _adam("momentum_norm", "Adam's momentum: norm", "L1 norm of m"),
    _adam("momentum_max", "Adam's momentum: largest element", "largest element of m"),
    _loss_ratio_and("variance_norm", "the variance's norm"),
    _loss_ratio_and("variance_max", "the variance's largest element"),
    Plot(
        "seqlen",
        "Sequence length",
        "seqlen",
        label="sequence length",
        group="schedule",
        steps=True,
        from_zero=True,
    ),
    Plot(
        "rows",
        "Rows per step",
        "rows",
        label="rows per step",
        group="schedule",
        steps=True,
        from_zero=True,
        only_if_changing=True,
    ),
    Plot("lr", "Learning rate", "lr", label="learning rate", group="schedule", from_zero=True),
    Plot(
        "tokens_per_second",
        "Throughput",
        "tokens_per_second",
        label="throughput (tokens/s)",
        group="schedule",
        note="Without evaluations. Each point is a mean over the same number of steps.",
        from_zero=True,
    ),
)
SUMMARY = (
    Plot("losses_tokens", "Loss against tokens", "loss", "tokens", "loss (nats/token)"),
    Plot("losses_step", "Loss against steps", "loss", "step", "loss (nats/token)"),
    Plot("seqlen_tokens", "Sequence length", "seqlen", "tokens", "sequence length", steps=True, from_zero=True),
    Plot("lr_tokens", "Learning rate", "lr", "tokens", "learning rate", from_zero=True),
)
"""The four plots of ``slw report --png``."""
