"""A report as files in a folder, each whole at every moment, none over a file of somebody else's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from seqlen_curriculum.analysis.curves import Run
from seqlen_curriculum.analysis.drawing import save_png
from seqlen_curriculum.analysis.page import page
from seqlen_curriculum.analysis.plots import PLOTS
from seqlen_curriculum.analysis.report import MADE_BY, report
from seqlen_curriculum.errors import ConfigError

__all__ = ["check_folder", "write_report"]

_PAGE, _NUMBERS = "report.html", "report.json"


def check_folder(folder: Path) -> None:
    """Raises ConfigError where a report in ``folder`` would go over a file that isn't part of an earlier one."""
    for name in (_PAGE, _NUMBERS, *(f"{plot.name}.png" for plot in PLOTS)):
        path = folder / name
        if path.is_dir() or (path.exists() and MADE_BY.encode() not in path.read_bytes()[:1000]):
            raise ConfigError(
                f"--out {folder}: {name} in it is no earlier report's; move it away or choose another folder"
            )


def write_report(runs: Sequence[Run], folder: Path, refresh_seconds: float | None = None) -> Path:
    """Write ``report.html``, ``report.json`` and a PNG a plot; return the page's path.

    With ``refresh_seconds``, for a page that will be written again soon, the page loads itself anew, and there are no PNGs.
    """
    found = report(runs)
    if refresh_seconds is None:
        for plot in PLOTS:
            if plot.runs(runs):
                _replace(folder / f"{plot.name}.png", lambda path, plot=plot: save_png(plot, runs, path, MADE_BY))  # type: ignore[misc]
    numbers, text = json.dumps(found, indent=2) + "\n", page(found, runs, refresh_seconds)
    _replace(folder / _NUMBERS, lambda path: path.write_text(numbers, encoding="utf-8"))
    _replace(folder / _PAGE, lambda path: path.write_text(text, encoding="utf-8"))
    return folder / _PAGE


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        raise ConfigError(f"--out {path.parent}: {path.name} can't be written ({error.strerror})") from error
    finally:
        unfinished.unlink(missing_ok=True)
