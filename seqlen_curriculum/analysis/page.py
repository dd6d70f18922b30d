"""The report as one HTML page. It needs no network, and shows static plots if its script does not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from seqlen_curriculum.analysis import formats
from seqlen_curriculum.analysis.curves import style_of
from seqlen_curriculum.analysis.drawing import svg
from seqlen_curriculum.analysis.plot_data import packed, plot_data
from seqlen_curriculum.analysis.plots import PLOTS, Plot
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.analysis.seed_groups import seed_groups
from seqlen_curriculum.analysis.study_tables import study_tables
from seqlen_curriculum.analysis.tables import ReportTables

__all__ = ["figures", "legend", "notes", "page"]


class Figure(NamedTuple):
    """One plot on the page."""

    title: str
    notes: str
    svg: str


class FigureGroup(NamedTuple):
    """The figures of one section, and the titles of the plots that no run has values for."""

    figures: list[Figure]
    not_logged: list[str]


class LegendEntry(NamedTuple):
    """A run, or runs that differ only in their seed."""

    label: str
    colour: str
    dashes: str


def page(report: Mapping[str, Any], runs: Sequence[Run], refresh_seconds: float | None = None) -> str:
    """Return the HTML page of ``report(runs)``; with ``refresh_seconds`` it reloads itself at this interval."""
    # Names of runs are names of folders, which may contain < or &. Everything except the plots is escaped.
    environment = Environment(
        loader=PackageLoader("seqlen_curriculum.analysis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        report=report,
        notes=notes(report, refresh_seconds),
        legend=legend(runs),
        tables=ReportTables(report),
        study=study_tables(report),
        groups={group: figures(runs, group) for group in ("cost", "stability", "schedule")},
        curves=packed(plot_data(runs)),
        refresh_seconds=refresh_seconds,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def notes(report: Mapping[str, Any], refresh_seconds: float | None) -> list[str]:
    """Return notes about the progress of the runs and about what is missing from their folders."""
    lines = []
    if refresh_seconds is not None:
        lines.append(f"This page reloads every {refresh_seconds:g} seconds.")
    for run in report["runs"]:
        if run["train_tokens"] and not run["finished"]:
            share = f"{run['end']['consumed_tokens'] / run['train_tokens']:.0%}"
            budget = f"{formats.compact(run['train_tokens'])} tokens"
            # 78.6 of 157 billion tokens: "slw60k is at step 166,000 and has consumed 50% of 157B tokens."
            lines.append(f"{run['name']} is at step {run['end']['step']:,} and has consumed {share} of {budget}.")
    without_info = [run["name"] for run in report["runs"] if not run["launches"]]
    if without_info:
        lines.append(f"No run.json in {', '.join(without_info)}: configuration, versions and hardware are unknown.")
    for run in report["runs"]:
        if run["first_step"] > 1:
            lines.append(
                f"The log of {run['name']} starts at step {run['first_step']}. Its time is counted from there."
            )
        if run["final"] is None:
            lines.append(f"{run['name']} has no evaluation yet.")
        if run["skipped_steps"]:
            lines.append(f"Steps skipped by rollbacks of {run['name']}: {run['skipped_steps']:,}.")
    return lines


def legend(runs: Sequence[Run]) -> list[LegendEntry]:
    """Return one entry per run. Runs that differ only in their seed share one."""
    entries = []
    for number, group in enumerate(seed_groups(runs)):
        seeds = len(group.members)
        label = group.name if seeds == 1 else f"{group.name} ({seeds} seeds)"
        entries.append(LegendEntry(label, *style_of(number)))
    return entries


def figures(runs: Sequence[Run], group: str) -> FigureGroup:
    """Return the plots of ``group``, and the titles of those that no run has values for."""
    drawn, not_logged = [], []
    for plot in PLOTS:
        if plot.group != group:
            continue
        if plot.runs(runs):
            drawn.append(Figure(plot.title, _figure_notes(plot, runs), svg(plot, runs)))
        elif not plot.only_if_changing and not plot.second_key:
            not_logged.append(plot.title)
    return FigureGroup(drawn, not_logged)


def _figure_notes(plot: Plot, runs: Sequence[Run]) -> str:
    """Return the text below a plot's title."""
    shown = plot.runs(runs)
    parts = [plot.note] if plot.note else []
    if plot.marks_rollbacks and any(run.rollbacks for run in shown):
        parts.append("Dotted lines are rollbacks.")
    # A plot of two keys shows only one run by design.
    missing = [run.name for run in runs if run not in shown and not plot.second_key]
    if missing:
        parts.append(f"Not logged by {', '.join(missing)}.")
    return " ".join(parts)
