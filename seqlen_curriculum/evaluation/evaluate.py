"""Runs tasks on a model: everything is checked and tokenized before the first row is scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.evaluation.distributed import Ranks
from seqlen_curriculum.evaluation.lambada import read_lambada
from seqlen_curriculum.evaluation.scoring import BATCH_TOKENS, score
from seqlen_curriculum.evaluation.task import Prepared, Task
from seqlen_curriculum.evaluation.wikitext import read_wikitext103
from seqlen_curriculum.fields import nearest
from seqlen_curriculum.run_folder.model_folder import sizes_in

__all__ = ["TASKS", "describe", "evaluate", "read_tasks", "window"]

TASKS: dict[str, Callable[[Path], Task]] = {"lambada": read_lambada, "wikitext103": read_wikitext103}


def read_tasks(given: Iterable[str]) -> dict[str, Task]:
    """Tasks from ``NAME=PATH``, their files read. Raises ConfigError for a name, DataError for a file."""
    paths: dict[str, Path] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if name not in TASKS:
            raise ConfigError(f"--task {one}: there is no task '{name}'" + nearest(name, TASKS))
        if not equals or not path:
            raise ConfigError(f"--task {one}: names no file; write --task {name}=PATH")
        if name in paths:
            raise ConfigError(f"--task {one}: {name} is given twice; name each task once")
        paths[name] = Path(path)
    return {name: TASKS[name](path) for name, path in paths.items()}


def window(config: Mapping[str, Any], seq_length: int | None = None) -> int:
    """Tokens read at once: the positions in a model's ``config.json``, or ``seq_length`` at or below them.

    Raises ConfigError.
    """
    positions = sizes_in(config).get("max_position_embeddings")
    seqlen = positions if seq_length is None else seq_length
    if seqlen is None:
        raise ConfigError("--seq-length: this model tells no number of positions; give the length it was trained at")
    if not 1 <= seqlen <= (positions or seqlen):
        most = f"to {positions}, the model's positions" if positions else "or more"
        raise ConfigError(f"--seq-length {seqlen}: give 1 {most}")
    return seqlen


def evaluate(
    model: Any, prepared: Mapping[str, Prepared], ranks: Ranks, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each task's name and numbers once they are known, on every rank; ``model`` is in eval mode on ``ranks.device``.

    Losses are nats a target token. Raises ConfigError for batches that don't fit, CheckpointError for scores that aren't
    finite.
    """
    for name, ready in prepared.items():
        start = time.perf_counter()
        numbers = ready.result(score(model, ready.rows, ranks, batch_tokens, name))
        yield name, {**numbers, "seconds": time.perf_counter() - start}


def describe(name: str, numbers: Mapping[str, Any]) -> str:
    """A task's numbers as text for a terminal."""
    lines = [name]
    if "accuracy" in numbers:
        found = f"{numbers['accuracy']:.2%} ({numbers['right']:,} of {numbers['items']:,} last words)"
        lines.append(f"  accuracy             {found}")
    lines += [
        f"  loss                 {numbers['loss']:.6f} nats a token",
        f"  perplexity           {numbers['perplexity']:.4f} a token",
        f"  adjusted perplexity  {numbers['adjusted_perplexity']:.4f} a word",
        f"  scored               {_scored(numbers)} in {numbers['seconds']:.1f} s",
    ]
    if numbers.get("items_cut"):
        lines.append(
            f"  cut                  {numbers['items_cut']:,} items were longer than the model reads; their ends were kept"
        )
    if numbers["partial"]:
        lines.append(f"  PARTIAL              {_part(numbers)}: not comparable with the whole task's")
    return "\n".join(lines)


def _scored(numbers: Mapping[str, Any]) -> str:
    if "windows" in numbers:
        return f"{numbers['targets']:,} tokens of {numbers['windows']:,} windows, one every {numbers['overlap']:,}"
    return f"{numbers['targets']:,} tokens of {numbers['items']:,} items"


def _part(numbers: Mapping[str, Any]) -> str:
    kind = "windows" if "windows" in numbers else "items"
    return f"only the first {numbers[kind]:,} of {numbers[kind + '_in_all']:,} {kind}"
