"""Compare cases of a run over several seeds, each at its own best learning rate.

Example:
  slw study study.json --save runs/study --dry-run
  slw study study.json --save runs/study
  slw study study.json --save runs/study --jobs 1

First each case is trained at each of the file's rates on its tuning seeds. Then each case is trained at its best rate on
other seeds, from which the report is made. Every run is an ordinary run folder in --save, on one rank. tuned.json is the
configuration of the best case. Rerun the same command to resume a study that was interrupted or killed.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqlen_curriculum.cli.common import warn
from seqlen_curriculum.cli.flags import Parser, add_json
from seqlen_curriculum.cli.launching import check_this_machine, local_ranks, visible_devices
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import writable_folder

if TYPE_CHECKING:
    from seqlen_curriculum.study.plan import StudyPlan
    from seqlen_curriculum.tuning.cost import Cost


def parser() -> Parser:
    flags = Parser(prog="slw study", description=__doc__)
    flags.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="file of the study, or the name of a shipped one, for example studies/mini",
    )
    flags.add_argument(
        "--save", required=True, type=Path, metavar="FOLDER", help="folder of the runs, the report and tuned.json"
    )
    flags.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs to train at once (default: one per accelerator, or one per CPU core; OMP_NUM_THREADS cores if it is set)",
    )
    flags.add_argument(
        "--dry-run", action="store_true", help="print the runs with their tokens and FLOPs, and exit; needs no corpus"
    )
    add_json(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError(f"--jobs: {args.jobs} is not valid; give 1 or more")

    from seqlen_curriculum.study.cost import arm_costs, cost_table  # after --help: numpy and pydantic take a moment
    from seqlen_curriculum.study.execute import train_all
    from seqlen_curriculum.study.run_folders import StudyRun, check_unchanged, open_folder
    from seqlen_curriculum.study.study_file import read_study

    plan = read_study(args.file)
    if args.dry_run:
        costs = arm_costs(plan)
        print(json.dumps(planned(plan, costs), indent=2) if args.json else cost_table(plan, costs).as_text())
        return
    check_runs(plan)
    every_run = [
        StudyRun(args.save, plan.run(arm, rate, seed))
        for arm, rate, seed in itertools.product(plan.arms, plan.tried, [*plan.tuning_seeds, *plan.seeds])
    ]
    check_unchanged(every_run)
    slots = job_slots(args.jobs)
    writable_folder("--save", args.save)
    open_folder(args.save, plan)
    # Handle SIGTERM like Ctrl-C: the running trainings are stopped and saved first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if survivors := [run for run in every_run if run.is_running]:
        print(f"waiting for {len(survivors)} runs that an earlier command has started", file=sys.stderr)
        train_all(survivors, slots, lambda _: None)
    train_and_report(plan, arm_costs(plan), args.save, slots, args.json)


def check_runs(plan: StudyPlan) -> None:
    """Raise an error for a corpus or a package that a run lacks, and print the warnings of all cases, each once."""
    from seqlen_curriculum.data.from_config import open_run_data
    from seqlen_curriculum.study.study_file import comparison_warnings

    local_ranks(1)  # selects the CPU if there is no accelerator
    warnings: dict[str, None] = {}
    for arm in plan.arms:
        config = plan.run(arm, None, plan.seeds[0]).config
        check_this_machine(config.deepspeed)
        open_run_data(config)
        warnings |= dict.fromkeys(config.warnings())
    warn([*warnings, *comparison_warnings(plan)])


def job_slots(jobs: int | None) -> list[dict[str, str]]:
    """Return the variables of each run that trains at the same time as others: the device of each on GPUs.

    Raises ConfigError if there are fewer accelerators than ``jobs``.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        cores = len(os.sched_getaffinity(0)) // (int(threads) if threads.isdigit() else 1)
        return [{}] * (jobs or max(1, cores))
    visible = visible_devices()
    if jobs is not None and jobs > len(visible):
        raise ConfigError(f"--jobs: {jobs} runs need as many accelerators, this machine has {len(visible)}; give fewer")
    return [{variable: device} for variable, device in visible[: jobs or None]]


def train_and_report(
    plan: StudyPlan, costs: dict[str, Cost], folder: Path, slots: Sequence[dict[str, str]], as_json: bool
) -> None:
    """Train all runs of a study, then print and write its results."""
    from seqlen_curriculum.analysis.study_tables import study_tables
    from seqlen_curriculum.study import report
    from seqlen_curriculum.study.progress import Progress, train
    from seqlen_curriculum.study.results import best_rates

    tuning = plan.tuning_runs()
    # Every arm is measured as often, so the runs of the second part can be estimated before their rates are known.
    progress = Progress([*tuning, *plan.measured_runs({arm.name: None for arm in plan.arms})], costs)
    runs = train(folder, tuning, slots, progress)
    rates = best_rates(plan, runs)
    warn(report.edge_warnings(plan, rates, runs))
    report.reference_arm(plan, rates, runs)  # without one the other runs would be for nothing
    progress.leave_out(plan.measured_runs({arm.name: None for arm in plan.arms if arm.name not in rates}))
    runs |= train(folder, plan.measured_runs(rates), slots, progress)
    warn(report.device_warnings(runs))
    results = report.study_results(plan, rates, runs, costs)
    measured = report.measured_runs(plan, rates, runs, results["reference"])
    numbers = report.study_report(measured, results)
    page = report.write_page(measured, numbers, folder / "report")
    tuned = report.write_tuned(plan, results, folder)
    if as_json:
        print(json.dumps({**results, "report": str(page), "configuration": tuned and str(tuned)}, indent=2))
        return
    for table in study_tables(numbers):
        print(f"\n{table.as_text()}")
    print("", *report.study_sentences(results), sep="\n")
    print(f"report            {page}")
    if tuned:
        print(f"configuration     {tuned}")


def planned(plan: StudyPlan, costs: dict[str, Cost]) -> dict[str, Any]:
    """Return the runs of a study and the cost of each, as --dry-run --json prints them. Unknown FLOPs are None."""
    return {
        "rates": plan.rates,
        "tuning_seeds": plan.tuning_seeds,
        "seeds": plan.seeds,
        "tuning_runs": len(plan.tuning_runs()),
        "measured_runs": len(plan.arms) * len(plan.seeds),
        "cases": [
            {"name": name, "tokens": cost.tokens, "flops": None if math.isnan(cost.flops) else cost.flops}
            for name, cost in costs.items()
        ],
    }
