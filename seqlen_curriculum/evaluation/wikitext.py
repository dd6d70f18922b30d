"""WikiText-103's adjusted perplexity as Megatron measures it (tasks/zeroshot_gpt).

The file's words, as split at single spaces, are counted; then its text is brought back to how people write it and
tokenized once. Perplexity a token depends on the tokenizer; the adjusted one spreads the same loss over the words, so it
is comparable between vocabularies, those of bytes included.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqlen_curriculum.errors import DataError
from seqlen_curriculum.evaluation.task import Limits, Prepared, Row, Scores, Task, encode, perplexity, read_text

__all__ = ["Window", "detokenize", "read_wikitext103", "windows"]

_SPACED_MARKS = {f" {mark} ": f"{mark} " for mark in ":;.!?,"}
_JOINERS = {f" @{mark}@ ": mark for mark in "-,."}
# Each takes the spaces off the inside of a pair; they run in this order, each on what the one before left.
_PAIRS = [
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
]
# Megatron's pattern has the slashes of another language in it, so it meets no real text; kept for the very same result.
_SLASHED = (re.compile(r"/' [0-9]/"), "/'[0-9]/")
_REST = {
    "= = = =": "====",
    "= = =": "===",
    "= =": "==",
    " \N{DEGREE SIGN} ": "\N{DEGREE SIGN}",
    " \n": "\n",
    "\n ": "\n",
    " N ": " 1 ",
    " 's": "'s",
}


class Window(NamedTuple):
    """Tokens ``[start, stop)`` of a text, of which the last ``targets`` are scored."""

    start: int
    stop: int
    targets: int


def detokenize(text: str) -> str:
    """WikiText as running text: ``"a 5 @-@ star film ."`` to ``"a 5-star film ."``; Megatron's rules in Megatron's order."""
    text = _SLASHED[0].sub(_SLASHED[1], text.replace("s '", "s'"))
    text = _replace(text, _JOINERS | _SPACED_MARKS)
    for pattern, inside in _PAIRS:
        text = pattern.sub(inside, text)
    return _replace(text, _REST)


def _replace(text: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def windows(tokens: int, seqlen: int, overlap: int) -> list[Window]:
    """Windows of ``seqlen + 1`` tokens, one every ``overlap``; all targets of the first count, then the last ``overlap``.

    Each of the ``tokens - 1`` targets counts once. As in Megatron there is one for every ``overlap`` targets, though the
    last ``ceil(seqlen / overlap) - 1`` reach past the end and have nothing left to score.
    """
    starts = range(0, max(tokens - 1, 1), overlap)
    return [_window(start, tokens, seqlen, overlap) for start in starts]


def _window(start: int, tokens: int, seqlen: int, overlap: int) -> Window:
    stop = min(start + seqlen + 1, tokens)
    first = start + 1 if start == 0 else start + seqlen - overlap + 1  # the first target that no earlier window had
    return Window(start, stop, max(stop - first, 0))


def read_wikitext103(path: Path) -> Task:
    """The task on a ``.tokens`` file of WikiText. Raises DataError for one that can't be read or has under two words."""
    text = read_text(f"--task wikitext103={path}", path)
    words = len(text.strip().split(" "))
    if words < 2:
        raise DataError(f"--task wikitext103={path}: has {words} words; give the file wiki.test.tokens of WikiText-103")
    return partial(_prepare, path, detokenize(text), words)


def _prepare(path: Path, text: str, words: int, tokenizer: Any, limits: Limits) -> Prepared:
    tokens = encode(tokenizer, text)
    if len(tokens) < 2:
        raise DataError(f"--task wikitext103={path}: is {len(tokens)} token to this tokenizer; give a longer text")
    cut = windows(len(tokens), limits.seqlen, limits.overlap)
    rows = [Row(tokens[window.start : window.stop], window.targets) for window in cut[: limits.rows]]
    facts = {"words": words, "targets_in_all": len(tokens) - 1, "overlap": limits.overlap}
    facts |= {"windows": len(rows), "windows_in_all": len(cut)}
    return Prepared(rows, partial(_result, rows, facts))


def _result(rows: list[Row], facts: dict[str, int], scores: Scores) -> dict[str, Any]:
    targets = sum(row.targets for row in rows)
    loss = float(np.sum(scores.nll)) / targets
    tokens_a_word = facts["targets_in_all"] / (facts["words"] - 1)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "adjusted_perplexity": perplexity(loss * tokens_a_word),
        "targets": targets,
        **facts,
        "partial": facts["windows"] < facts["windows_in_all"],
    }
