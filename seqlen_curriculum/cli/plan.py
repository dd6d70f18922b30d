"""Plan a run before it starts: steps to the token budget, sequence lengths, learning rate, data and compute.

Example:
  python scripts/plan.py configs/paper/gpt2_117m_bsz512_seqlen1k_slw60k.json --at 200000 --png plan.png
  python scripts/plan.py --compare configs/paper/gpt2_1.5b_bsz4k_seqlen1k*.json --png plans.png
  python scripts/plan.py configs/paper/gpt2_1.5b_bsz512_seqlen1k_slw270k.json --ranks 128

Needs neither torch nor a GPU nor the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.cli.common import short_names, warn
from seqlen_curriculum.cli.flags import Parser, add_json, add_run_file
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import picture_path


def parser() -> Parser:
    flags = Parser(prog="slw plan", description=__doc__)
    add_run_file(flags).add_argument(
        "--compare", nargs="+", default=[], metavar="FILE", help="compare several files instead, one line each"
    )
    flags.add_argument(
        "--at", nargs="+", type=int, default=[], metavar="STEP", help="further steps to list among the milestones"
    )
    flags.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="also show what each of N ranks does at every length, and estimate the hours",
    )
    flags.add_argument("--gpus-per-node", type=int, metavar="N", help="ranks of a node, with --ranks (default: 8)")
    flags.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="model TFLOP/s that one GPU reaches at full length, for the hours (default: 40 %% of the peak of the GPU in "
        "this machine, or else of an H100)",
    )
    add_json(flags)
    flags.add_argument(
        "--png",
        type=Path,
        metavar="PATH",
        help="draw sequence length, learning rate and rows into a .png, .pdf or .svg file",
    )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    names = short_names("--compare", args.compare or [args.config])
    for flag, value in {"--tflops": args.tflops, "--gpus-per-node": args.gpus_per_node}.items():
        if value is not None and args.ranks is None:
            raise ConfigError(f"{flag}: {value} is for the hours on a number of ranks; give --ranks too")
    png = picture_path("--png", args.png) if args.png else None

    # After --help: numpy and pydantic take a moment.
    from seqlen_curriculum.config.run import RunConfig
    from seqlen_curriculum.planning import ranks, summary

    given = {"ranks": args.ranks, "gpus_per_node": args.gpus_per_node, "tflops": args.tflops}
    given = {name: value for name, value in given.items() if value is not None}
    rank_flags = ranks.RankFlags(**given) if given else None
    plans: dict[str, dict[str, Any]] = {}
    configs = {name: RunConfig.load(path, args.set, require=("training",)) for name, path in names.items()}
    for name, config in configs.items():
        warn(config.warnings())
        plans[name] = summary.plan(config, args.at)
        if rank_flags:
            config = config.for_ranks(rank_flags.ranks)
            plans[name]["on_ranks"] = ranks.on_ranks(config, rank_flags)
            warn(ranks.rank_warnings(config, plans[name]["on_ranks"]))
    (first, *_) = plans.values()
    if args.json:
        print(json.dumps(plans if args.compare else first, indent=2))
    elif args.compare:
        print(summary.compare(plans))
    else:
        print(summary.describe(first))
        if rank_flags:
            print("\n" + ranks.describe_ranks(first["on_ranks"]))
    if png:
        summary.draw(configs, png)
