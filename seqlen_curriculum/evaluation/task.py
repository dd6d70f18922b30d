"""What a task is made of: rows of tokens whose last ones are to be predicted, and what becomes of the scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.errors import ConfigError, DataError
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["OVERLAP", "Limits", "Prepared", "Row", "Scores", "Task", "encode", "perplexity", "read_text"]


OVERLAP = 32
"""Megatron's default."""


class Row(NamedTuple):
    """Tokens of which the last ``targets`` are predicted, each from all tokens before it."""

    tokens: IntArray
    """One more than the model reads: the last is a target only."""
    targets: int


class Scores(NamedTuple):
    """What a model makes of rows, in their order."""

    nll: NDArray[np.float64]
    """Negative log likelihood of a row's targets in nats, summed."""
    right: NDArray[np.bool_]
    """Whether every target of a row is the model's first choice."""


@dataclass(frozen=True)
class Limits:
    """How a text is cut into rows, and how many of them are read."""

    seqlen: int
    """Tokens the model reads at once."""
    overlap: int = OVERLAP
    """Targets of each window of running text but the first: Megatron's ``--overlapping-eval``."""
    rows: int | None = None
    """Windows or items to stop after; None for all."""

    def check(self) -> None:
        """Raise ConfigError for an overlap that isn't within a window, or for no rows."""
        if not 1 <= self.overlap <= self.seqlen:
            raise ConfigError(f"--overlap {self.overlap}: give 1 to {self.seqlen}, the tokens the model reads at once")
        if self.rows is not None and self.rows < 1:
            raise ConfigError(f"--limit {self.rows}: give 1 or more, or leave it out to read all")


@dataclass(frozen=True)
class Prepared:
    """A task in tokens."""

    rows: list[Row]
    result: Callable[[Scores], dict[str, Any]]
    """Numbers by name from the scores of ``rows``."""


Task = Callable[[Any, Limits], Prepared]
"""A task whose text is read and checked: (tokenizer, limits) to rows."""


def encode(tokenizer: Any, text: str) -> IntArray:
    """Tokens of ``text`` without special ones around it, as GPT-2 was trained."""
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def perplexity(loss: float) -> float:
    """``exp(loss)``, e**20 at most, as Megatron has it."""
    return math.exp(min(20.0, loss))


def read_text(flag: str, path: Path) -> str:
    """The text of a file. Raises DataError beginning with ``flag``; for bytes that aren't UTF-8 also the line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{flag}: can't be read ({error.strerror}); check the path") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{flag}, line {line}: not UTF-8; fetch the file again") from None
