"""LAMBADA as in Megatron with ``--strict-lambada`` (tasks/zeroshot_gpt): greedy accuracy of a passage's last word.

The last word is split off before tokenization, and counts only if all its tokens are right. A passage longer than the
context loses its beginning, and such items are counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqlen_curriculum.errors import DataError
from seqlen_curriculum.evaluation.task import Limits, Row, Scores, Task, encode, perplexity, read_text

__all__ = ["Item", "TokenizedLambada", "read_lambada", "split_last_word", "tokenize"]


class Item(NamedTuple):
    """A passage split before its last word."""

    where: str
    """File and line."""
    context: str
    target: str
    """A space and the last word."""


@dataclass(frozen=True)
class TokenizedLambada:
    """A tokenized task, with one row per item."""

    rows: list[Row]
    items_in_all: int
    items_cut: int
    """Items that lost their beginning."""

    def result(self, scores: Scores) -> dict[str, Any]:
        """Return accuracy over items, loss over tokens, and perplexity per token and per word."""
        items, targets = len(self.rows), sum(row.targets for row in self.rows)
        right, nll = int(np.sum(scores.right)), float(np.sum(scores.nll))
        return {
            "accuracy": right / items,
            "right": right,
            "loss": nll / targets,
            "perplexity": perplexity(nll / targets),
            "adjusted_perplexity": perplexity(nll / items),  # one word per item
            "targets": targets,
            "items": items,
            "items_in_all": self.items_in_all,
            "items_cut": self.items_cut,
            "partial": items < self.items_in_all,
        }


def read_lambada(path: Path) -> Task:
    """Read the task from JSON lines of ``{"text": ...}``. Raises DataError that names the line."""
    flag = f"--task lambada={path}"
    lines = read_text(flag, path).split("\n")
    items = [_read_item(f"{flag}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise DataError(f"{flag}: is empty; give LAMBADA's test set, one {{'text': ...}} per line")
    return partial(tokenize, items)


def _read_item(where: str, line: str) -> Item:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: not an object with a text ({error}); each line is {{'text': ...}}") from None
    if not isinstance(text, str):
        raise DataError(f"{where}: its text is {text!r}, not a string; each line is {{'text': ...}}")
    context, target = split_last_word(text)
    if not context:
        raise DataError(f"{where}: {text!r} has no context before its last word; remove the line")
    return Item(where, context, target)


def split_last_word(text: str) -> tuple[str, str]:
    """Split ``"He said: yes"`` into ``("He said:", " yes")``: the text before the last word, and a space with the word.

    Words are separated by any white space. Without words both parts are empty or white space.
    """
    # In "no, no" the word "no" occurs at 0 and at 4; rfind returns 4.
    word = (text.split() or [""])[-1]
    return text[: text.rfind(word)].strip(), " " + word


def tokenize(items: Sequence[Item], tokenizer: Any, limits: Limits) -> TokenizedLambada:
    """Tokenize the first ``limits.limit`` items. Raises DataError for a word longer than the context."""
    rows, items_cut = [], 0
    for item in items[: limits.limit]:
        context, target = encode(tokenizer, item.context), encode(tokenizer, item.target)
        if len(target) > limits.seqlen:
            raise DataError(
                f"{item.where}: the last word {item.target!r} is {len(target)} tokens, but the context is {limits.seqlen}; "
                "raise --seq-length or remove the line"
            )
        # The model reads all tokens except the last: with a seqlen of 1024, a row has up to 1025 tokens.
        row_tokens = limits.seqlen + 1
        items_cut += len(context) + len(target) > row_tokens
        rows.append(Row(np.concatenate([context, target])[-row_tokens:], len(target)))
    return TokenizedLambada(rows, len(items), items_cut)
