"""LAMBADA, strict, as Megatron measures it (tasks/zeroshot_gpt): is the last word of a passage the model's first choice?

The last word is split off the text before anything is tokenized, and counts only if every one of its tokens is right.
A passage that is longer than the model reads loses its beginning; such items are counted.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqlen_curriculum.errors import DataError
from seqlen_curriculum.evaluation.task import Limits, Prepared, Row, Scores, Task, encode, perplexity, read_text

__all__ = ["Item", "read_lambada", "split_last_word"]


class Item(NamedTuple):
    """A passage split for the task."""

    where: str
    """File and line."""
    context: str
    target: str
    """A space and the last word."""


def split_last_word(text: str) -> tuple[str, str]:
    """``"He said: yes"`` to ``("He said:", " yes")``: what is before the last word, and a space with the word.

    The word is what is last after splitting at any white space, taken where it occurs last. Both are empty or nearly so
    where the text has no words.
    """
    word = (text.split() or [""])[-1]
    return text[: text.rfind(word)].strip(), " " + word


def read_lambada(path: Path) -> Task:
    """The task on JSON lines of ``{"text": ...}``. Raises DataError naming the line that can't be used."""
    flag = f"--task lambada={path}"
    lines = read_text(flag, path).split("\n")
    items = [_item(f"{flag}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise DataError(f"{flag}: is empty; give LAMBADA's test set, a {{'text': ...}} a line")
    return partial(_prepare, items)


def _item(where: str, line: str) -> Item:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: no object with a text ({error}); each line is {{'text': ...}}") from None
    if not isinstance(text, str):
        raise DataError(f"{where}: its text is {text!r}, not a string; each line is {{'text': ...}}")
    context, target = split_last_word(text)
    if not context:
        raise DataError(f"{where}: {text!r} has nothing before its last word to predict it from; remove the line")
    return Item(where, context, target)


def _prepare(items: list[Item], tokenizer: Any, limits: Limits) -> Prepared:
    rows, cut = [], 0
    for item in items[: limits.rows]:
        row = _row(item, tokenizer, limits.seqlen)
        cut += len(row.tokens) > limits.seqlen + 1
        rows.append(Row(row.tokens[-limits.seqlen - 1 :], row.targets))
    facts = {"items": len(rows), "items_in_all": len(items), "items_cut": cut}
    return Prepared(rows, partial(_result, rows, facts))


def _row(item: Item, tokenizer: Any, seqlen: int) -> Row:
    context, target = encode(tokenizer, item.context), encode(tokenizer, item.target)
    if len(target) > seqlen:
        raise DataError(
            f"{item.where}: the last word {item.target!r} is {len(target)} tokens, the model reads {seqlen} at once; "
            "raise --seq-length or remove the line"
        )
    return Row(np.concatenate([context, target]), len(target))


def _result(rows: list[Row], facts: dict[str, int], scores: Scores) -> dict[str, Any]:
    targets, nll = sum(row.targets for row in rows), float(np.sum(scores.nll))
    right = int(np.sum(scores.right))
    return {
        "accuracy": right / len(rows),
        "right": right,
        "loss": nll / targets,
        "perplexity": perplexity(nll / targets),
        "adjusted_perplexity": perplexity(nll / len(rows)),
        "targets": targets,
        **facts,
        "partial": facts["items"] < facts["items_in_all"],
    }
