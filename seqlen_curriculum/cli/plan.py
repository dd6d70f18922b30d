"""Plan a run before it starts: training steps, sequence lengths, learning rate, data and compute.

Example:
  slw plan run.json --at 2000 --png plan.png
  slw plan --compare baseline.json run.json --png plans.png
  slw plan run.json --ranks 128

It needs no torch and no GPU, and a corpus only if data.order is "decomposed" or data.attention is "document".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.cli.common import short_names, warn
from seqlen_curriculum.cli.flags import Parser, add_json, add_overwrite, add_run_file
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import picture_path


def parser() -> Parser:
    flags = Parser(prog="slw plan", description=__doc__)
    add_run_file(flags).add_argument(
        "--compare", nargs="+", default=[], metavar="FILE", help="compare several files, one row per file"
    )
    flags.add_argument("--at", nargs="+", type=int, default=[], metavar="STEP", help="also list these steps")
    flags.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="also show the work of each of N ranks at every length, and estimate the training time",
    )
    flags.add_argument("--gpus-per-node", type=int, metavar="N", help="ranks per node, used with --ranks (default: 8)")
    flags.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="model TFLOP/s of one GPU at full length, for the estimate of the training time (default: 40 %% of the peak of "
        "this machine's GPU, or of an H100 if it has none)",
    )
    add_json(flags)
    flags.add_argument(
        "--png",
        type=Path,
        metavar="PATH",
        help="plot sequence length, learning rate and rows to a .png, .pdf or .svg file",
    )
    add_overwrite(flags, "--png")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    names = short_names("--compare", args.compare or [args.config])
    for flag, value in {"--tflops": args.tflops, "--gpus-per-node": args.gpus_per_node}.items():
        if value is not None and args.ranks is None:
            raise ConfigError(f"{flag}: {value} is only used with --ranks; give --ranks too")
    png = picture_path("--png", args.png, args.overwrite) if args.png else None

    # After --help: numpy and pydantic take a moment.
    from seqlen_curriculum.config.run import RunConfig
    from seqlen_curriculum.data.document_use import describe_document_use, document_use
    from seqlen_curriculum.data.from_config import with_buckets
    from seqlen_curriculum.planning import ranks, summary

    given = {"ranks": args.ranks, "gpus_per_node": args.gpus_per_node, "tflops": args.tflops}
    given = {name: value for name, value in given.items() if value is not None}
    rank_flags = ranks.RankFlags(**given) if given else None
    plans: dict[str, dict[str, Any]] = {}
    loaded = {name: RunConfig.load(path, args.set, require=("training",)) for name, path in names.items()}
    configs = {name: with_buckets(config) for name, config in loaded.items()}
    for name, config in configs.items():
        warn(config.warnings())
        plans[name] = summary.plan(config, args.at) | document_use(config)
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
        if "documents" in first:
            print("\n" + describe_document_use(first["documents"]))
        if rank_flags:
            print("\n" + ranks.describe_ranks(first["on_ranks"]))
    if png:
        summary.draw(configs, png)
