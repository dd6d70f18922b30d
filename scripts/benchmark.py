"""Measure tokens/s at every length, fixed against balanced micro-batches, and draw it. Random tokens; needs no corpus.

Example:
  deepspeed --num_accelerators 1 scripts/benchmark.py throughput --config configs/throughput_cpu.json --rounds 5
"""

import argparse
import json
import os
from pathlib import Path

from seqlen_curriculum.cli import picture_path, run
from seqlen_curriculum.config import RunConfig
from seqlen_curriculum.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput"], help="what to measure")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's JSON file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as training.seed=7")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="S", help="default: 8 and its doubles up to full")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds; medians are reported (default: 5)")
    parser.add_argument("--device", default="auto", help="auto (default) or a DeepSpeed accelerator's name, as cpu")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the records")
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw them (PNG, PDF or SVG)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    args = parser.parse_args()

    config = RunConfig.load(args.config, args.set, require=("optimizer", "model", "data"))
    full = config.data.seq_length
    lengths = args.lengths or [8 << doubling for doubling in range(24) if 8 << doubling <= full]
    if args.rounds < 1 or not all(1 <= seqlen <= full for seqlen in lengths):
        raise ConfigError(f"--lengths {lengths}, --rounds {args.rounds}: lengths are 1 to {full}, rounds 1 or more")
    png = picture_path("--png", args.png) if args.png else None
    if args.device != "auto":
        os.environ["DS_ACCELERATOR"] = args.device

    from seqlen_curriculum.training.throughput import measure_throughput

    records = measure_throughput(config, lengths, args.rounds)
    if os.environ.get("RANK", "0") != "0":
        return
    from seqlen_curriculum.analysis.throughput import draw_throughput, throughput_table

    print(throughput_table(records))
    if args.json:
        args.json.write_text(json.dumps(records, indent=2))
    if png:
        draw_throughput(records, png)


if __name__ == "__main__":
    run(main)
