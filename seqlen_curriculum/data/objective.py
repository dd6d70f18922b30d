"""The objective: a model predicts the next tokens of a row, or masked ones (Devlin et al. 2019). Needs no torch.

Shapes: ``B`` rows, ``S`` tokens of a row, ``M`` masked targets of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["Masking", "NextToken", "Objective"]

Rows: TypeAlias = tuple[NDArray[Any], NDArray[Any]]
"""Inputs (B, S), and the targets in the form that the model's forward takes."""

_EVALUATION = 0, 0
"""Seed and step that key the masks of evaluations, the same for runs of any seed. Steps of training start at 1."""


class NextToken:
    """The causal objective: every token of a row predicts the next one."""

    facts: ClassVar[dict[str, str]] = {}
    """Additional values of an evaluation's record in the run log."""

    def of_step(self, inputs: NDArray[Any], targets: NDArray[Any], _step: int, _first_row: int) -> Rows:
        """Return the training rows of a step, unchanged: targets (B, S) follow the inputs."""
        return inputs, targets

    def of_samples(self, tokens: NDArray[Any], _ids: IntArray) -> Rows:
        """Return the evaluation rows of whole samples (B, S + 1)."""
        return tokens[:, :-1], tokens[:, 1:]

    def target_shape(self, rows: int, seqlen: int) -> tuple[int, ...]:
        """Return the shape of the targets of ``rows`` rows."""
        return rows, seqlen


@dataclass(frozen=True)
class Masking:
    """The masked objective: a row predicts some of its tokens from all others.

    A row of S tokens has exactly ``round(probability * S)`` targets, at least 1, as in BERT's own preparation of data. All
    rows of a step have equally many, so the mean of the means of micro-batches and ranks is the mean over all targets of
    the step, for any number of ranks. 80 % of the targets are replaced by the mask token, 10 % by a random token, and 10 %
    are kept. Special tokens, among them those that end documents, are neither targets nor drawn.

    A mask is a function of ``seed``, step and row alone, so it needs no state. Targets are (B, 2, M): the positions in the
    row, ascending, and the original tokens there.
    """

    seed: int
    probability: float
    mask_id: int
    special_ids: tuple[int, ...]
    """Ids that are never predicted, with ``mask_id``."""
    vocab_size: int
    facts: ClassVar[dict[str, str]] = {"objective": "masked"}

    def of_step(self, inputs: NDArray[Any], _targets: NDArray[Any], step: int, first_row: int) -> Rows:
        """Return the masked rows of a step, given its ``inputs`` (B, S) from row ``first_row`` on."""
        return self.mask(inputs, (self.seed, step), np.arange(first_row, first_row + len(inputs)))

    def of_samples(self, tokens: NDArray[Any], ids: IntArray) -> Rows:
        """Return the masked evaluation rows of samples (B, S + 1). A sample has the same mask in every evaluation."""
        return self.mask(tokens[:, :-1], _EVALUATION, ids)

    def target_shape(self, rows: int, seqlen: int) -> tuple[int, ...]:
        """Return the shape of the targets of ``rows`` rows."""
        return rows, 2, self.targets_per_row(seqlen)

    def targets_per_row(self, seqlen: int) -> int:
        """Return M for rows of ``seqlen`` tokens."""
        return max(1, round(self.probability * seqlen))

    def mask(self, tokens: NDArray[Any], key: tuple[int, int], rows: IntArray) -> Rows:
        """Return masked inputs (B, S) and targets (B, 2, M), both int64, for ``tokens`` (B, S), which have numbers ``rows``.

        A row with fewer than M ordinary tokens repeats them as targets. A row without any has special tokens as targets,
        which it keeps.
        """
        originals = tokens.astype(np.int64)
        drawn = _draws(key, rows, tokens.shape[1])
        is_special = self._is_special[originals]  # (B, S)
        # The order of random numbers is a random order of positions. Those of special tokens are the largest, so they are
        # last; the sort is stable, because they are equal.
        keys = np.where(is_special, np.iinfo(np.uint64).max, drawn[:, 0] >> np.uint64(1))
        order = np.argsort(keys, axis=1, kind="stable")  # (B, S)
        ordinary = np.maximum(np.count_nonzero(~is_special, axis=1), 1)  # (B,)
        picks = (
            np.arange(self.targets_per_row(tokens.shape[1])) % ordinary[:, None]
        )  # (B, M): 0 1 2 ..., or 0 1 0 1 ...
        positions = np.sort(np.take_along_axis(order, picks, axis=1), axis=1)  # (B, M)
        labels = np.take_along_axis(originals, positions, axis=1)
        replacements = np.where(
            np.take_along_axis(is_special, positions, axis=1),
            labels,
            self._replacements(labels, np.take_along_axis(drawn[:, 1], positions, axis=1)),
        )
        inputs = originals.copy()
        np.put_along_axis(inputs, positions, replacements, axis=1)
        return inputs, np.stack([positions, labels], axis=1)

    def _replacements(self, labels: IntArray, drawn: NDArray[np.uint64]) -> IntArray:
        """Return what the model reads in place of ``labels``, of the same shape."""
        # The last decimal digit decides: 0 to 7 mask, 8 random, 9 keep. The other digits are an independent number.
        tens, digit = np.divmod(drawn, np.uint64(10))
        random = self._ordinary_ids[(tens % np.uint64(len(self._ordinary_ids))).astype(np.int64)]
        return np.where(digit < 8, self.mask_id, np.where(digit == 8, random, labels))

    @cached_property
    def _is_special(self) -> NDArray[np.bool_]:
        table = np.zeros(self.vocab_size, dtype=bool)
        table[[self.mask_id, *self.special_ids]] = True
        return table

    @cached_property
    def _ordinary_ids(self) -> IntArray:
        return np.flatnonzero(~self._is_special)


def _draws(key: tuple[int, int], rows: IntArray, seqlen: int) -> NDArray[np.uint64]:
    """Return two random numbers per token, (B, 2, S), by Philox with the key (seed, step) and the row as counter."""
    # A row's counter starts at (0, row, 0, 0), least significant word first, so it has 2**64 blocks of four numbers. numpy
    # guarantees the raw numbers of a bit generator in all versions, unlike those of a Generator.
    counters = np.zeros((len(rows), 4), dtype=np.uint64)
    counters[:, 1] = rows
    raw = [Philox(key=np.array(key, np.uint64), counter=counter).random_raw(2 * seqlen) for counter in counters]
    return np.reshape(raw, (len(rows), 2, seqlen))


Objective: TypeAlias = NextToken | Masking
