"""Plots drawn: as SVG in the reader's own colours for a page, and as pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any

from seqlen_curriculum.analysis.formats import tick
from seqlen_curriculum.analysis.plots import SUMMARY, Plot
from seqlen_curriculum.analysis.run import Run, Series
from seqlen_curriculum.analysis.seed_groups import seed_groups

__all__ = ["COLOURS", "draw_run", "save_png", "style_of", "svg"]

COLOURS = ("#2f7fd1", "#d9631e", "#14966c", "#c05fa0", "#8a7a14", "#7a6bd8")
"""Of the runs in their order, seeds of one alike: told apart by colour-blind readers, at least 3:1 against both pages."""
_DASHES = ("solid", "dashed", "dotted")
_READERS_INK = "#010203"
"""Stands for the colour of the reader's text, which only the page knows."""
_INK = "#1f2328"
_X_LABELS = {"step": "step", "tokens": "consumed tokens"}
_HOURS = ((1.0, "hours"), (1 / 60, "minutes"), (1 / 3600, "seconds"))


def style_of(number: int) -> tuple[str, str]:
    """(colour, dashes) of the run, or of runs that differ in their seed, of this number, from 0; the first 18 differ."""
    return COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]


def svg(plot: Plot, runs: Sequence[Run]) -> str:
    """The plot as an ``<svg>`` for a page: text and axes in currentColor, ids that no other plot has."""
    with _figure(_READERS_INK, (4.7, 3.0)) as figure:
        _draw(figure.subplots(), plot, runs)
        if plot.beside:
            _legend(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(out.getvalue(), plot.name, f"{plot.title}: {', '.join(run.name for run in plot.runs(runs))}")


def _for_page(text: str, name: str, title: str) -> str:
    attributes, _, inner = text.partition("<svg ")[2].partition(">")
    (box,) = re.findall(r'viewBox="[^"]*"', attributes)
    inner = re.sub(r"<(metadata|style).*?</\1>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", inner).replace(_READERS_INK, "currentColor")
    inner = re.sub(r" ?font-family: [^;\"]*;?", "", inner)  # the page's own
    # The points of the curves to a tenth: finer than any screen, and half the bytes.
    inner = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\d\.\d)\d+", r"\1", path[0]), inner)
    head = f'<svg id="plot-{name}" class="plot" role="img" aria-labelledby="title-{name}" {box}>'
    return f'{head}<title id="title-{name}">{escape(title)}</title>{inner.strip()}'


def save_png(plot: Plot, runs: Sequence[Run], path: Path, made_by: str) -> None:
    """The plot as a picture, with a legend of its runs above it; ``made_by`` is written into it."""
    with _figure(_INK, (7, 4)) as figure:
        _draw(figure.subplots(), plot, runs)
        figure.axes[0].set_title(plot.title)
        _legend(figure)
        figure.savefig(path, format="png", dpi=150, metadata={"Software": made_by})


def draw_run(runs: Sequence[Run], path: Path) -> None:
    """Losses, seqlen and learning rate in one picture by suffix; validation losses, at full length, are thick lines."""
    from matplotlib.patheffects import withStroke

    with _figure(_INK, (11, 6.8)) as figure:
        for axis, plot in zip(figure.subplots(2, 2).flat, SUMMARY, strict=True):
            _draw(axis, plot, runs)
            axis.set_title(plot.title)
            if plot.of != "loss":
                continue
            for line in axis.lines:
                line.set(linewidth=0.7, alpha=0.6)
            for number, group in enumerate(seed_groups(runs)):
                halo, (colour, dashes) = withStroke(linewidth=4.5, foreground="white"), style_of(number)
                for member in group.members:
                    x, y = _points(runs[member].series("valid_loss"), plot, runs)
                    axis.plot(x, y, color=colour, ls=dashes, lw=2.4, path_effects=[halo])
        _legend(figure, "training loss, at today's length: thin; validation loss, at full length: thick")
        figure.savefig(path, dpi=120)


@contextmanager
def _figure(ink: str, size: tuple[float, float]) -> Iterator[Any]:
    import matplotlib as mpl  # slow to import, and only needed here
    from matplotlib.figure import Figure

    style: dict[str, Any] = {f"{side}tick.{part}": ink for side in "xy" for part in ("color", "labelcolor")}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), ink)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "report", "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.grid": True, "grid.alpha": 0.18, "axes.titlesize": "medium", "legend.frameon": False}
    style["text.parse_math"] = False  # a name may hold a $
    with mpl.rc_context(style):
        yield Figure(figsize=size, layout="constrained")


def _legend(figure: Any, title: str | None = None) -> None:
    """Above the axes, where it covers no curve; in as many columns as the longest name leaves room for."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    # The blank before a label: matplotlib leaves labels out that begin with an underscore, as a run's name may.
    room = int(10 * figure.get_figwidth())  # ten letters an inch, and a line is as long as six
    columns = max(1, min(3, room // (max(map(len, labels)) + 6)))
    labels = [" " + "\n ".join(wrap(label, room - 6)) for label in labels]
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns, title=title)
    for line in legend.get_lines():
        line.set(linewidth=2.4, alpha=1)


def _draw(axis: Any, plot: Plot, runs: Sequence[Run]) -> None:
    shown = plot.runs(runs)
    for number, group in enumerate(seed_groups(runs)):
        labels = iter([f" {group.name}"])  # one for all its seeds
        for run in (runs[member] for member in group.members if runs[member] in shown):
            _draw_one(axis, plot, run, runs, style_of(number), next(labels, "_"))
    if plot.line is not None:
        axis.axhline(plot.line, color=axis.xaxis.label.get_color(), lw=0.9, ls="--")
    unit = _X_LABELS.get(plot.against) or f"{_hours(runs)[1]} of training and evaluation"
    axis.set(xlabel=unit, ylabel=plot.label)
    _scale(axis, plot, plot.top(runs))


def _draw_one(axis: Any, plot: Plot, run: Run, runs: Sequence[Run], style: tuple[str, str], label: str) -> None:
    colour, dashes = style
    ink = axis.xaxis.label.get_color()
    for name in filter(None, (plot.of, plot.beside)):
        x, y = _points(run.series(name).thinned(), plot, runs)
        options = {"color": colour, "ls": dashes, "alpha": 0.88} if name == plot.of else {"color": ink, "alpha": 0.7}
        if plot.beside:
            y, label = y / y.max(), f" {name.replace('_', ' ')}"
        options |= {"marker": "o"} if len(x) == 1 else {}  # a line of one point shows nothing
        drawn = "steps-pre" if plot.stays else "default"
        axis.plot(x, y, label=label, lw=1.2, drawstyle=drawn, markersize=4, **options)
    if plot.marks_rollbacks:
        for rollback in run.rollbacks or ():
            axis.axvline(rollback["step"], color=colour, lw=0.9, ls=":")


def _points(series: Series, plot: Plot, runs: Sequence[Run]) -> tuple[Any, Any]:
    if plot.against == "hours":
        return series.hours / _hours(runs)[0], series.values
    return getattr(series, plot.against), series.values


def _hours(runs: Sequence[Run]) -> tuple[float, str]:
    """The unit of time in which the longest of the runs has a number above 1.5."""
    longest = max(float(run.series("loss").hours[-1]) for run in runs)
    return next((unit for unit in _HOURS if longest >= 1.5 * unit[0]), _HOURS[-1])


def _scale(axis: Any, plot: Plot, top: float | None) -> None:
    """Few ticks, of round numbers without powers of ten beside the axis; a schedule begins at zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    round_steps = {"steps": (1, 2, 2.5, 5, 10), "min_n_ticks": 3}
    if plot.log:
        axis.set_yscale("log")
        if top:
            axis.set_ylim(axis.dataLim.y0 / 1.08, top)
        low, high = axis.get_ylim()
        wide = LogLocator(subs=(1,) if high / low > 1e3 else (1, 2, 5))
        axis.yaxis.set_major_locator(MaxNLocator(5, **round_steps) if high / low < 8 else wide)
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.yaxis.set_major_locator(MaxNLocator(6, **round_steps))
    if plot.group == "schedule" or plot.stays or plot.of == "lr" or plot.beside:
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(6, **round_steps))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
