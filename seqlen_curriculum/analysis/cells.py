"""Tables as data, rendered by the template of a page or as aligned columns for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NO_TABLE", "Cell", "Number", "Table"]


@dataclass(frozen=True)
class Number:
    """A number of a report."""

    text: str
    """The text to show, rounded."""
    value: str | None
    """The exact value as JSON; None if the report has no such number."""
    path: str
    """Its path in ``report.json``, for example ``runs/0/end/step``."""


@dataclass(frozen=True)
class Cell:
    """One or several numbers."""

    numbers: Sequence[Number]
    separator: str = ""
    """Text between the numbers."""
    ratio: Number | None = None
    """Reduction factor over the first run, shown in brackets as in the paper's Table 2."""

    def __str__(self) -> str:
        text = self.separator.join(number.text for number in self.numbers)
        return text if self.ratio is None else f"{text} ({self.ratio.text})"


@dataclass(frozen=True)
class Table:
    """A table of a report. A page leaves out a table without rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    """The first cell of a row is its title."""
    words: bool = False
    """True if the cells are words, which are aligned to the left."""

    def as_text(self) -> str:
        """Return the caption and the rows in aligned columns, for a terminal."""
        lines = [[str(cell) for cell in row] for row in (self.head, *self.rows)]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        columns = [
            "  ".join(
                [title.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
            )
            for title, *cells in lines
        ]
        return "\n".join([self.caption, *columns])


NO_TABLE = Table("", (), ())
