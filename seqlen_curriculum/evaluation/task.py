"""The parts of an evaluation task: rows of tokens of which the last ones are predicted, and numbers from their scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from seqlen_curriculum.errors import DataError
from seqlen_curriculum.fields import Flags
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["Limits", "Row", "Scores", "Task", "TokenizedTask", "encode", "perplexity", "read_text"]


_OVERLAP = 32  # Megatron's default


class Row(NamedTuple):
    """Tokens of which the last ``targets`` are predicted, each from all tokens before it."""

    tokens: IntArray
    """One more than the model reads: the last is a target only."""
    targets: int


class Scores(NamedTuple):
    """The scores of rows, in the order of the rows."""

    nll: NDArray[np.float64]
    """Negative log likelihood in nats, summed over a row's targets."""
    right: NDArray[np.bool_]
    """Whether every target of a row is the model's first choice."""


class Limits(Flags):
    """How a text is split into rows, and how many of them are read. Raises ConfigError for values out of range."""

    seqlen: int = Field(ge=1)
    """Tokens the model reads at once."""
    overlap: int | None = Field(default=None, ge=1)
    """Targets of each window of running text but the first: Megatron's ``--overlapping-eval``. None: see ``stride``."""
    limit: int | None = Field(default=None, ge=1)
    """Windows or items to stop after; None for all."""

    @property
    def stride(self) -> int:
        """Tokens from one window to the next: ``overlap``, by default 32 or the whole window if that is shorter."""
        return min(_OVERLAP, self.seqlen) if self.overlap is None else self.overlap

    @model_validator(mode="after")
    def _stride_within_window(self) -> Limits:
        if self.stride > self.seqlen:
            raise ValueError(
                f"--overlap: {self.overlap} is above the {self.seqlen} tokens read at once; give 1 to {self.seqlen}"
            )
        return self


class TokenizedTask(Protocol):
    """A task whose rows can be scored."""

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order in which ``result`` expects their scores."""

    def result(self, scores: Scores) -> dict[str, Any]:
        """Return the task's numbers by name, from the scores of ``rows``."""


Task = Callable[[Any, Limits], TokenizedTask]
"""A task whose text is read and checked; called with a tokenizer and limits."""


def encode(tokenizer: Any, text: str) -> IntArray:
    """Return the tokens of ``text`` without special ones around it, as GPT-2 was trained."""
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, at most e**20 = 485,165,195, which is Megatron's limit."""
    return math.exp(min(20.0, loss))


def read_text(flag: str, path: Path) -> str:
    """Read a text file. Raises DataError that begins with ``flag``, and names the line of bytes that aren't UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{flag}: can't be read ({error.strerror}); check the path") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{flag}, line {line}: not UTF-8; fetch the file again") from None
