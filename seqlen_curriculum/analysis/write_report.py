"""Write a report to a folder. Files are written atomically, and only files of an earlier report are replaced."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
    """Raise ConfigError if a report in ``folder`` would replace a file that isn't part of an earlier report."""
    for name in (_PAGE, _NUMBERS, *(f"{plot.name}.png" for plot in PLOTS)):
        path = folder / name
        # The mark is near the start of all three kinds: the page's generator, the first key of the JSON file, and the
        # Software entry of a PNG, which matplotlib writes before the pixels.
        if path.is_dir() or (path.exists() and MADE_BY.encode() not in path.read_bytes()[:1000]):
            raise ConfigError(
                f"--out {folder}: {name} in it is not part of an earlier report; move it or choose another folder"
            )


def write_report(
    runs: Sequence[Run], folder: Path, refresh_seconds: float | None = None, numbers: dict[str, Any] | None = None
) -> Path:
    """Write ``report.html``, ``report.json`` and one PNG per plot; return the page's path.

    ``numbers`` is ``report(runs)``, if the caller has it already. With ``refresh_seconds`` the page reloads itself at this
    interval and no PNGs are written.
    """
    numbers = report(runs) if numbers is None else numbers
    for plot in PLOTS:
        picture = folder / f"{plot.name}.png"
        if refresh_seconds is None and plot.runs(runs):
            _replace(picture, partial(save_png, plot, runs, made_by=MADE_BY))
        else:
            picture.unlink(missing_ok=True)  # from an earlier report (check_folder): other runs, or out of date
    numbers_text, page_text = json.dumps(numbers, indent=2) + "\n", page(numbers, runs, refresh_seconds)
    _replace(folder / _NUMBERS, lambda path: path.write_text(numbers_text, encoding="utf-8"))
    _replace(folder / _PAGE, lambda path: path.write_text(page_text, encoding="utf-8"))
    return folder / _PAGE


def follow(folders: Mapping[str, Path], out: Path, seconds: float) -> Iterator[None]:
    """Rewrite the report of ``folders`` (by run name) at each ``next`` if a log has changed since the last one.

    Ends when all runs have reached their budgets. Waits for runs that have not made a step yet. Raises DataError if a
    folder doesn't exist.
    """
    before: list[tuple[int, int]] | None = None
    while True:
        stamps = [_stamp(folder / log) for folder in folders.values() for log in LOGS]
        if stamps != before:
            runs = [read_run(folder, name) for name, folder in folders.items()]
            started = [run for run in runs if run.steps]
            if started:
                write_report(started, out, refresh_seconds=seconds)
            if all(run.steps and run.finished for run in runs):
                return
        # The stamps are from before the logs were read: what was written meanwhile changes those of the next round.
        before = stamps
        yield


def _stamp(path: Path) -> tuple[int, int]:
    """Return a value that changes whenever the file does; (0, 0) if there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    # A browser that reloads sees the old file or the new one, never a partial one.
    try:
        replace(path, write)
    except OSError as error:
        raise ConfigError(f"--out {path.parent}: {path.name} can't be written ({error.strerror})") from error
