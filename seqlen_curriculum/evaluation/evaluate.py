"""Evaluation of tasks on a model. Everything is checked and tokenized before the first row is scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.evaluation.distributed import Ranks
from seqlen_curriculum.evaluation.lambada import read_lambada
from seqlen_curriculum.evaluation.scoring import BATCH_TOKENS, score
from seqlen_curriculum.evaluation.task import Task, TokenizedTask
from seqlen_curriculum.evaluation.wikitext import read_wikitext103
from seqlen_curriculum.fields import nearest
from seqlen_curriculum.run_folder.model_folder import sizes_in

__all__ = ["TASKS", "describe", "evaluate", "evaluation_seqlen", "read_tasks"]

TASKS: dict[str, Callable[[Path], Task]] = {"lambada": read_lambada, "wikitext103": read_wikitext103}


def read_tasks(arguments: Iterable[str]) -> dict[str, Task]:
    """Read the files of tasks given as ``NAME=PATH``. Raises ConfigError for a bad name, DataError for a bad file."""
    paths: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if name not in TASKS:
            raise ConfigError(f"--task {argument}: there is no task '{name}'" + nearest(name, TASKS))
        if not equals or not path:
            raise ConfigError(f"--task {argument}: no file given; write --task {name}=PATH")
        if name in paths:
            raise ConfigError(f"--task {argument}: {name} is given twice; give each task once")
        paths[name] = Path(path)
    return {name: TASKS[name](path) for name, path in paths.items()}


def evaluation_seqlen(config: Mapping[str, Any], seq_length: int | None = None) -> int:
    """Return the context length of an evaluation: ``seq_length`` if given, else the positions in ``config.json``.

    Raises ConfigError for a ``seq_length`` above the positions, or if neither is known.
    """
    positions = sizes_in(config).get("max_position_embeddings")
    seqlen = positions if seq_length is None else seq_length
    if seqlen is None:
        raise ConfigError(
            "--seq-length: the model's config.json has no number of positions; give the length it was trained at"
        )
    if not 1 <= seqlen <= (positions or seqlen):
        valid = f"1 to {positions}, the model's positions" if positions else "1 or more"
        raise ConfigError(f"--seq-length {seqlen}: give {valid}")
    return seqlen


def evaluate(
    model: Any, tasks: Mapping[str, TokenizedTask], ranks: Ranks, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and results of each task, on every rank.

    ``model`` is in eval mode on ``ranks.device``. Losses are in nats per target token. Raises ConfigError for batches that
    don't fit in memory, CheckpointError for scores that aren't finite.
    """
    for name, task in tasks.items():
        start = time.perf_counter()
        numbers = task.result(score(model, task.rows, ranks, batch_tokens, name))
        yield name, {**numbers, "seconds": time.perf_counter() - start}


def describe(name: str, numbers: Mapping[str, Any]) -> str:
    """Format the results of a task for a terminal."""
    if "windows" in numbers:
        unit, rows = "windows", f"{numbers['windows']:,} windows, one every {numbers['overlap']:,}"
    else:
        unit, rows = "items", f"{numbers['items']:,} items"
    lines = [name]
    if "accuracy" in numbers:
        right = f"{numbers['right']:,} of {numbers['items']:,} last words"
        lines.append(f"  accuracy             {numbers['accuracy']:.2%} ({right})")
    lines += [
        f"  loss                 {numbers['loss']:.6f} nats/token",
        f"  perplexity           {numbers['perplexity']:.4f} per token",
        f"  adjusted perplexity  {numbers['adjusted_perplexity']:.4f} per word",
        f"  scored               {numbers['targets']:,} tokens of {rows} in {numbers['seconds']:.1f} s",
    ]
    if numbers.get("items_cut"):
        lines.append(
            f"  cut                  {numbers['items_cut']:,} items were longer than the context; their ends were kept"
        )
    if numbers["partial"]:
        part = f"only the first {numbers[unit]:,} of {numbers[unit + '_in_all']:,} {unit}"
        lines.append(f"  PARTIAL              {part}: not comparable with the whole task's")
    return "\n".join(lines)
