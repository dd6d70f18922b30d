"""Find min_difficulty and T of a curriculum for a small part of the training's cost: the paper's low-cost tuning.

Example:
  python scripts/tune.py configs/tiny_cpu.json --save runs/tuning --dry-run
  python scripts/tune.py configs/tiny_cpu.json --save runs/tuning --launcher "deepspeed --num_accelerators 2"

Each probe trains the first steps of a schedule with train_gpt2.py and stops where the validation perplexity fluctuates.
--save holds the answer as tuned.json, a report of all probes, and the state: rerun the same command to resume a search
that was interrupted or killed.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seqlen_curriculum.cli.common import warn
from seqlen_curriculum.cli.flags import Parser, add_run_file
from seqlen_curriculum.cli.launching import local_launcher, local_ranks
from seqlen_curriculum.errors import ConfigError, DivergenceError
from seqlen_curriculum.files import writable_folder

if TYPE_CHECKING:
    from seqlen_curriculum.tuning.probes import Trial
    from seqlen_curriculum.tuning.study import ProbeResult, Study

TRAIN = Path(__file__).parents[1] / "train.py"
"""What launchers run for each probe."""
SEARCH: dict[str, tuple[type, str, str]] = {
    "--min-difficulty": (int, "LENGTH", "the first length to try; each next one is twice as long (8)"),
    "--first-warmups": (float, "N", "the T that lengths are tried with, in LR warmups (4)"),
    "--beginning-warmups": (float, "N", "how long the very beginning is, in LR warmups (1)"),
    "--probe-warmups": (float, "N", "how long a T must be stable, in LR warmups (3)"),
    "--resolution": (float, "RATIO", "ratio of each T to the next smaller one (1.25)"),
    "--most-of-run": (float, "SHARE", "the largest T, as a share of its run's steps (0.8)"),
    "--ratio": (float, "RATIO", "a perplexity above RATIO x the best so far is a fluctuation (1.3)"),
    "--warmup-steps": (int, "STEPS", "steps of the LR warmup, if CONFIG has none"),
    "--eval-interval": (int, "STEPS", "steps between evaluations of a probe (an eighth of the LR warmup)"),
    "--eval-rows": (int, "ROWS", "rows of each evaluation of a probe (CONFIG's)"),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    launcher = [] if args.launcher is None else read_launcher(args.launcher)

    from seqlen_curriculum.config.run import RunConfig  # after --help: numpy and pydantic take a moment
    from seqlen_curriculum.data.from_config import open_run_data
    from seqlen_curriculum.files import apply_override, read_json
    from seqlen_curriculum.tuning.report import describe_costs, describe_space
    from seqlen_curriculum.tuning.space import Budget, Settings
    from seqlen_curriculum.tuning.study import Study

    budget = Budget(max_share=args.max_share, max_minutes=args.max_minutes)
    names = {flag.removeprefix("--").replace("-", "_") for flag in SEARCH}
    settings = Settings(**{name: value for name, value in vars(args).items() if name in names})
    raw = read_json(Path(args.config))
    for override in args.set:
        apply_override(raw, override)
    config = RunConfig.from_dict(raw, where=args.config, require=("optimizer", "model", "data", "training"))
    warn(config.warnings())
    assert config.train_tokens is not None  # required above
    most_tokens = int(budget.max_share * config.train_tokens)
    study = Study(raw, settings, args.save, launcher, TRAIN, most_tokens, budget.max_minutes * 60)
    print(describe_space(study.space))
    print(f"budget            {most_tokens:,} tokens, {budget.max_share:.0%} of the training's")
    if args.dry_run:
        print(describe_costs(study))
        return
    study.launcher = launcher or local_launcher(local_ranks(None))
    open_run_data(study.run_of(study.first).config)
    writable_folder("--save", args.save)
    study.open()
    search(study)


def parser() -> Parser:
    flags = Parser(prog="slw tune", description=__doc__)
    add_run_file(flags)
    flags.add_argument("--save", required=True, type=Path, metavar="FOLDER", help="folder of the search and its answer")
    flags.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="launches each probe, for example 'deepspeed --hostfile hostfile' (default: deepspeed on this machine, one "
        "rank per accelerator, or 1 on the CPU)",
    )
    flags.add_argument("--dry-run", action="store_true", help="print the search and the cost of its probes, and exit")
    budget = flags.add_argument_group("budget")
    budget.add_argument(
        "--max-share", type=float, default=0.2, metavar="SHARE", help="tokens of all probes, of the training's (0.2)"
    )
    budget.add_argument(
        "--max-minutes", type=float, default=float("inf"), metavar="N", help="minutes over all calls (no limit)"
    )
    group = flags.add_argument_group("search")
    for flag, (kind, metavar, text) in SEARCH.items():
        group.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)
    return flags


def read_launcher(command: str) -> list[str]:
    """Return the words of --launcher. Raises ConfigError."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--launcher {command!r}: can't be read as a command ({error}); fix the quotes") from error
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(f"--launcher {command!r}: no such command is found; give deepspeed, with its flags")
    return words


def search(study: Study) -> None:
    from tqdm import tqdm

    from seqlen_curriculum.tuning.report import describe_cost, describe_outcome, describe_result, write_page

    bar = tqdm(
        disable=None, unit="step", dynamic_ncols=True, bar_format="{desc} {n_fmt}/{total_fmt} [{elapsed}]{postfix}"
    )

    def watch(result: ProbeResult, trial: Trial) -> None:
        if result.trial is not None:
            bar.clear()
            print(describe_result(result), flush=True)
            return
        (length, total), bar.total = result.probe.candidate, result.probe.until_step
        bar.set_description_str(f"probe {result.number}: min_difficulty {length}, T {total:,}: step", refresh=False)
        if trial.ratio is not None:
            bar.set_postfix_str(f"perplexity at most {trial.ratio:.3f} times its best before", refresh=False)
        bar.n = trial.step
        bar.refresh()

    # SIGTERM as Ctrl-C: the running probe is stopped and saved first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with bar:
        outcome = study.run(watch)
    print(describe_outcome(study, outcome))
    print(describe_cost(study))
    page = write_page(study)
    if page is not None:
        print(f"report            {page}")
    if outcome.best is not None:
        print(f"configuration     {study.result}")
    elif outcome.complete:
        raise DivergenceError(
            "no schedule is without fluctuation; lower optimizer.params.lr and tune in another --save"
        )
    else:
        sys.exit(
            "error: the budget ended before a stable T was found; raise --max-share or --max-minutes, rerun the command"
        )
