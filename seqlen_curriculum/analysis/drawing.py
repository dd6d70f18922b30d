"""Plots as SVG in the colours of a page, and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from seqlen_curriculum.analysis.curves import Curves, add_legend, style_of
from seqlen_curriculum.analysis.plots import SUMMARY, Plot, points_per_curve
from seqlen_curriculum.analysis.run import Run

__all__ = ["draw_by_position", "draw_run", "save_png", "svg"]

_INK = "#1f2328"
_POINTS_OF_A_PAGE = 24_000
"""Points of all static plots of a page, at 8 bytes each: 190 KB."""
_READERS_INK = "#010203"
"""A placeholder for the text colour, which only the page knows."""


def svg(plot: Plot, runs: Sequence[Run]) -> str:
    """Return the plot as an ``<svg>`` element: text and axes in currentColor, ids unique on the page."""
    with _styled_figure(_READERS_INK, (4.7, 3.0)) as figure:
        Curves(runs, points_per_curve(runs, _POINTS_OF_A_PAGE)).draw(figure.subplots(), plot)
        if plot.second_key:
            add_legend(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    title = f"{plot.title}: {', '.join(run.name for run in plot.runs(runs))}"
    return _for_page(out.getvalue(), plot.name, title)


def _for_page(text: str, name: str, title: str) -> str:
    """Convert matplotlib's SVG file ``text`` to an element that can share a page with other plots."""
    attributes, _, inner = text.partition("<svg ")[2].partition(">")
    (view_box,) = re.findall(r'viewBox="[^"]*"', attributes)
    inner = re.sub(r"<(metadata|style).*?</\1>", "", inner, flags=re.DOTALL)
    # Matplotlib uses the same ids in every file: id="p060a" and url(#p060a) both become loss_step-p060a. Unused ids, which
    # are most of them, blanks, and digits too fine to see are half of the file.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]*)', inner))
    inner = re.sub(r' id="([^"]*)"', lambda one: f' id="{name}-{one[1]}"' if one[1] in used else "", inner)
    inner = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", inner)
    inner = re.sub(r' transform="rotate\(-0 [^"]*"', "", inner)
    inner = re.sub(r'( [xy]="-?\d+\.\d)\d+', r"\1", inner)
    inner = re.sub(r">\s+<", "><", inner)
    inner = inner.replace(_READERS_INK, "currentColor")
    inner = re.sub(r" ?font-family: [^;\"]*;?", "", inner)  # the page sets its own
    inner = re.sub(r' d="([^"]*)"', lambda path: f' d="{_compact(path[1])}"', inner)
    head = f'<svg id="plot-{name}" class="plot" role="img" aria-labelledby="title-{name}" {view_box}>'
    return f'{head}<title id="title-{name}">{escape(title)}</title>{inner.strip()}'


def _compact(path: str) -> str:
    """Return an SVG path to a tenth of a point, finer than a screen shows. Lines of many points become differences."""
    path = " ".join(re.sub(r"(\d\.\d)\d+", r"\1", path).split())
    if not re.fullmatch(r"M [^A-Z]+(L [^A-Z]+){3,}", path):
        return path
    # "M 45.2 30.1 L 46.2 29.8 L ..." becomes "M45.2 30.1l1-.3...". In whole tenths, so that no error adds up.
    tenths = [round(10 * float(number)) for number in re.findall(r"-?[\d.]+", path)]
    moves = [now - before for before, now in zip(tenths, tenths[2:], strict=False)]
    text = re.sub(r"\b0\.", ".", " ".join(f"{move / 10:g}" for move in moves)).replace(" -", "-")
    return f"M{tenths[0] / 10:g} {tenths[1] / 10:g}l{text}"


def save_png(plot: Plot, runs: Sequence[Run], path: Path, made_by: str) -> None:
    """Write the plot as a PNG with a legend above it; ``made_by`` becomes its Software entry."""
    with _styled_figure(_INK, (7, 4)) as figure:
        Curves(runs).draw(figure.subplots(), plot)
        figure.axes[0].set_title(plot.title)
        add_legend(figure)
        figure.savefig(path, format="png", dpi=150, metadata={"Software": made_by})


def draw_run(runs: Sequence[Run], path: Path) -> None:
    """Plot losses, sequence length and learning rate in one picture, in the format of the suffix of ``path``."""
    curves = Curves(runs)
    with _styled_figure(_INK, (11, 6.8)) as figure:
        for axis, plot in zip(figure.subplots(2, 2).flat, SUMMARY, strict=True):
            curves.draw(axis, plot)
            axis.set_title(plot.title)
            if plot.key == "loss":
                curves.add_validation_losses(axis, plot)
        add_legend(figure, "training loss at the step's sequence length: thin; validation loss at full length: thick")
        figure.savefig(path, dpi=120)


def draw_by_position(losses: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Plot the validation loss of bins of positions, such as ``{"slw60k": {"1-8": 5.1, "9-64": 3.9}}``, one curve per model.

    The format follows the suffix of ``path``. All models have the same bins.
    """
    with _styled_figure(_INK, (7, 4)) as figure:
        axis = figure.subplots()
        for number, (name, by_position) in enumerate(losses.items()):
            colour, dashes = style_of(number)
            axis.plot(list(by_position), list(by_position.values()), label=name, color=colour, ls=dashes, marker="o")
        axis.set(xlabel="position in the row (tokens)", ylabel="validation loss (nats/token)")
        axis.set_title("Validation loss by position in the row")
        add_legend(figure)
        figure.savefig(path, dpi=150)


@contextmanager
def _styled_figure(ink: str, size: tuple[float, float]) -> Iterator[Any]:
    """Yield a figure of ``size`` inches, with matplotlib set to draw text and axes in the colour ``ink``."""
    import matplotlib as mpl  # slow to import, and only needed here
    from matplotlib.figure import Figure

    style: dict[str, Any] = {f"{side}tick.{part}": ink for side in "xy" for part in ("color", "labelcolor")}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), ink)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "report", "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.grid": True, "grid.alpha": 0.18, "axes.titlesize": "medium", "legend.frameon": False}
    style["text.parse_math"] = False  # a run's name may contain a $
    with mpl.rc_context(style):
        yield Figure(figsize=size, layout="constrained")
