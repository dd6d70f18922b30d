"""WikiText-103's adjusted perplexity, as in Megatron (tasks/zeroshot_gpt).

The words of the file, split at single spaces, are counted. Then the text is detokenized and encoded. Perplexity per token
depends on the tokenizer. The adjusted perplexity divides the same loss by the number of words, so it is comparable between
vocabularies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqlen_curriculum.errors import DataError
from seqlen_curriculum.evaluation.task import Limits, Row, Scores, Task, encode, perplexity, read_text

__all__ = ["TokenizedWikiText", "Window", "detokenize", "read_wikitext103", "tokenize", "windows"]

_SPACED_MARKS = {f" {mark} ": f"{mark} " for mark in ":;.!?,"}
_JOINERS = {f" @{mark}@ ": mark for mark in "-,."}
# Each removes the spaces inside a pair. They are applied in this order.
_PAIRS = [
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
]
# Megatron's pattern contains the slashes of another regex syntax and matches no real text. It is kept for equal results.
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
    """Tokens ``[start, stop)`` of a text; the last ``targets`` of them are scored."""

    start: int
    stop: int
    targets: int


@dataclass(frozen=True)
class TokenizedWikiText:
    """A tokenized task, with one row per window."""

    rows: list[Row]
    words: int
    targets_in_all: int
    overlap: int
    windows_in_all: int

    def result(self, scores: Scores) -> dict[str, Any]:
        """Return loss and perplexity per token, and the adjusted perplexity per word."""
        targets = sum(row.targets for row in self.rows)
        loss = float(np.sum(scores.nll)) / targets
        # WikiText-103's test set in GPT-2's tokens: 270,329 targets for 245,566 words. A loss of 3 nats per token is
        # 3 * 270,329 / 245,565 = 3.30 nats per word. As in Megatron, the first token and the first word don't count.
        tokens_per_word = self.targets_in_all / (self.words - 1)
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "adjusted_perplexity": perplexity(loss * tokens_per_word),
            "targets": targets,
            "words": self.words,
            "targets_in_all": self.targets_in_all,
            "overlap": self.overlap,
            "windows": len(self.rows),
            "windows_in_all": self.windows_in_all,
            "partial": len(self.rows) < self.windows_in_all,
        }


def read_wikitext103(path: Path) -> Task:
    """Read the task from a ``.tokens`` file of WikiText. Raises DataError for an unreadable file or under two words."""
    text = read_text(f"--task wikitext103={path}", path)
    words = len(text.strip().split(" "))  # "\n = Title = \n" is counted as Megatron does: "=", "Title", "="
    if words < 2:
        raise DataError(f"--task wikitext103={path}: has {words} words; give the file wiki.test.tokens of WikiText-103")
    return partial(tokenize, path, detokenize(text), words)


def detokenize(text: str) -> str:
    """Convert ``"a 5 @-@ star film ."`` to ``"a 5-star film ."``, with Megatron's rules in Megatron's order."""
    text = _SLASHED[0].sub(_SLASHED[1], text.replace("s '", "s'"))
    text = _replace(text, _JOINERS | _SPACED_MARKS)
    for pattern, inside in _PAIRS:
        text = pattern.sub(inside, text)
    return _replace(text, _REST)


def _replace(text: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def tokenize(path: Path, text: str, words: int, tokenizer: Any, limits: Limits) -> TokenizedWikiText:
    """Tokenize ``text`` and split it into windows. Raises DataError for a text of a single token."""
    tokens = encode(tokenizer, text)
    if len(tokens) < 2:
        raise DataError(f"--task wikitext103={path}: has {len(tokens)} token; give a longer text")
    all_windows = windows(len(tokens), limits.seqlen, limits.stride)
    rows = [Row(tokens[window.start : window.stop], window.targets) for window in all_windows[: limits.limit]]
    return TokenizedWikiText(rows, words, len(tokens) - 1, limits.stride, len(all_windows))


def windows(tokens: int, seqlen: int, overlap: int) -> list[Window]:
    """Return windows of ``seqlen + 1`` tokens, one every ``overlap`` tokens.

    All targets of the first window and the last ``overlap`` targets of each other window are scored, so each of the
    ``tokens - 1`` targets is scored once. As in Megatron there is one window per ``overlap`` targets, although the last
    ``ceil(seqlen / overlap) - 1`` windows have no targets left.
    """
    # 11 tokens, seqlen 4, overlap 2:  start  0: tokens 0-4, targets 1-4     start 6: tokens 6-10, targets 9-10
    #                                  start  2: tokens 2-6, targets 5-6     start 8: tokens 8-10, none left
    #                                  start  4: tokens 4-8, targets 7-8
    all_windows = []
    for start in range(0, max(tokens - 1, 1), overlap):
        stop = min(start + seqlen + 1, tokens)
        first_new_target = start + 1 if start == 0 else start + seqlen - overlap + 1
        all_windows.append(Window(start, stop, max(stop - first_new_target, 0)))
    return all_windows
