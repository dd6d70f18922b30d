"""A report as files in a folder, each whole at every moment, none over a file of somebody else's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.analysis.drawing import save_png
from seqlen_curriculum.analysis.page import page
from seqlen_curriculum.analysis.plots import PLOTS
from seqlen_curriculum.analysis.read_run import LOGS, read_run
from seqlen_curriculum.analysis.report import MADE_BY, report
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import replace

__all__ = ["check_folder", "follow", "write_report"]

_PAGE, _NUMBERS = "report.html", "report.json"


def check_folder(folder: Path) -> None:
    """Raises ConfigError where a report in ``folder`` would go over a file that isn't part of an earlier one."""
    for name in (_PAGE, _NUMBERS, *(f"{plot.name}.png" for plot in PLOTS)):
        path = folder / name
        if path.is_dir() or (path.exists() and MADE_BY.encode() not in path.read_bytes()[:1000]):
            raise ConfigError(
                f"--out {folder}: {name} in it is no earlier report's; move it away or choose another folder"
            )


def write_report(
    runs: Sequence[Run], folder: Path, refresh_seconds: float | None = None, found: dict[str, Any] | None = None
) -> Path:
    """Write ``report.html``, ``report.json`` and a PNG a plot; return the page's path. ``found`` is ``report(runs)``.

    With ``refresh_seconds``, for a page that will be written again soon, the page loads itself anew, and there are no PNGs.
    """
    found = report(runs) if found is None else found
    for plot in PLOTS:
        picture = folder / f"{plot.name}.png"
        if refresh_seconds is None and plot.runs(runs):
            _replace(picture, lambda path, plot=plot: save_png(plot, runs, path, MADE_BY))  # type: ignore[misc]
        else:
            picture.unlink(missing_ok=True)  # an earlier report's, by check_folder: of other runs, or out of date
    numbers, text = json.dumps(found, indent=2) + "\n", page(found, runs, refresh_seconds)
    _replace(folder / _NUMBERS, lambda path: path.write_text(numbers, encoding="utf-8"))
    _replace(folder / _PAGE, lambda path: path.write_text(text, encoding="utf-8"))
    return folder / _PAGE


def follow(folders: Mapping[str, Path], out: Path, seconds: float) -> Iterator[None]:
    """Rewrite the report of runs (name to folder) where a log has changed since the last time, at every ``next``.

    Ends when all of them have reached their budgets. Runs that have made no step yet are waited for; where there is no
    such folder, raises DataError.
    """
    before: list[tuple[int, int]] | None = None
    while True:
        now = [_stamp(folder / log) for folder in folders.values() for log in LOGS]
        known = [read_run(folder, name) for name, folder in folders.items()] if now != before else []
        runs = [run for run in known if run.steps]
        if runs:
            write_report(runs, out, refresh_seconds=seconds)
            if len(runs) == len(folders) and all(run.finished for run in runs):
                return
        before = now
        yield


def _stamp(path: Path) -> tuple[int, int]:
    """Changes whenever the file does; (0, 0) where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    try:
        replace(path, write)
    except OSError as error:
        raise ConfigError(f"--out {path.parent}: {path.name} can't be written ({error.strerror})") from error
