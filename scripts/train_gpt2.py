"""Pre-train a GPT-2 from one JSON file, or train on any Hugging Face causal model, under the DeepSpeed launcher.

Example:
  deepspeed scripts/train_gpt2.py --config configs/tiny_cpu.json --save runs/tiny
  deepspeed scripts/train_gpt2.py --config configs/tiny_cpu.json --hf-checkpoint runs/tiny/global_step610 \\
      --save runs/more

Rerun the same command to resume from the newest complete checkpoint in --save. The exit status is 0 after the last step or
--until-step, 75 after SIGTERM or SIGINT (saved), 3 if training diverged, 5 if a step hung, else 1.
"""

import json
from pathlib import Path

from seqlen_curriculum.cli import Parser, add_launcher_flags, grow_memory_segments, need_launcher, run, warn
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.from_config import open_run_data
from seqlen_curriculum.errors import STOPPED, ConfigError
from seqlen_curriculum.files import writable_folder


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", "--deepspeed_config", required=True, metavar="FILE", help="the run's JSON file")
    parser.add_argument("--save", required=True, type=Path, metavar="FOLDER", help="checkpoints and run log go here")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|CHECKPOINT",
        help="auto (default): continue from the newest complete checkpoint in --save; none: start anew in a folder "
        "without a run; or a checkpoint folder of the same run",
    )
    parser.add_argument(
        "--until-step",
        type=int,
        metavar="STEP",
        help="stop after this step, saved; the same command without it, or with a later one, resumes",
    )
    parser.add_argument(
        "--hf-checkpoint",
        metavar="FOLDER",
        help="start from the weights and the architecture in this Hugging Face folder: model.hf_checkpoint of the file",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as training.seed=7")
    add_launcher_flags(parser)
    args = parser.parse_args()

    if args.until_step is not None and args.until_step < 1:
        raise ConfigError(f"--until-step: {args.until_step} is no step of a run; steps count from 1")
    initial = [f"model.hf_checkpoint={json.dumps(args.hf_checkpoint)}"] if args.hf_checkpoint is not None else []
    config = RunConfig.load(args.config, args.set + initial, require=("optimizer", "model", "data", "training"))
    warn(config.warnings())
    writable_folder("--save", args.save)
    train, valid = open_run_data(config)
    need_launcher("train_gpt2.py")
    grow_memory_segments()

    from seqlen_curriculum.training.pretrain import pretrain  # seconds to import: a mistake shows before them

    ending = pretrain(config, train, valid, args.save, args.resume, args.until_step)
    return STOPPED if ending == "signal" else 0


if __name__ == "__main__":
    run(main, ranked=True)
