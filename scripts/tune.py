"""Find min_difficulty and T of a curriculum for a small part of the training's cost: the paper's low-cost tuning.

Example:
  python scripts/tune.py configs/tiny_cpu.json --save runs/tuning --dry-run
  python scripts/tune.py configs/tiny_cpu.json --save runs/tuning --launcher "deepspeed --num_accelerators 2"

Each probe is the real training, by train_gpt2.py, of the first steps of a schedule, ended where the validation perplexity
fluctuates. All is kept in --save: the answer as tuned.json, a report of all probes, and what the same command goes on from
after it was interrupted or killed.
"""

import argparse
import shlex
import shutil
import signal
import sys
from pathlib import Path

from seqlen_curriculum.cli import run, warn
from seqlen_curriculum.errors import ConfigError, DivergenceError
from seqlen_curriculum.files import writable_folder

SEARCH = {
    "--min-difficulty": (int, "LENGTH", "the first length to try, each next one twice as long (8)"),
    "--first-warmups": (float, "N", "T that lengths are tried with, in LR warmups (4)"),
    "--beginning-warmups": (float, "N", "how long the very beginning is, in LR warmups (1)"),
    "--probe-warmups": (float, "N", "for how long a T must be stable, in LR warmups (3)"),
    "--resolution": (float, "RATIO", "of each T to the next shorter one (1.25)"),
    "--most-of-run": (float, "SHARE", "the largest T, as a share of its run's steps (0.8)"),
    "--ratio": (float, "RATIO", "a perplexity of over so many times the best before it fluctuates (1.3)"),
    "--warmup-steps": (int, "STEPS", "of the LR warmup, where the file doesn't tell"),
    "--eval-interval": (int, "STEPS", "between evaluations of a probe (an eighth of the LR warmup)"),
    "--eval-rows": (int, "ROWS", "of an evaluation of a probe (the file's)"),
}


def main() -> None:
    args = arguments()
    try:
        launcher = shlex.split(args.launcher)
    except ValueError as error:
        raise ConfigError(
            f"--launcher {args.launcher!r}: can't be read as a command ({error}); mend the quotes"
        ) from error
    if not launcher or shutil.which(launcher[0]) is None:
        raise ConfigError(f"--launcher {args.launcher!r}: no such command is found; give deepspeed, with its flags")

    from seqlen_curriculum.config.run import RunConfig  # after --help: numpy and pydantic take a moment
    from seqlen_curriculum.data.from_config import open_run_data
    from seqlen_curriculum.files import apply_override, read_json
    from seqlen_curriculum.tuning.report import describe_costs, describe_space
    from seqlen_curriculum.tuning.space import Settings
    from seqlen_curriculum.tuning.study import Study

    raw = read_json(Path(args.config))
    for override in args.set:
        apply_override(raw, override)
    config = RunConfig.from_dict(raw, where=args.config, require=("optimizer", "model", "data", "training"))
    warn(config.warnings())
    names = {flag.removeprefix("--").replace("-", "_") for flag in SEARCH}
    settings = Settings(**{name: value for name, value in vars(args).items() if name in names})
    most_tokens = int(args.max_share * config.train_tokens)
    script = Path(__file__).with_name("train_gpt2.py")
    tuning = Study(raw, settings, args.save, launcher, script, most_tokens, args.max_minutes * 60)
    print(describe_space(tuning.space))
    print(f"budget            {most_tokens:,} tokens, {args.max_share:.0%} of the training's")
    if args.dry_run:
        print(describe_costs(tuning))
        return
    open_run_data(tuning.run_of(tuning.first).config)
    writable_folder("--save", args.save)
    tuning.open()
    search(tuning)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="the run's JSON file")
    parser.add_argument("--save", required=True, type=Path, metavar="FOLDER", help="the search and its answer go here")
    parser.add_argument("--launcher", default="deepspeed", metavar="COMMAND", help="launches each probe (deepspeed)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as training.seed=7")
    parser.add_argument("--dry-run", action="store_true", help="show what would be probed and what it costs, and end")
    budget = parser.add_argument_group("budget")
    budget.add_argument(
        "--max-share", type=float, default=0.2, metavar="SHARE", help="of the training's tokens (0.2), for all probes"
    )
    budget.add_argument(
        "--max-minutes", type=float, default=float("inf"), metavar="N", help="over all calls (no limit)"
    )
    group = parser.add_argument_group("search")
    for flag, (kind, metavar, text) in SEARCH.items():
        group.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)
    args = parser.parse_args()
    for flag, value in (("--max-share", args.max_share), ("--max-minutes", args.max_minutes)):
        if not value > 0:
            raise ConfigError(f"{flag}: {value} is not valid; give a number above 0")
    if not args.max_share < 1e6:
        raise ConfigError(f"--max-share: {args.max_share} is not valid; give a share of the training's tokens, as 0.2")
    return args


def search(tuning) -> None:
    from tqdm import tqdm

    from seqlen_curriculum.tuning.report import describe_cost, describe_finding, describe_outcome, write_page

    bar = tqdm(
        disable=None, unit="step", dynamic_ncols=True, bar_format="{desc} {n_fmt}/{total_fmt} [{elapsed}]{postfix}"
    )

    def watch(finding, trial) -> None:
        if finding.trial is not None:
            bar.clear()
            print(describe_finding(finding), flush=True)
            return
        (length, total), bar.total = finding.probe.candidate, finding.probe.until_step
        bar.set_description_str(f"probe {finding.number}: min_difficulty {length}, T {total:,}: step", refresh=False)
        if trial.ratio is not None:
            bar.set_postfix_str(f"perplexity at most {trial.ratio:.3f} times its best before", refresh=False)
        bar.n = trial.step
        bar.refresh()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a probe under way is stopped and saved first
    with bar:
        outcome = tuning.run(watch)
    print(describe_outcome(tuning, outcome))
    print(describe_cost(tuning))
    page = write_page(tuning)
    if page is not None:
        print(f"report            {page}")
    if outcome.best is not None:
        print(f"configuration     {tuning.result}")
    elif outcome.complete:
        raise DivergenceError(
            "no schedule is without fluctuation; lower optimizer.params.lr and tune in another --save"
        )
    else:
        sys.exit("error: the budget ended before a stable T was found; raise --max-share or --max-minutes and go on")


if __name__ == "__main__":
    run(main)
