"""The curves of runs on matplotlib's axes."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from seqlen_curriculum.analysis.formats import tick
from seqlen_curriculum.analysis.plots import Plot
from seqlen_curriculum.analysis.run import Run, Series
from seqlen_curriculum.analysis.seed_groups import seed_groups

__all__ = ["COLOURS", "Curves", "add_legend", "scale_axes", "style_of"]

COLOURS = ("#2f7fd1", "#d9631e", "#14966c", "#c05fa0", "#8a7a14", "#7a6bd8")
"""The colours of seed groups, in order: distinct for colour-blind readers, with at least 3:1 contrast on light and dark."""
_DASHES = ("solid", "dashed", "dotted")
_TIME_UNITS = {"hours": 1.0, "minutes": 1 / 60, "seconds": 1 / 3600}


def style_of(number: int) -> tuple[str, str]:
    """Return (colour, dashes) of seed group ``number``, counted from 0; the first 18 differ."""
    return COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]


class Curves:
    """Draws plots of the same runs. Runs that differ only in their seed share a colour and a legend entry."""

    def __init__(self, runs: Sequence[Run], most_points: int = 2000) -> None:
        """Prepare plots of ``runs`` with at most ``most_points`` per curve."""
        self.runs = runs
        self.most_points = most_points
        self.groups = seed_groups(runs)
        longest = max(float(run.series("loss").hours[-1]) for run in runs)
        # The first unit in which the longest run takes at least 1.5: 2 h, 84 min, 72 s.
        fitting = [unit for unit, hours in _TIME_UNITS.items() if longest >= 1.5 * hours]
        self.time_unit = fitting[0] if fitting else "seconds"

    def draw(self, axis: Any, plot: Plot) -> None:
        """Draw the curves of ``plot`` with labels and scales."""
        shown = plot.runs(self.runs)
        for number, group in enumerate(self.groups):
            label = f" {group.name}"
            for run in (self.runs[member] for member in group.members):
                if run in shown:
                    self.draw_curves(axis, plot, run, style_of(number), label)
                    label = "_"  # hidden by matplotlib: the legend has one entry for all seeds
        if plot.threshold is not None:
            axis.axhline(plot.threshold, color=axis.xaxis.label.get_color(), lw=0.9, ls="--")
        axis.set(xlabel=self.x_label(plot), ylabel=plot.label)
        scale_axes(axis, plot)

    def x_label(self, plot: Plot) -> str:
        """Return the label of the x axis, with the unit of time."""
        return f"training and evaluation time ({self.time_unit})" if plot.x == "hours" else plot.x

    def draw_curves(self, axis: Any, plot: Plot, run: Run, style: tuple[str, str], label: str) -> None:
        """Draw the values of one run, those of ``plot.second_key``, and its rollbacks."""
        colour, dashes = style
        for key in plot.keys:
            x, y = self.points(plot.series(run, key, self.most_points), plot)
            if key == plot.key:
                options = {"color": colour, "ls": dashes, "alpha": 0.88}
            else:
                options = {"color": axis.xaxis.label.get_color(), "alpha": 0.7}
            # A loss ratio near 1 and a variance of 1e-5 fit one axis as fractions of their maxima.
            if plot.second_key:
                y, label = y / y.max(), f" {key.replace('_', ' ')}"
            if len(x) == 1:
                options["marker"] = "o"  # a line of one point is invisible
            steps = "steps-pre" if plot.steps else "default"
            axis.plot(x, y, label=label, lw=1.2, drawstyle=steps, markersize=4, **options)
        if plot.marks_rollbacks:
            for rollback in run.rollbacks or ():
                axis.axvline(rollback["step"], color=colour, lw=0.9, ls=":")

    def add_validation_losses(self, axis: Any, plot: Plot) -> None:
        """Draw validation losses as thick lines over the training losses, and make those thin."""
        from matplotlib.patheffects import withStroke

        for line in axis.lines:
            line.set(linewidth=0.7, alpha=0.6)
        halo = withStroke(linewidth=4.5, foreground="white")
        for number, group in enumerate(self.groups):
            colour, dashes = style_of(number)
            for member in group.members:
                x, y = self.points(self.runs[member].series("valid_loss"), plot)
                axis.plot(x, y, color=colour, ls=dashes, lw=2.4, path_effects=[halo])

    def points(self, series: Series, plot: Plot) -> tuple[Any, Any]:
        """Return the x and y coordinates of the series, (n,) each."""
        if plot.x == "hours":
            return series.hours / _TIME_UNITS[self.time_unit], series.values
        return getattr(series, plot.x), series.values


def add_legend(figure: Any, title: str | None = None) -> None:
    """Add a legend above the axes, so that it covers no curve, in as many columns as the longest name allows."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    # An inch fits ten letters, and the line before a label is as wide as six. A figure of 7 inches fits 70 letters: three
    # columns of names up to 16 letters, or two of names up to 28. A name over 64 is wrapped.
    room = int(10 * figure.get_figwidth())
    columns = max(1, min(3, room // (max(map(len, labels)) + 6)))
    # A blank before each label: matplotlib hides labels that start with an underscore, and a run's name may.
    labels = [" " + "\n ".join(wrap(label, room - 6)) for label in labels]
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, title=title)
    for line in legend.get_lines():
        line.set(linewidth=2.4, alpha=1)


def scale_axes(axis: Any, plot: Plot) -> None:
    """Set a few ticks at round numbers, without a common power of ten beside the axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    round_steps = {"steps": (1, 2, 2.5, 5, 10), "min_n_ticks": 3}
    if plot.log:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        # On an axis that spans less than a factor of 8, powers of ten give at most one tick. Above 1000 they suffice.
        if high / low < 8:
            axis.yaxis.set_major_locator(MaxNLocator(5, **round_steps))
        else:
            axis.yaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 1e3 else (1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.yaxis.set_major_locator(MaxNLocator(6, **round_steps))
    if plot.from_zero:
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(6, **round_steps))
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
