"""The plots and curves that the script of a page draws, as one compressed text."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from seqlen_curriculum.analysis.curves import Curves, style_of
from seqlen_curriculum.analysis.plots import PLOTS, Plot, points_per_curve
from seqlen_curriculum.analysis.run import Column, Run, Series

__all__ = ["packed", "plot_data"]

_POINTS_OF_A_PAGE = 100_000
"""Points of all curves of a page. A curve in several plots is stored once. 24 runs take 360 KB: 6 bytes per point."""


def plot_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the object that ``templates/report.js`` unpacks and ``plot.js`` draws.

    ``runs`` is [{``name``, ``group``, ``colour``, ``dashes``, ``series``}], where ``group`` is the index of the legend's
    entry and ``series`` {key: {``y``: values to five digits, and ``step``, ``tokens`` or ``hours``: a ``_column``}}.
    ``plots`` is [{``name``, ``x``, ``x_label``, ``y_label``, ``log``, ``steps``, ``from_zero``, ``threshold``,
    ``curves``}]. A curve is {``run``: index, ``key``, ``label``, ``second``: true for a ``second_key``, ``scale``: factor
    of its values, ``marks``: steps to mark}.
    """
    curves = Curves(runs, points_per_curve(runs, _POINTS_OF_A_PAGE))
    described: list[dict[str, Any]] = [{} for _ in runs]
    for number, group in enumerate(curves.groups):
        colour, dashes = style_of(number)
        for member in group.members:
            name = runs[member].name
            described[member] = {"name": name, "group": number, "colour": colour, "dashes": dashes, "series": {}}
    plots = [_plot(plot, runs, curves, described) for plot in PLOTS if plot.runs(runs)]
    return {"runs": described, "plots": plots}


def _plot(plot: Plot, runs: Sequence[Run], curves: Curves, described: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one entry of ``plots``, and add the series of its curves to ``described``."""
    drawn = []
    for run in plot.runs(runs):
        number = next(n for n, other in enumerate(runs) if other is run)
        for key in plot.keys:
            series = plot.series(run, key, curves.most_points)
            columns = described[number]["series"].setdefault(key, {"y": _values(series)})
            columns[plot.x] = _column(curves.points(series, plot)[0], places=4 if plot.x == "hours" else 0)
            scale = 1 / float(run.series(key).values.max()) if plot.second_key else 1
            marks = [rollback["step"] for rollback in run.rollbacks or ()] if plot.marks_rollbacks else []
            label = key.replace("_", " ") if plot.second_key else run.name
            second = key == plot.second_key
            drawn.append({"run": number, "key": key, "label": label, "second": second, "scale": scale, "marks": marks})
    copied = ("name", "x", "log", "steps", "from_zero", "threshold")
    fields = {key: getattr(plot, key) for key in copied}
    return {**fields, "x_label": curves.x_label(plot), "y_label": plot.label, "curves": drawn}


def _values(series: Series) -> list[float]:
    # A page shows five digits. Sixteen would take three times the bytes.
    return [float(f"{value:.5g}") for value in series.values]


def _column(values: Column, places: int) -> dict[str, Any]:
    """Return rising numbers as differences of integers, which are short: 100, 250, 400 as 100, 150, 150."""
    whole = np.rint(values * 10**places).astype(np.int64)
    return {"places": places, "differences": np.diff(whole, prepend=0).tolist()}


def packed(data: dict[str, Any]) -> str:
    """Return the data as zlib-compressed JSON in base64, which needs no escaping in a page."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()
