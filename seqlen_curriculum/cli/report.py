"""Report on one run, or compare several with the first: numbers, and a page of plots and tables.

Example:
  slw report runs/a --png curves.png
  slw report runs/baseline runs/a --out reports/a
  slw report runs/a --out reports/a --watch 30
  slw report runs/baseline runs/a --tensorboard events

It reads only the run folders and works while a run trains. It writes files only with --out, --png or --tensorboard.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqlen_curriculum.cli.common import short_names
from seqlen_curriculum.cli.flags import Parser, add_json, add_overwrite
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import picture_path, writable_folder

if TYPE_CHECKING:
    from seqlen_curriculum.analysis.run import Run


def parser() -> Parser:
    flags = Parser(prog="slw report", description=__doc__)
    flags.add_argument(
        "runs", nargs="+", metavar="RUN", help="--save folders of runs; the others are compared with the first"
    )
    flags.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write report.html, report.json and one PNG per plot to this folder"
    )
    flags.add_argument(
        "--png",
        type=Path,
        metavar="PATH",
        help="plot losses, sequence length and learning rate to a .png, .pdf or .svg file",
    )
    add_overwrite(flags, "--png")
    flags.add_argument(
        "--tensorboard",
        type=Path,
        metavar="FOLDER",
        help="write the logs as event files, one folder per run, for tensorboard --logdir FOLDER",
    )
    add_json(flags)
    flags.add_argument(
        "--watch", type=float, metavar="SECONDS", help="update --out at this interval until all runs have finished"
    )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    names = short_names("RUN", args.runs)
    check_outputs(args, names)

    from seqlen_curriculum.analysis.read_run import load_run  # after --help: numpy and pydantic take a moment
    from seqlen_curriculum.analysis.report import report

    if args.watch:
        watch(names, args.out, args.watch)
    runs = [load_run(Path(path), name) for name, path in names.items()]
    numbers = report(runs) if args.json or args.out or len(runs) > 1 else {}
    if args.json:
        print(json.dumps(numbers, indent=2))
    else:
        print_runs(runs, numbers)
    written = {}
    if args.png:
        from seqlen_curriculum.analysis.drawing import draw_run

        draw_run(runs, args.png)
        written["curves"] = args.png
    if args.out:
        from seqlen_curriculum.analysis.write_report import write_report

        written["report"] = write_report(runs, args.out, numbers=numbers)
    if args.tensorboard:
        from seqlen_curriculum.analysis.event_files import write_event_files

        write_event_files(runs, args.tensorboard)
        written["event files"] = args.tensorboard
    if not args.json:
        for what, path in written.items():
            print(f"{what:<17}{path}")


def check_outputs(args: argparse.Namespace, names: dict[str, str]) -> None:
    """Raise ConfigError for outputs that can't be written, before anything is read."""
    if args.watch is not None and (not 0 < args.watch < 1e6 or args.out is None or args.json):
        raise ConfigError("--watch: give seconds above 0 and below 1e6, with --out FOLDER and without --json")
    if args.png:
        picture_path("--png", args.png, args.overwrite)
    if args.out:
        from seqlen_curriculum.analysis.write_report import check_folder

        check_folder(args.out)
        writable_folder("--out", args.out)
    if args.tensorboard:
        from seqlen_curriculum.analysis.event_files import check_event_folders

        check_event_folders(args.tensorboard, list(names))


def print_runs(runs: list[Run], numbers: dict[str, Any]) -> None:
    """Print a summary of each run, then the comparison."""
    from seqlen_curriculum.analysis.run import summarise
    from seqlen_curriculum.analysis.stability import describe_stability
    from seqlen_curriculum.analysis.tables import ReportTables

    if len(runs) == 1:
        print(summarise(runs[0]))
        print(describe_stability(runs[0].stability))
        return
    for each in runs:
        print(each.name)
        print(summarise(each))
        print(f"{describe_stability(each.stability)}\n")
    print(numbers["outcome"][0])
    comparison = ReportTables(numbers).comparison()
    if comparison.rows:
        print(comparison.as_text())


def watch(names: dict[str, str], out: Path, seconds: float) -> None:
    """Rewrite the page whenever a log grows, until every run has reached its budget or Ctrl-C is pressed."""
    from seqlen_curriculum.analysis.write_report import follow

    print(f"watching the runs; the page is {out / 'report.html'}; press Ctrl-C to stop", flush=True)
    try:
        for _ in follow({name: Path(path) for name, path in names.items()}, out, seconds):
            time.sleep(seconds)
    except KeyboardInterrupt:
        print()
