"""Train GPT-2, or any causal language model or encoder of Hugging Face, from one configuration file.

Example:
  slw train run.json --save runs/a
  slw train run.json --save runs/b --ranks 2 --set training.seed=2
  slw train run.json --save runs/c --hf-checkpoint runs/a/global_step610

Without a launcher it starts one rank per accelerator of this machine with DeepSpeed's launcher and prints that command. On
several nodes, start it with a launcher, for example
deepspeed --hostfile hostfile --module seqlen_curriculum.train run.json --save runs/a

Rerun the same command to resume from the newest complete checkpoint in --save. The exit status is 0 after the last step or
--until-step, 75 after SIGTERM or SIGINT (the run is saved), 3 if training diverged, 5 if a step hung, 1 for other errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from seqlen_curriculum.cli.common import grow_memory_segments, warn
from seqlen_curriculum.cli.flags import Parser, add_launcher_flags, add_run_file
from seqlen_curriculum.cli.launching import add_ranks, check_ranks, check_this_machine, local_ranks, start_ranks
from seqlen_curriculum.errors import STOPPED, ConfigError
from seqlen_curriculum.files import writable_folder
from seqlen_curriculum.launchers import launch


def parser() -> Parser:
    flags = Parser(prog="slw train", description=__doc__)
    add_run_file(flags, "--deepspeed_config")
    flags.add_argument(
        "--save", required=True, type=Path, metavar="FOLDER", help="folder of the checkpoints and the run log"
    )
    flags.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|CHECKPOINT",
        help="auto (default): resume from the newest complete checkpoint in --save; none: start a new run, in a folder "
        "without one; CHECKPOINT: resume from this checkpoint of the same run",
    )
    flags.add_argument(
        "--until-step",
        type=int,
        metavar="STEP",
        help="save and stop after this step; rerun the command without it, or with a later step, to resume",
    )
    flags.add_argument(
        "--hf-checkpoint",
        metavar="FOLDER",
        help="start from the weights and architecture in this Hugging Face folder; sets model.hf_checkpoint",
    )
    add_ranks(flags)
    add_launcher_flags(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    if args.until_step is not None and args.until_step < 1:
        raise ConfigError(f"--until-step: {args.until_step} is not valid; give 1 or more")
    check_ranks(args.ranks)
    initial = [f"model.hf_checkpoint={json.dumps(args.hf_checkpoint)}"] if args.hf_checkpoint is not None else []

    from seqlen_curriculum.config.run import RunConfig  # after --help: numpy and pydantic take a moment
    from seqlen_curriculum.data.from_config import open_run_data

    config = RunConfig.load(args.config, args.set + initial, require=("optimizer", "model", "data", "training"))
    train, valid = open_run_data(config)
    ranks = local_ranks(args.ranks) if launch() is None else None
    if ranks is not None:
        config.for_ranks(ranks)
        check_this_machine(config.deepspeed)
    writable_folder("--save", args.save)  # after all other checks, because it makes the folder
    if ranks is not None:
        start_ranks(ranks, "seqlen_curriculum.train", words)
    warn(config.warnings())
    grow_memory_segments()

    from seqlen_curriculum.training.pretrain import pretrain  # takes seconds to import: mistakes are reported before

    ending = pretrain(config, train, valid, args.save, args.resume, args.until_step)
    return STOPPED if ending == "signal" else 0
