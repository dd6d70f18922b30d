"""Find min_difficulty and T of a curriculum for a small part of the training's cost: the paper's low-cost tuning.

Example:
  python scripts/tune.py configs/tiny_cpu.json --save runs/tuning --dry-run
  python scripts/tune.py configs/tiny_cpu.json --save runs/tuning --launcher "deepspeed --num_accelerators 2"

Each probe trains the first steps of a schedule with train_gpt2.py and stops where the validation perplexity fluctuates.
--save holds the answer as tuned.json, a report of all probes, and the state: rerun the same command to resume a search
that was interrupted or killed.
"""

import argparse
import shlex
import shutil
import signal
import sys
from pathlib import Path

from seqlen_curriculum.cli import Parser, run, warn
from seqlen_curriculum.errors import ConfigError, DivergenceError
from seqlen_curriculum.files import writable_folder

SEARCH = {
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


def main() -> None:
    args = arguments()
    try:
        launcher = shlex.split(args.launcher)
    except ValueError as error:
        raise ConfigError(
            f"--launcher {args.launcher!r}: can't be read as a command ({error}); fix the quotes"
        ) from error
    if not launcher or shutil.which(launcher[0]) is None:
        raise ConfigError(f"--launcher {args.launcher!r}: no such command is found; give deepspeed, with its flags")

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
    most_tokens = int(budget.max_share * config.train_tokens)
    script = Path(__file__).with_name("train_gpt2.py")
    study = Study(raw, settings, args.save, launcher, script, most_tokens, budget.max_minutes * 60)
    print(describe_space(study.space))
    print(f"budget            {most_tokens:,} tokens, {budget.max_share:.0%} of the training's")
    if args.dry_run:
        print(describe_costs(study))
        return
    open_run_data(study.run_of(study.first).config)
    writable_folder("--save", args.save)
    study.open()
    search(study)


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="the run's JSON file")
    parser.add_argument(
        "--save", required=True, type=Path, metavar="FOLDER", help="folder of the search and its answer"
    )
    parser.add_argument("--launcher", default="deepspeed", metavar="COMMAND", help="launches each probe (deepspeed)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as training.seed=7")
    parser.add_argument("--dry-run", action="store_true", help="print the search and the cost of its probes, and exit")
    budget = parser.add_argument_group("budget")
    budget.add_argument(
        "--max-share", type=float, default=0.2, metavar="SHARE", help="tokens of all probes, of the training's (0.2)"
    )
    budget.add_argument(
        "--max-minutes", type=float, default=float("inf"), metavar="N", help="minutes over all calls (no limit)"
    )
    group = parser.add_argument_group("search")
    for flag, (kind, metavar, text) in SEARCH.items():
        group.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)
    return parser.parse_args()


def search(study) -> None:
    from tqdm import tqdm

    from seqlen_curriculum.tuning.report import describe_cost, describe_outcome, describe_result, write_page

    bar = tqdm(
        disable=None, unit="step", dynamic_ncols=True, bar_format="{desc} {n_fmt}/{total_fmt} [{elapsed}]{postfix}"
    )

    def watch(result, trial) -> None:
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


if __name__ == "__main__":
    run(main)
