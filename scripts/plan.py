"""Show a run before it starts: steps to the budget, tokens, lengths, learning rate, data and compute; and draw it.

Example:
  python scripts/plan.py configs/gpt2_117m_bsz512_seqlen1k_slw60k.json --at 200000 --png plan.png

Needs neither torch nor a GPU nor the corpus.
"""

import argparse
import json
from pathlib import Path

from seqlen_curriculum.cli import picture_path, run, warn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="FILE", help="the run's JSON file")
    parser.add_argument("--at", nargs="+", type=int, default=[], metavar="STEP", help="steps to add to the milestones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as training.seed=7")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw seqlen, LR and rows against steps and tokens")
    args = parser.parse_args()

    from seqlen_curriculum import planning  # after --help: numpy and pydantic take a moment
    from seqlen_curriculum.config import RunConfig

    config = RunConfig.load(args.config, args.set, require=("training",))
    warn(config.warnings())
    summary = planning.plan(config, args.at)
    print(json.dumps(summary, indent=2) if args.json else planning.describe(summary))
    if args.png:
        planning.draw(config, picture_path("--png", args.png))


if __name__ == "__main__":
    run(main)
