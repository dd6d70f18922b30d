"""Find min_difficulty and the length T of the ramp with short probes: the low-cost tuning of the paper.

Example:
  slw tune run.json --save runs/tuning --dry-run
  slw tune run.json --save runs/tuning
  slw tune run.json --save runs/tuning --launcher "deepspeed --hostfile hostfile"

Each probe trains the first steps of a schedule with slw train and stops when the validation perplexity fluctuates. The
folder of --save contains tuned.json (the file with the schedule that was found), a report of all probes, and the state
of the search. Rerun the same command to resume a search that was interrupted or killed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqlen_curriculum.cli.common import warn
from seqlen_curriculum.cli.flags import Parser, add_json, add_run_file
from seqlen_curriculum.cli.launching import check_this_machine, local_launcher, local_ranks
from seqlen_curriculum.errors import ConfigError, DivergenceError
from seqlen_curriculum.files import writable_folder

if TYPE_CHECKING:
    from seqlen_curriculum.tuning.probes import Trial
    from seqlen_curriculum.tuning.search import Outcome
    from seqlen_curriculum.tuning.study import ProbeResult, Study

TRAIN = Path(__file__).parents[1] / "train.py"
"""The script that launchers run for each probe."""
SEARCH: dict[str, tuple[type, str, str]] = {
    "--min-difficulty": (int, "LENGTH", "first min_difficulty to try; each next one is twice as long (default: 8)"),
    "--first-warmups": (float, "N", "T used while searching min_difficulty, in LR warmups (default: 4)"),
    "--beginning-warmups": (float, "N", "length of a probe of min_difficulty, in LR warmups (default: 1)"),
    "--probe-warmups": (float, "N", "length of a probe of T, in LR warmups (default: 3)"),
    "--resolution": (float, "RATIO", "ratio of each T to the next smaller one (default: 1.25)"),
    "--most-of-run": (float, "SHARE", "largest T, as a share of its run's steps (default: 0.8)"),
    "--ratio": (float, "RATIO", "a perplexity above RATIO x the best so far counts as a fluctuation (default: 1.3)"),
    "--warmup-steps": (int, "STEPS", "steps of the LR warmup, if the file has none"),
    "--eval-interval": (int, "STEPS", "steps between evaluations of a probe (default: an eighth of the LR warmup)"),
    "--eval-rows": (int, "ROWS", "rows of each evaluation of a probe (default: training.eval_rows)"),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    launcher = [] if args.launcher is None else read_launcher(args.launcher)

    from seqlen_curriculum.config.run import RunConfig  # after --help: numpy and pydantic take a moment
    from seqlen_curriculum.config.run_file import folder_of, read_run_file
    from seqlen_curriculum.data.from_config import open_run_data
    from seqlen_curriculum.tuning.report import describe_costs, describe_space
    from seqlen_curriculum.tuning.space import Budget, Settings
    from seqlen_curriculum.tuning.study import Study

    budget = Budget(max_share=args.max_share, max_minutes=args.max_minutes)
    names = {flag.removeprefix("--").replace("-", "_") for flag in SEARCH}
    settings = Settings(**{name: value for name, value in vars(args).items() if name in names})
    raw = read_run_file(args.config, args.set)
    config = RunConfig.from_dict(raw, where=args.config, require=("optimizer", "model", "data", "training"))
    warn(config.warnings())
    assert config.train_tokens is not None  # required above
    most_tokens = int(budget.max_share * config.train_tokens)
    study = Study(raw, settings, args.save, launcher, TRAIN, most_tokens, budget.max_minutes * 60)
    if not args.json:
        print(describe_space(study.space))
        print(f"budget            {most_tokens:,} tokens, {budget.max_share:.0%} of the training's tokens")
    if args.dry_run:
        space = {"lengths": study.space.lengths, "totals": study.space.totals, "most_tokens": most_tokens}
        print(json.dumps(space, indent=2) if args.json else describe_costs(study))
        return
    if not launcher:
        launcher = local_launcher(local_ranks(None))
        check_this_machine(config.deepspeed)
    study.launcher = launcher
    open_run_data(dataclasses.replace(study.run_of(study.first).config, folder=folder_of(args.config)))
    writable_folder("--save", args.save)
    study.open()
    search(study, args.json)


def parser() -> Parser:
    flags = Parser(prog="slw tune", description=__doc__)
    add_run_file(flags)
    flags.add_argument("--save", required=True, type=Path, metavar="FOLDER", help="folder of the search and its result")
    flags.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="launcher of the probes, for example 'deepspeed --hostfile hostfile' (default: deepspeed on this machine, one "
        "rank per accelerator, or 1 on the CPU)",
    )
    flags.add_argument(
        "--dry-run", action="store_true", help="print the search space and the cost of each probe, and exit"
    )
    add_json(flags)
    budget = flags.add_argument_group("budget")
    budget.add_argument(
        "--max-share",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="tokens of all probes, as a share of training.train_tokens (default: 0.2)",
    )
    budget.add_argument(
        "--max-minutes",
        type=float,
        default=float("inf"),
        metavar="N",
        help="total minutes of all calls (default: no limit)",
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
        raise ConfigError(f"--launcher {command!r}: command not found; give deepspeed, with its flags")
    return words


def search(study: Study, as_json: bool) -> None:
    from tqdm import tqdm

    from seqlen_curriculum.tuning.report import describe_cost, describe_outcome, describe_result, write_page

    bar = tqdm(
        disable=None, unit="step", dynamic_ncols=True, bar_format="{desc} {n_fmt}/{total_fmt} [{elapsed}]{postfix}"
    )

    def watch(result: ProbeResult, trial: Trial) -> None:
        if result.trial is not None:
            bar.clear()
            print(describe_result(result), flush=True, file=sys.stderr if as_json else sys.stdout)
            return
        (length, total), bar.total = result.probe.candidate, result.probe.until_step
        bar.set_description_str(f"probe {result.number}: min_difficulty {length}, T {total:,}: step", refresh=False)
        if trial.ratio is not None:
            bar.set_postfix_str(f"perplexity at most {trial.ratio:.3f} x the best so far", refresh=False)
        bar.n = trial.step
        bar.refresh()

    # Handle SIGTERM like Ctrl-C: the running probe is stopped and saved first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with bar:
        outcome = study.run(watch)
    page = write_page(study)
    if as_json:
        print(json.dumps(facts(study, outcome, page), indent=2))
    else:
        print(describe_outcome(study, outcome))
        print(describe_cost(study))
        if page:
            print(f"report            {page}")
        if outcome.best:
            print(f"configuration     {study.result}")
    if outcome.best is None and outcome.complete:
        raise DivergenceError("every schedule fluctuates; lower optimizer.params.lr and tune in another --save folder")
    if outcome.best is None:
        sys.exit(
            "error: the budget ended before a stable T was found; raise --max-share or --max-minutes and rerun the command"
        )


def facts(study: Study, outcome: Outcome, page: Path | None) -> dict[str, Any]:
    """Return the result and the cost of a search, as --json prints them. Values that were not found are None."""
    best = outcome.best
    return {
        "min_difficulty": best.min_difficulty if best else None,
        "total_curriculum_step": best.total_steps if best else None,
        "complete": outcome.complete,
        "tokens": study.cost().tokens,
        "seconds": study.seconds,
        "configuration": str(study.result) if best else None,
        "report": str(page) if page else None,
    }
