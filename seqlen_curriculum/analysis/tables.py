"""The tables of a report: the paper's Tables 1 to 3, settings, versions and hardware."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from seqlen_curriculum.analysis import formats
from seqlen_curriculum.analysis.cells import NO_TABLE, Cell, Number, Table
from seqlen_curriculum.analysis.machine import COLUMNS as MACHINE
from seqlen_curriculum.analysis.stability import SPIKE
from seqlen_curriculum.schedule.schedule_config import SIGNIFICANT

__all__ = ["ReportTables"]

Format = Callable[[Any], str]
Row = list[Cell | str]

_NONE = "–"
_POINT: Mapping[str, Format] = {"step": formats.count, "consumed_tokens": formats.compact, "hours": formats.duration}


class ReportTables:
    """Tables of ``report``, the object that ``analysis.report.report`` returns."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report = report
        self.runs: list[Mapping[str, Any]] = report["runs"]
        self.names = [run["name"] for run in self.runs]

    def number(self, path: str, text: Format) -> Number:
        """Return the number at ``path``, for example ``runs/0/end/step``; a dash if there is no such number."""
        value: Any = self.report
        try:
            for key in path.split("/"):
                value = value[int(key)] if isinstance(value, list) else value[key]
        except (LookupError, TypeError):  # no such launch, no such key, or None on the way
            value = None
        if value is None:
            return Number(_NONE, None, path)
        return Number(text(value), json.dumps(value), path)

    def cell(self, text: Format, *paths: str, separator: str = ", ", ratio: str = "") -> Cell:
        """Return the numbers at ``paths``, and in brackets the one at the path ``ratio`` if there is one."""
        # There are no brackets without a ratio, or if the run never reached the point.
        fewer = self.number(ratio, formats.ratio)
        return Cell([self.number(path, text) for path in paths], separator, fewer if fewer.value else None)

    def row(self, title: str, place: str, columns: Mapping[str, Format]) -> Row:
        """Return a row of the numbers at ``place``, one per key of ``columns``."""
        return [title, *(self.cell(text, f"{place}/{key}") for key, text in columns.items())]

    def seeds(self) -> Table:
        """Return one row per configuration that was run with several seeds."""
        groups = self.report["seeds"]
        if not groups:
            return NO_TABLE
        rows: list[Row] = []
        for n, group in enumerate(groups):
            place, members = f"seeds/{n}", range(len(group["runs"]))
            rows.append(
                [
                    group["name"],
                    self.cell(formats.count, *(f"{place}/spikes/{k}" for k in members)),
                    self.cell(formats.plain, *(f"{place}/max_loss_ratio/{k}" for k in members)),
                    self.cell(formats.plain, *(f"{place}/final_valid_loss/{k}" for k in members)),
                    self.cell(formats.plain, f"{place}/mean_final_valid_loss"),
                    self.cell(formats.count, f"{place}/reached", f"{place}/compared", separator=" of "),
                    self.cell(formats.ratio, f"{place}/consumed_tokens_ratio"),
                    self.cell(formats.ratio, f"{place}/hours_ratio"),
                ]
            )
        head = ["Run", f"Spikes over {SPIKE}", "Largest loss ratio", "Final validation loss", "Mean"]
        head += ["Reached best perplexity", "Tokens", "Time"]
        best = f"the best perplexity of {groups[0]['name']} with the same seed"
        return Table(f"By seed. Tokens and time: median reduction factor to reach {best}", head, rows)

    def point(self, place: str, point: str) -> list[Cell | str]:
        """Return steps, tokens and time of a ``point`` of the run at ``place``, with their reduction factors."""
        return [
            self.cell(text, f"{place}/{point}/{key}", ratio=f"{place}/{point}_ratio/{key}")
            for key, text in _POINT.items()
        ]

    def cost_to_reference(self) -> Table:
        """Return the cost to reach the first run's best validation perplexity (Table 2); NO_TABLE for one run."""
        reference = self.report["reference"]
        if not reference or len(self.runs) == 1:
            return NO_TABLE
        rows: list[Row] = [
            [run["name"], *(self.point(f"runs/{n}", "reached") if run["reached"] else ["never"] * 3)]
            for n, run in enumerate(self.runs)
        ]
        best = f"{reference['run']}'s best validation perplexity of {formats.significant(reference['valid_ppl'])}"
        caption = f"Cost to reach {best} (in brackets: reduction factor)"
        return Table(caption, ["Run", "Steps", "Tokens", "Time"], rows)

    def comparison(self) -> Table:
        """Return the main comparison of the runs: by seed if there are several seeds, else by cost."""
        return self.seeds() if self.report["seeds"] else self.cost_to_reference()

    def ends(self) -> Table:
        """Return the last values of each run (Table 2), and its best evaluation."""
        columns: dict[str, tuple[str, Format]] = {
            "Tokens/s": ("tokens_per_second", formats.count),
            "Training loss": ("loss", formats.plain),
            "Validation loss": ("final/valid_loss", formats.plain),
            "Perplexity": ("final/valid_ppl", formats.significant),
            "Best perplexity": ("best/valid_ppl", formats.significant),
            "At step": ("best/step", formats.count),
        }
        rows: list[Row] = []
        caption = "At the end"
        for n, run in enumerate(self.runs):
            place = f"runs/{n}"
            reached = self.point(place, "end") if len(self.runs) > 1 else self.row("", f"{place}/end", _POINT)[1:]
            rows.append([run["name"], *reached, *self.row("", place, dict(columns.values()))[1:]])
        if len(self.runs) > 1:
            caption += f" (in brackets: reduction factor over {self.names[0]})"
        return Table(caption, ["Run", "Steps", "Tokens", "Time", *columns], rows)

    def stability(self) -> Table:
        """Return the spikes of the training loss (Table 1), and the same measures of the validation perplexity."""
        columns: dict[str, tuple[str, Format]] = {
            "Steps": ("steps", formats.count),
            f"Loss ratio over {SPIKE}": ("spikes", formats.count),
            "Share of steps": ("spike_share", formats.share),
            "Largest loss ratio": ("max_loss_ratio", formats.plain),
            "At step": ("max_loss_ratio_step", formats.count),
            "Evaluations": ("evaluations", formats.count),
            f"Perplexity ratio over {SIGNIFICANT}": ("fluctuations", formats.count),
            "Largest perplexity ratio": ("max_perplexity_ratio", formats.plain),
        }
        keys = dict(columns.values())
        rows = [self.row(name, f"runs/{n}/stability", keys) for n, name in enumerate(self.names)]
        caption = "Stability: ratios of training loss and validation perplexity to their lowest earlier value"
        return Table(caption, ["Run", *columns], rows)

    def correlations(self) -> Table:
        """Return the correlation of loss ratio and Adam's variance (Table 3), one row per run and measure."""
        columns: dict[str, Format] = {"r": "{:.2f}".format, "p": formats.p_value, "steps": formats.count}
        rows: list[Row] = []
        for n, run in enumerate(self.runs):
            for measure in run["stability"]["correlations"]:
                title, *cells = self.row(run["name"], f"runs/{n}/stability/correlations/{measure}", columns)
                rows.append([title, measure.replace("_", " "), *cells])
        head = ["Run", "Loss ratio and Adam's", "Pearson's r", "p-value", "Steps"]
        return Table("Correlation of the loss ratio with Adam's variance", head, rows)

    def machine(self) -> Table:
        """Return the use of the machine, one row per run whose log has it."""
        keys = {key: text for key, (_, text) in MACHINE.items()}
        known = [n for n, run in enumerate(self.runs) if any(run["machine"][key] is not None for key in keys)]
        rows = [self.row(self.names[n], f"runs/{n}/machine", keys) for n in known]
        caption = "Machine use: mean MFU, peak memory of rank 0, and shares of the time"
        return Table(caption, ["Run", *(title for title, _ in MACHINE.values())], rows)

    def pieces(self) -> Table:
        """Return the pieces of documents that each run has read, one row per run and length."""
        columns: dict[str, Format] = {"steps": formats.count, "rows": formats.count, "tokens": formats.compact}
        columns |= {"share": formats.share}
        rows: list[Row] = []
        for n, run in enumerate(self.runs):
            for k, bucket in enumerate(run["pieces"] or ()):
                title, *cells = self.row(run["name"], f"runs/{n}/pieces/{k}", columns)
                rows.append([title, f"{bucket['length']:,}", *cells])
        head = ["Run", "Length", "Steps", "Pieces", "Tokens", "Share of tokens"]
        return Table("Pieces of documents read, by length", head, rows)

    def spike_count(self) -> str:
        """Return the number of spikes of all runs together."""
        return formats.count(sum(run["stability"]["spikes"] for run in self.runs))

    def spikes(self) -> list[Table]:
        """Return one table per run that has spikes. A table of many spikes lists only the first and the largest.

        ``report.json`` lists up to 20 per run. That would take 260 KB of a page of 24 runs, so those list 6 per run.
        """
        columns: dict[str, Format] = {"step": formats.count, "seqlen": formats.count, "lr": formats.significant}
        columns |= {"loss": formats.plain, "ratio": formats.plain}
        tables = []
        each = max(3, min(10, 80 // len(self.runs)))
        for n, run in enumerate(self.runs):
            spikes, count = run["stability"]["spikes_listed"], run["stability"]["spikes"]
            place, caption = f"runs/{n}/stability/spikes_listed", f"Spikes of {run['name']}"
            listed = list(range(len(spikes)))
            if count > 2 * each:
                others = sorted(listed[each:], key=lambda k: -spikes[k]["ratio"])[:each]
                listed = sorted([*listed[:each], *others])
                caption += f": the first {each} and the {each} largest others of {count:,}"
            # The step is the title of its row.
            rows = [self.row("", f"{place}/{k}", columns)[1:] for k in listed]
            if rows:
                tables.append(Table(caption, ["Step", "Seqlen", "Learning rate", "Loss", "Loss ratio"], rows))
        return tables

    def rollbacks(self) -> Table:
        """Return one row per rollback."""
        columns: dict[str, Format] = {"step": formats.count, "loss": formats.plain, "ratio": formats.plain}
        columns |= {"returned_to": formats.count}
        rows: list[Row] = []
        for n, run in enumerate(self.runs):
            for k in range(len(run["rollbacks"] or ())):
                place = f"runs/{n}/rollbacks/{k}"
                skipped = self.cell(formats.count, f"{place}/skipped/0", f"{place}/skipped/1", separator=" to ")
                rows.append([*self.row(run["name"], place, columns), skipped])
        head = ["Run", "Spike at step", "Loss", "Loss ratio", "Returned to step", "Skipped steps"]
        return Table("Rollbacks", head, rows)

    def differing_settings(self) -> Table:
        """Return the settings that differ, one column per run."""
        rows: list[Row] = []
        for k, entry in enumerate(self.report["config"]["differing"]):
            values = (self.cell(formats.setting, f"config/differing/{k}/values/{n}") for n in range(len(self.runs)))
            rows.append([entry["key"], *values])
        return Table("Settings that differ", ["Setting", *self.names], rows, words=True)

    def shared_settings(self) -> Table:
        """Return the settings that all runs share."""
        rows: list[Row] = [
            [entry["key"], self.cell(formats.setting, f"config/shared/{k}/value")]
            for k, entry in enumerate(self.report["config"]["shared"])
        ]
        caption = "Settings that all runs share" if len(self.runs) > 1 else "Settings"
        return Table(caption, ["Setting", "Value"], rows, words=True)

    def conditions(self) -> Table:
        """Return ranks, versions and hardware of each run's newest launch, one column per run."""
        # Runs may differ in their packages: the rows are the union, with a dash where a run lacks one.
        newest = [(run["launches"] or [{}])[-1] for run in self.runs]
        lines: dict[str, tuple[str, Format]] = {"Ranks": ("ranks", formats.count)}
        lines |= {package: (f"versions/{package}", str) for launch in newest for package in launch.get("versions", ())}
        lines |= {
            "Accelerator": ("device/accelerator", str),
            "Accelerator memory": ("device/accelerator_memory_bytes", formats.gibibytes),
            "CPU": ("device/cpu", str),
            "CPU cores": ("device/cores", formats.count),
            "Memory": ("device/memory_bytes", formats.gibibytes),
        }
        places = [f"runs/{n}/launches/{max(0, len(run['launches'] or ()) - 1)}" for n, run in enumerate(self.runs)]
        rows: list[Row] = []
        for title, (key, text) in lines.items():
            cells = [self.cell(text, f"{place}/{key}") for place in places]
            if any(cell.numbers[0].value is not None for cell in cells):
                rows.append([title, *cells])
        caption = "Versions and hardware of the newest launch (the node of rank 0)"
        return Table(caption, ["", *self.names], rows, words=True)

    def launches(self) -> Table:
        """Return every launch of every run; NO_TABLE if no run was launched twice."""
        if all(len(run["launches"] or ()) < 2 for run in self.runs):
            return NO_TABLE
        rows: list[Row] = []
        for n, run in enumerate(self.runs):
            for k, launch in enumerate(run["launches"] or ()):
                started = launch["started"].replace("+00:00", " UTC").replace("T", " ")
                place = f"runs/{n}/launches/{k}"
                counts = [self.cell(formats.count, f"{place}/{key}") for key in ("first_step", "ranks")]
                rows.append([run["name"], started, *counts])
        return Table("Launches", ["Run", "Started", "First step", "Ranks"], rows, words=True)
