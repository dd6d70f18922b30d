"""The paper's 11 GPT-3 tasks, or any other, by way of EleutherAI's lm-evaluation-harness (``pip install lm-eval``)."""

from __future__ import annotations

import difflib
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

__all__ = [
    "GPT3_TASKS",
    "describe_end",
    "describe_head",
    "describe_task",
    "evaluate_harness",
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
"""The paper's tasks (Section 5.2) and their names in lm-eval."""
_SEED = 1234  # lm-eval's own, of the examples it shows


def task_names(given: Sequence[str]) -> dict[str, str]:
    """lm-eval's names by ours: ``gpt3`` is the paper's eleven, any other is lm-eval's own. Raises ConfigError."""
    wanted = [name for one in given for name in (GPT3_TASKS if one == ALL else [one])]
    twice = [name for name in wanted if wanted.count(name) > 1]
    if twice:
        raise ConfigError(f"--harness {twice[0]}: is given twice; name each task once")
    return {name: GPT3_TASKS.get(name, name) for name in wanted}


def read_harness_tasks(given: Sequence[str], include: Path | None = None, shots: int = 0) -> dict[str, Any]:
    """lm-eval's task objects by our names, their data read and enough of it for ``shots``. Raises ConfigError or DataError.

    ``include`` is a folder of task files (.yaml) that come before lm-eval's own of the same name: with
    ``dataset_path: json`` and ``dataset_kwargs: {data_files: ...}`` a task reads local files, and nothing is fetched; with
    ``include:`` and the path of lm-eval's own file it keeps its prompts.
    """
    names = task_names(given)
    if include is not None and not any(include.rglob("*.yaml")):
        raise ConfigError(f"--include-path {include}: no folder with task files (.yaml); check the path")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness: needs lm-eval; install it with: pip install 'seqlen-curriculum[eval]'")
    manager = _manager(set(names.values()), include)
    for name, theirs in names.items():
        if theirs not in manager.all_subtasks:
            raise ConfigError(f"--harness {name}: {_no_task(manager, name)}")
    tasks = {name: _read_task(manager, name, theirs) for name, theirs in names.items()}
    for name, task in tasks.items():
        _check_task(name, task, shots)
    return tasks


def _manager(names: set[str], include: Path | None) -> Any:
    """Knows the tasks of ``include`` if those are all, else also lm-eval's 10,000, which takes it seconds to list."""
    from lm_eval.tasks import TaskManager

    if include is None:
        return TaskManager()
    own = TaskManager(include_path=str(include), include_defaults=False)
    return own if names <= set(own.all_tasks) else TaskManager(include_path=str(include))


def _no_task(manager: Any, name: str) -> str:
    if name in [*manager.all_groups, *manager.all_tags]:
        return "is a group of lm-eval's, and groups aren't read; name its tasks, each by itself"
    close = difflib.get_close_matches(name, [ALL, *GPT3_TASKS, *manager.all_subtasks], n=1)
    meant = f"did you mean '{close[0]}'? " if close else ""
    return f"there is no such task; {meant}{ALL} is the paper's eleven, --include-path adds tasks of your own"


def _read_task(manager: Any, name: str, theirs: str) -> Any:
    try:
        (task,) = manager.load([theirs])["tasks"].values()
        next(iter(task.eval_docs))  # some read their data only now
    except Exception as error:  # it runs what the task file names, and fetches
        told = str(error).strip().split("\n")[0]
        raise DataError(
            f"--harness {name}: its data can't be read ({type(error).__name__}: {told}); it is fetched once from the "
            f"network, or give --include-path FOLDER with a task file '{theirs}' that names local files"
        ) from error
    return task


def _check_task(name: str, task: Any, shots: int) -> None:
    if (task.config.generation_kwargs or {}).get("do_sample"):
        raise ConfigError(
            f"--harness {name}: its generation_kwargs ask for random samples (do_sample); only greedy answers are given "
            "here: set it to false in a task file of --include-path, or leave out the task"
        )
    if not shots:
        return
    try:
        task.fewshot_context(next(iter(task.eval_docs)), num_fewshot=shots)
    except (AssertionError, ValueError) as error:  # of lm-eval's samplers
        raise ConfigError(f"--shots {shots}: {name} hasn't that many examples ({error}); give fewer") from error


def evaluate_harness(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    limits: Limits,
    ranks: Ranks,
    batch_tokens: int = BATCH_TOKENS,
    shots: int = 0,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each task's name and metrics once they are known, on every rank; ``shots`` examples stand before each question.

    ``accuracy`` is lm-eval's ``acc`` or ``exact_match``, ``standard_error`` that of a share. ``model`` is in eval mode on
    ``ranks.device``. Raises ConfigError.
    """
    if not tasks:
        return
    from seqlen_curriculum.evaluation.lm_eval_model import HarnessModel  # needs lm-eval

    scorer = HarnessModel(model, tokenizer, limits.seqlen, ranks, batch_tokens)
    for name, task in tasks.items():
        yield name, _evaluate(scorer, name, task, limits.rows, shots)


def _evaluate(scorer: Any, name: str, task: Any, limit: int | None, shots: int) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    start = time.perf_counter()
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=_SEED)
    scorer.name, scorer.cut = name, 0
    found = evaluate(scorer, {"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0, log_samples=False)
    metrics = _metrics(found["results"][task.task_name])
    counts = found["n-samples"][task.task_name]
    numbers = {**metrics, **_accuracy(metrics, counts["effective"]), "items": counts["effective"]}
    partial = counts["effective"] < counts["original"]
    more = {"items_in_all": counts["original"], "requests_cut": scorer.cut, "shots": shots, "partial": partial}
    return {**numbers, **more, "seconds": time.perf_counter() - start}


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": ...}`` to ``{"acc": 0.5}``."""
    parts = {key: key.partition(",")[0] for key in found}
    return {
        name: float(found[key])
        for key, name in parts.items()
        if "," in key and "_stderr" not in name and isinstance(found[key], int | float)
    }


def _accuracy(metrics: Mapping[str, float], items: int) -> dict[str, float]:
    """The share of right answers and its standard error; nothing where the task has none."""
    name = next((name for name in ("acc", "exact_match") if name in metrics), None)
    if name is None:
        return {}
    share = metrics[name]
    return {"accuracy": share, "standard_error": math.sqrt(share * (1 - share) / max(items - 1, 1))}


def describe_head(shots: int) -> str:
    """The head of the table that ``describe_task`` has the lines of and ``describe_end`` the end."""
    return f"{f'lm-eval, {shots} shots':<24}{'accuracy':>10}{'+-':>9}{'items':>9}{'seconds':>9}  others"


def describe_task(name: str, numbers: Mapping[str, Any]) -> str:
    """A task's line."""
    share = f"{numbers['accuracy']:.2%}" if "accuracy" in numbers else ""
    error = f"{numbers['standard_error']:.2%}" if "standard_error" in numbers else ""
    others = {key: value for key, value in numbers.items() if key not in _SHOWN and (key != "requests_cut" or value)}
    told = ", ".join(f"{key} {value:.4g}" for key, value in others.items())
    return f"{name:<24}{share:>10}{error:>9}{numbers['items']:>9,}{numbers['seconds']:>9.1f}  {told}".rstrip()


def describe_end(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines for all tasks together: the mean of accuracies, and what they are not comparable with."""
    lines = []
    shares = [numbers["accuracy"] for numbers in results.values() if "accuracy" in numbers]
    if len(shares) > 1:
        lines.append(f"{'mean of ' + str(len(shares)):<24}{sum(shares) / len(shares):>10.2%}")
    if any(numbers["partial"] for numbers in results.values()):
        lines.append("PARTIAL: not all items were read; not comparable with the whole tasks'")
    return lines


_SHOWN = {"acc", "exact_match", "accuracy", "standard_error", "items", "items_in_all", "shots", "partial", "seconds"}
