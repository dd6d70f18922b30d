"""Show a run from its log: a summary, and its curves as a picture. Works while the run trains.

Example:
  python scripts/report.py runs/quickstart --png runs/quickstart/curves.png
"""

import argparse
from pathlib import Path

from seqlen_curriculum.analysis.curves import draw_run, load_run, summarise
from seqlen_curriculum.analysis.stability import describe_stability, stability
from seqlen_curriculum.cli import picture_path, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the --save folder of a run")
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw losses, seqlen and LR (PNG, PDF or SVG)")
    args = parser.parse_args()

    steps, evaluations = load_run(args.run)
    print(summarise(steps, evaluations))
    print(describe_stability(stability(steps, evaluations)))
    if args.png:
        draw_run(steps, evaluations, picture_path("--png", args.png))
        print(f"curves           {args.png}")


if __name__ == "__main__":
    run(main)
