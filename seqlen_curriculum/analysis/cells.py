"""Tables as data: a page renders them with a template, a terminal as aligned columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NO_TABLE", "Cell", "Number", "Table"]


@dataclass(frozen=True)
class Number:
    """A number of a report."""

    text: str
    """As a person reads it."""
    value: str | None
    """Exactly, as JSON; None where the report has no such number."""
    path: str
    """Its place in ``report.json``, for example ``runs/0/end/step``."""


@dataclass(frozen=True)
class Cell:
    """One or several numbers."""

    numbers: Sequence[Number]
    separator: str = ""
    """What stands between the numbers."""
    ratio: Number | None = None
    """Reduction factor over the first run; it follows in brackets, as in the paper's Table 2."""

    def __str__(self) -> str:
        text = self.separator.join(number.text for number in self.numbers)
        return text if self.ratio is None else f"{text} ({self.ratio.text})"


@dataclass(frozen=True)
class Table:
    """A table without rows is left out of a page."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    """The first cell of a row is its title."""
    words: bool = False
    """Whether the cells are words, which are aligned to the left."""

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
