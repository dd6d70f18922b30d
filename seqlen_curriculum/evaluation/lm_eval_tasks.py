"""The paper's 11 GPT-3 tasks, or any other, through EleutherAI's lm-evaluation-harness (``pip install lm-eval``)."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import ConfigError, DataError
from seqlen_curriculum.evaluation.distributed import Ranks
from seqlen_curriculum.evaluation.scoring import BATCH_TOKENS
from seqlen_curriculum.evaluation.task import Limits
from seqlen_curriculum.fields import suggest

__all__ = [
    "GPT3_TASKS",
    "describe_end",
    "describe_head",
    "describe_task",
    "evaluate_harness",
    "plain_metrics",
    "read_harness_tasks",
    "task_names",
]

ALL = "gpt3"
GPT3_TASKS = {
    "hellaswag": "hellaswag",
    "lambada": "lambada_openai",
    "triviaqa": "triviaqa",
    "webqs": "webqs",
    "winogrande": "winogrande",
    "piqa": "piqa",
    "arc_challenge": "arc_challenge",
    "arc_easy": "arc_easy",
    "anli_r1": "anli_r1",
    "anli_r2": "anli_r2",
    "anli_r3": "anli_r3",
}
"""lm-eval's names of the paper's tasks (Section 5.2)."""
_SEED = 1234  # lm-eval's seed for few-shot examples
_COLUMNS = {"acc", "exact_match", "accuracy", "standard_error", "items", "items_in_all", "shots", "partial", "seconds"}
"""Results with their own column in the table, or omitted from it. All others are listed under "others"."""


def task_names(arguments: Sequence[str]) -> dict[str, str]:
    """Return lm-eval's name of each task: ``gpt3`` selects the paper's eleven, other names are lm-eval's own.

    Raises ConfigError.
    """
    names = [name for argument in arguments for name in (GPT3_TASKS if argument == ALL else [argument])]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"--harness {twice[0]}: is given twice; give each task once")
    return {name: GPT3_TASKS.get(name, name) for name in names}


def read_harness_tasks(arguments: Sequence[str], include: Path | None = None, shots: int = 0) -> dict[str, Any]:
    """Return lm-eval's task objects by name, after reading their data and ``shots`` examples.

    ``include`` is a folder of task files (.yaml) that replace lm-eval's files of the same name. With ``dataset_path: json``
    and ``dataset_kwargs: {data_files: ...}`` a task reads local files and downloads nothing. With ``include:`` and the path
    of lm-eval's file it keeps its prompts. Raises ConfigError or DataError.
    """
    names = task_names(arguments)
    if include is not None and not any(include.rglob("*.yaml")):
        raise ConfigError(f"--include-path {include}: not a folder with task files (.yaml); check the path")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness: needs lm-eval; install it with: pip install 'seqlen-curriculum[eval]'")
    manager = _task_manager(set(names.values()), include)
    for name, lm_eval_name in names.items():
        if lm_eval_name in manager.all_subtasks:
            continue
        if name in [*manager.all_groups, *manager.all_tags]:
            raise ConfigError(
                f"--harness {name}: is a group of lm-eval, which can't be evaluated; give its tasks instead"
            )
        close = suggest(name, [ALL, *GPT3_TASKS, *manager.all_subtasks])
        meant = f"did you mean '{close}'? " if close else ""
        raise ConfigError(
            f"--harness {name}: there is no such task; {meant}{ALL} is the paper's eleven, --include-path adds your own"
        )
    tasks = {name: _read_task(manager, name, lm_eval_name) for name, lm_eval_name in names.items()}
    for name, task in tasks.items():
        _check_task(name, task, shots)
    return tasks


def _task_manager(names: set[str], include: Path | None) -> Any:
    """Return a manager of only the tasks in ``include`` if possible, because listing lm-eval's 10,000 takes seconds."""
    from lm_eval.tasks import TaskManager

    if include is None:
        return TaskManager()
    manager = TaskManager(include_path=str(include), include_defaults=False)
    return manager if names <= set(manager.all_tasks) else TaskManager(include_path=str(include))


def _read_task(manager: Any, name: str, lm_eval_name: str) -> Any:
    try:
        (task,) = manager.load([lm_eval_name])["tasks"].values()
        next(iter(task.eval_docs))  # some tasks read their data only here
    except Exception as error:  # a task file may run functions and download data, which may raise anything
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"--harness {name}: its data can't be read ({type(error).__name__}: {reason}); connect to a network to fetch "
            f"it once, or give --include-path FOLDER with a task file '{lm_eval_name}' for local files"
        ) from error
    return task


def _check_task(name: str, task: Any, shots: int) -> None:
    if (task.config.generation_kwargs or {}).get("do_sample"):
        raise ConfigError(
            f"--harness {name}: its generation_kwargs require random samples (do_sample), but only greedy decoding is "
            "supported: set it to false in a task file of --include-path, or leave out the task"
        )
    if not shots:
        return
    try:
        task.fewshot_context(next(iter(task.eval_docs)), num_fewshot=shots)
    except (AssertionError, ValueError) as error:  # raised by lm-eval's samplers
        raise ConfigError(f"--shots {shots}: {name} has fewer examples ({error}); lower it") from error


def evaluate_harness(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    limits: Limits,
    ranks: Ranks,
    batch_tokens: int = BATCH_TOKENS,
    shots: int = 0,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and results of each task, on every rank, with ``shots`` examples before each question.

    ``model`` is in eval mode on ``ranks.device``. Raises ConfigError.
    """
    if not tasks:
        return
    from lm_eval.evaluator import evaluate

    from seqlen_curriculum.evaluation.lm_eval_model import HarnessModel  # needs lm-eval

    scorer = HarnessModel(model, tokenizer, limits.seqlen, ranks, batch_tokens)
    for name, task in tasks.items():
        start = time.perf_counter()
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=_SEED)
        scorer.name, scorer.truncated_requests = name, 0
        report = evaluate(
            scorer, {"tasks": {task.task_name: task}}, limit=limits.limit, bootstrap_iters=0, log_samples=False
        )
        samples = report["n-samples"][task.task_name]
        items, items_in_all = samples["effective"], samples["original"]
        numbers = {
            **plain_metrics(report["results"][task.task_name], items),
            "items": items,
            "items_in_all": items_in_all,
            "requests_cut": scorer.truncated_requests,
            "shots": shots,
            "partial": items < items_in_all,
            "seconds": time.perf_counter() - start,
        }
        yield name, numbers


def plain_metrics(results: Mapping[str, Any], items: int) -> dict[str, float]:
    """Return lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": ...}`` as ``{"acc": 0.5, ...}``.

    ``accuracy`` and ``standard_error`` are copied from ``acc`` or ``exact_match``, if the task has one of them.
    """
    metrics = {}
    for key, value in results.items():
        name, comma, _filter = key.partition(",")
        if comma and "_stderr" not in name and isinstance(value, int | float):
            metrics[name] = float(value)
    share = metrics.get("acc", metrics.get("exact_match"))
    if share is None:
        return metrics
    # Each of n items is right (1) or wrong (0): the standard error is sqrt(p (1 - p) / (n - 1)), 1.55 % at 60 % of 1,000.
    return {**metrics, "accuracy": share, "standard_error": math.sqrt(share * (1 - share) / max(items - 1, 1))}


def describe_head(shots: int) -> str:
    """Return the header of the table, followed by ``describe_task`` for each row and ``describe_end``."""
    return f"{f'lm-eval, {shots} shots':<24}{'accuracy':>10}{'+-':>9}{'items':>9}{'seconds':>9}  others"


def describe_task(name: str, numbers: Mapping[str, Any]) -> str:
    """Return the table row of one task."""
    share = f"{numbers['accuracy']:.2%}" if "accuracy" in numbers else ""
    error = f"{numbers['standard_error']:.2%}" if "standard_error" in numbers else ""
    others = {key: value for key, value in numbers.items() if key not in _COLUMNS and (key != "requests_cut" or value)}
    listed = ", ".join(f"{key} {value:.4g}" for key, value in others.items())
    return f"{name:<24}{share:>10}{error:>9}{numbers['items']:>9,}{numbers['seconds']:>9.1f}  {listed}".rstrip()


def describe_end(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines below the table: the mean of the accuracies, and a warning if not all items were read."""
    lines = []
    shares = [numbers["accuracy"] for numbers in results.values() if "accuracy" in numbers]
    if len(shares) > 1:
        lines.append(f"{'mean of ' + str(len(shares)):<24}{sum(shares) / len(shares):>10.2%}")
    if any(numbers["partial"] for numbers in results.values()):
        lines.append("PARTIAL: not all items were read; not comparable with the whole tasks'")
    return lines
