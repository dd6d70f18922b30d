"""The report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from seqlen_curriculum.analysis import formats, tables
from seqlen_curriculum.analysis.drawing import style_of, svg
from seqlen_curriculum.analysis.markup import Markup, tag
from seqlen_curriculum.analysis.plots import PLOTS
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.analysis.seed_groups import seed_groups
from seqlen_curriculum.analysis.style import STYLE

__all__ = ["page"]

Report = Mapping[str, Any]


def page(report: Report, runs: Sequence[Run], refresh_seconds: float | None = None) -> str:
    """The page of ``report(runs)``; with ``refresh_seconds`` it loads itself anew so often."""
    title = f"Training report: {', '.join(run.name for run in runs)}"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=report["made_by"]),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    ]
    if refresh_seconds is not None:
        head.append(tag("meta", http_equiv="refresh", content=f"{max(1, round(refresh_seconds))}"))
    body = [_header(report, refresh_seconds), tag("main", _legend(runs), *_sections(report, runs)), _footer()]
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', *body), lang='en')}\n"


def _header(report: Report, refresh_seconds: float | None) -> Markup:
    states = [_state(one) for one in report["runs"]]
    watched = [f"This page loads itself anew every {refresh_seconds:g} seconds."] if refresh_seconds is not None else []
    notes = [tag("p", note, class_="note") for note in [*watched, *filter(None, states), *_missing(report)]]
    return tag("header", tag("h1", "Training report"), tag("p", " ".join(report["outcome"]), class_="outcome"), *notes)


def _state(one: Mapping[str, Any]) -> str:
    if one["finished"] or not one["train_tokens"]:
        return ""
    share = one["end"]["consumed_tokens"] / one["train_tokens"]
    budget = f"{share:.0%} of its budget of {formats.compact(one['train_tokens'])} tokens"
    return f"{one['name']} is at step {formats.count(one['end']['step'])}, {budget}."


def _missing(report: Report) -> list[str]:
    """What the run folders don't tell, in words."""
    runs, words = report["runs"], []
    bare = [one["name"] for one in runs if not one["launches"]]
    if bare:
        words.append(f"No run.json in {', '.join(bare)}: configuration, versions and hardware are not known.")
    for one in runs:
        if one["first_step"] > 1:
            words.append(f"The log of {one['name']} begins with step {one['first_step']}; its time counts from there.")
        if one["final"] is None:
            words.append(f"{one['name']} has no evaluation yet.")
        if one["skipped_steps"]:
            words.append(f"Steps that rollbacks of {one['name']} passed over: {one['skipped_steps']:,}.")
    return words


def _legend(runs: Sequence[Run]) -> Markup:
    items = []
    for number, group in enumerate(seed_groups(runs)):
        colour, dashes = style_of(number)
        line = tag("span", class_="line", style=f"border-top: 3px {dashes} {colour}")
        seeds = f" ({len(group.members)} seeds)" if len(group.members) > 1 else ""
        items.append(tag("li", line, group.name + seeds))
    return tag("ul", *items, class_="legend", aria_label="Runs")


def _sections(report: Report, runs: Sequence[Run]) -> list[Markup]:
    shared = tag(
        "details",
        tag("summary", "Settings that all runs share" if len(runs) > 1 else "Settings"),
        tables.settings(report),
    )
    listed = tables.spikes(report)
    found = sum(one["stability"]["spikes"] for one in report["runs"])
    folded = (
        [tag("details", tag("summary", f"Spikes listed, of {formats.count(found)} in all"), *listed)] if listed else []
    )
    what = [tables.differences(report), *([shared] if report["config"]["shared"] else [])]
    what += [tables.conditions(report), tables.launches(report)]
    return [
        _section("Quality and its cost", [tables.seeds(report), *tables.cost(report)], _figures(runs, "cost")),
        _section(
            "Stability", [*tables.instability(report), tables.rollbacks(report), *folded], _figures(runs, "stability")
        ),
        _section("Schedule and speed", [], _figures(runs, "schedule")),
        *([_section("What was run", what, [])] if any(what) else []),
    ]


def _section(title: str, parts: Iterable[Markup], figures: Sequence[Markup]) -> Markup:
    grid = [tag("div", *figures, class_="figures")] if figures else []
    return tag("section", tag("h2", title), *parts, *grid)


def _figures(runs: Sequence[Run], group: str) -> list[Markup]:
    """The group's plots; what no run has logged is told in a word instead."""
    figures, absent = [], []
    for plot in PLOTS:
        shown = plot.runs(runs) if plot.group == group else []
        if shown:
            without = [run.name for run in runs if run not in shown] if not plot.beside else []
            back = "Dotted: a rollback." if plot.marks_rollbacks and any(run.rollbacks for run in shown) else ""
            cut = "The first descent begins above." if plot.top(runs) else ""
            notes = [plot.note, cut, back, f"Not logged by {', '.join(without)}." if without else ""]
            caption = tag("figcaption", tag("strong", plot.title), tag("span", " ".join(filter(None, notes))))
            figures.append(tag("figure", caption, Markup(svg(plot, runs))))
        elif plot.group == group and not plot.changing and not plot.beside:
            absent.append(plot.title)
    if absent:
        figures.append(tag("p", f"Logged by no run, so without a plot: {'; '.join(absent)}.", class_="note"))
    return figures


def _footer() -> Markup:
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    measures = (
        "Time is that of training and evaluation, without what lies between launches. Ratios compare with the first run: "
        "1.8x is 1.8 times fewer. The measures are those of Li, Zhang and He, The Stability-Efficiency Dilemma (2022)."
    )
    return tag("footer", tag("p", measures), tag("p", f"Written {written}."))
