"""Show runs from their folders: what each came to, how they compare with the first, and all of it as a page with plots.

Example:
  python scripts/report.py runs/quickstart --png runs/quickstart/curves.png
  python scripts/report.py runs/baseline runs/slw60k --out reports/slw60k
  python scripts/report.py runs/slw60k --out reports/slw60k --watch 30

Works while a run trains. Without --out and --png nothing is written.
"""

import argparse
import json
import time
from pathlib import Path

from seqlen_curriculum.cli import run, short_names
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import picture_path, writable_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --save folder of a run; the first is compared with")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write report.html, report.json and a PNG a plot here"
    )
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw losses, seqlen and LR (PNG, PDF or SVG)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS", help="keep --out up to date until the runs have ended"
    )
    args = parser.parse_args()
    names = short_names("RUN", args.runs)
    _check(args)

    from seqlen_curriculum.analysis.read_run import load_run  # after --help: numpy and pydantic take a moment
    from seqlen_curriculum.analysis.report import report

    if args.watch:
        _watch(names, args.out, args.watch)
    runs = [load_run(Path(path), name) for name, path in names.items()]
    found = report(runs) if args.json or args.out or len(runs) > 1 else {}
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _tell(runs, found)
    written = {}
    if args.png:
        from seqlen_curriculum.analysis.drawing import draw_run

        draw_run(runs, args.png)
        written["curves"] = args.png
    if args.out:
        from seqlen_curriculum.analysis.write_report import write_report

        written["report"] = write_report(runs, args.out, found=found)
    for what, path in written.items() if not args.json else ():
        print(f"{what:<17}{path}")


def _check(args: argparse.Namespace) -> None:
    """Refuse what can't be written before anything is read."""
    if args.watch is not None and (not 0 < args.watch < 1e6 or args.out is None or args.json):
        raise ConfigError("--watch: give seconds above 0 and below 1e6, and with it --out FOLDER, without --json")
    if args.png:
        picture_path("--png", args.png)
    if args.out:
        from seqlen_curriculum.analysis.write_report import check_folder

        check_folder(args.out)
        writable_folder("--out", args.out)


def _tell(runs: list, found: dict) -> None:
    from seqlen_curriculum.analysis.run import summarise
    from seqlen_curriculum.analysis.sentences import describe_comparison
    from seqlen_curriculum.analysis.stability import describe_stability

    for one in runs:
        if len(runs) > 1:
            print(one.name)
        print(summarise(one))
        print(describe_stability(one.stability) + "\n" * (len(runs) > 1))
    if len(runs) > 1:
        print(describe_comparison(found))


def _watch(names: dict[str, str], out: Path, seconds: float) -> None:
    """Rewrite the page whenever a log grows, until every run has reached its budget or Ctrl-C; then one last time, whole."""
    from seqlen_curriculum.analysis.write_report import follow

    print(f"watching; the page is {out / 'report.html'}; Ctrl-C ends", flush=True)
    try:
        for _ in follow({name: Path(path) for name, path in names.items()}, out, seconds):
            time.sleep(seconds)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    run(main)
