"""The interface of an evaluation task: rows of tokens whose last tokens are predicted, and results from their scores."""

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
    """Tokens; the last ``targets`` of them are predicted, each from all tokens before it."""

    tokens: IntArray
    """One more than the model reads, because the last token is only a target."""
    targets: int


class Scores(NamedTuple):
    """The scores of rows, in the order of the rows."""

    nll: NDArray[np.float64]
    """Negative log likelihood in nats, summed over a row's targets."""
    right: NDArray[np.bool_]
    """True if every target of a row is the greedy choice."""


class Limits(Flags):
    """The limits for splitting a text into rows. Raises ConfigError for values out of range."""

    seqlen: int = Field(ge=1)
    """Context length in tokens."""
    overlap: int | None = Field(default=None, ge=1)
    """Targets of each window of running text except the first (Megatron's ``--overlapping-eval``). None: see ``stride``."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of windows or items; None for all."""

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
        """Return the task's results by name, from the scores of ``rows``."""


Task = Callable[[Any, Limits], TokenizedTask]
"""Function from tokenizer and limits to a tokenized task, whose text is already read and checked."""


def encode(tokenizer: Any, text: str) -> IntArray:
    """Return the tokens of ``text`` without special tokens, as in the training of GPT-2."""
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, at most e**20 = 485,165,195, which is Megatron's limit."""
    return math.exp(min(20.0, loss))


def read_text(flag: str, path: Path) -> str:
    """Read a UTF-8 text file without its byte order mark, with ``\\n`` as the end of every line.

    So the same text written on Windows gets the same scores. Raises DataError with ``flag`` and the line of an invalid byte.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{flag}: can't be read ({error.strerror}); check the path") from None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{flag}, line {line}: not UTF-8; download the file again") from None
