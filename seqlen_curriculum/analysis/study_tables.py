"""The tables of a study, in the terminal and on the page of its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seqlen_curriculum.analysis import formats
from seqlen_curriculum.analysis.cells import Cell, Table
from seqlen_curriculum.analysis.stability import SPIKE
from seqlen_curriculum.analysis.tables import Format, ReportTables, Row

__all__ = ["fewer", "study_tables"]


def study_tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the study in ``report``; none if it is not the report of a study."""
    if "study" not in report:
        return []
    tables = StudyTables(report)
    return [tables.cost(), tables.steadiness(), *([tables.tuning()] if tables.study["tuning"] else [])]


def fewer(value: float) -> str:
    """Format a reduction factor as ``2.8x``; 0 is ``never``."""
    return formats.ratio(value) if value else "never"


class StudyTables(ReportTables):
    """Tables of the key ``study`` of a report: the paper's Tables 1 to 3 over seeds."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        super().__init__(report)
        self.study: Mapping[str, Any] = report["study"]

    def cost(self) -> Table:
        """Return the final losses, and the cost to reach the reference's mean final loss (Table 2)."""
        rows: list[Row] = []
        for n, case in enumerate(self.study["cases"]):
            place = f"study/cases/{n}"
            row: Row = [case["name"], self.cell(formats.significant, f"{place}/rate")]
            row += [
                self.cell(formats.plain, f"{place}/mean_final_valid_loss"),
                self.interval(formats.plain, f"{place}/range"),
            ]
            row.append(self.cell(formats.count, f"{place}/reached", f"{place}/seeds", separator=" of "))
            for cost in ("tokens", "time"):
                if case["name"] == self.study["reference"]:  # half of its runs never reach their own mean
                    row += ["1.0x", ""]
                    continue
                row.append(self.cell(fewer, f"{place}/{cost}/ratio"))
                row.append(self.interval(fewer, f"{place}/{cost}/interval"))
            rows.append(row)
        head = ["Case", "Learning rate", "Final loss", "Range", "Reached it", "Fewer tokens", "95% interval"]
        target = f"{self.study['reference']}'s mean final validation loss of {formats.plain(self.study['target'])}"
        caption = f"Cost to reach {target}, relative to a whole run of it"
        return Table(caption, [*head, f"Less {self.study['clock']} time", "95% interval"], rows)

    def interval(self, text: Any, place: str) -> Cell:
        """Return the two ends at ``place``, or a dash if there is no interval."""
        ends = [self.number(f"{place}/{end}", text) for end in (0, 1)]
        return Cell(ends, " to ") if ends[0].value is not None else Cell(ends[:1])

    def steadiness(self) -> Table:
        """Return spikes by seed, and Adam's variance with its correlations (Tables 1 and 3)."""
        columns: dict[str, tuple[str, Format]] = {
            "Largest loss ratio": ("max_loss_ratio", formats.plain),
            "Diverged": ("diverged", formats.count),
            "Largest variance: norm": ("largest_variance_norm", formats.significant),
            "max": ("largest_variance_max", formats.significant),
            "r of norm": ("correlations/variance_norm", "{:.2f}".format),
            "r of max": ("correlations/variance_max", "{:.2f}".format),
        }
        rows: list[Row] = []
        for n, case in enumerate(self.study["cases"]):
            place = f"study/cases/{n}"
            spikes = self.cell(formats.count, *(f"{place}/spikes/{k}" for k in range(len(case["spikes"]))))
            rows.append([case["name"], spikes, *self.row("", place, dict(columns.values()))[1:]])
        caption = "Stability by seed, and mean Pearson's r of Adam's variance with the loss ratio"
        return Table(caption, ["Case", f"Spikes over {SPIKE}", *columns], rows)

    def tuning(self) -> Table:
        """Return the mean final loss of each case at each rate on the tuning seeds."""
        rows: list[Row] = []
        for n, case in enumerate(self.study["tuning"]["cases"]):
            row: Row = [case["name"]]
            for k in range(len(case["rates"])):
                place = f"study/tuning/cases/{n}/rates/{k}"
                loss, ratio = (
                    self.number(f"{place}/{key}", formats.plain) for key in ("mean_final_valid_loss", "max_loss_ratio")
                )
                row.append(Cell([loss], ratio=ratio if ratio.value else None))
            rows.append(row)
        head = ["Case", *(formats.significant(rate) for rate in self.study["tuning"]["tried"])]
        caption = "Tuning: mean final validation loss at each learning rate (in brackets: largest loss ratio)"
        return Table(caption, head, rows)
