"""The samples of one split of a list of corpora.

Sample k of a range is its tokens ``[k * L, k * L + L]``: L inputs and the token after them. Nothing is stored: where a
sample lies follows by arithmetic.

Shapes: B rows, L ``seq_length``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.errors import ConfigError, DataError
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["SPLITS", "Samples", "check_token_ids", "open_split", "split_bounds", "split_ranges"]

SPLITS = ("train", "valid", "test")
_CHECK_TOKENS = 2**24  # at most this many are looked at before a run: 32 MiB of uint16, well under a second
_CHECK_BLOCK = 2**16


class Samples:
    """Samples of ``seq_length`` tokens from ranges ``(corpus, first_token, end_token)``, laid end to end.

    ``num_tokens`` can be trained on: all but the first of each range, which nothing precedes. With ``vocab_size``, reading
    raises ``DataError`` on a token id the model doesn't have. ``seed`` keys the order of those who read in one. A range too
    short for one sample gives none; raises ``DataError`` when no range gives any.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[IndexedCorpus, int, int]],
        seq_length: int,
        seed: int,
        vocab_size: int | None = None,
    ) -> None:
        self.ranges = list(corpora)
        self.seq_length = seq_length
        self.seed = seed
        self.vocab_size = vocab_size
        self._check_ranges()
        tokens = np.array([max(end - first - 1, 0) for _, first, end in self.ranges], dtype=np.int64)
        self._bounds = np.cumsum([0, *(tokens // seq_length)], dtype=np.int64)  # (corpora + 1,) sample ids
        self._rest_bounds = np.cumsum([0, *(tokens % seq_length)], dtype=np.int64)  # (corpora + 1,) places in the rest
        self._firsts = np.array([first for _, first, _ in self.ranges], dtype=np.int64)
        self.num_samples, self.num_tokens = int(self._bounds[-1]), int(tokens.sum())
        self.dtype = np.result_type(*(corpus.dtype for corpus, _, _ in self.ranges))
        if not self.num_samples:
            raise DataError(self._too_short())

    def locate(self, ids: ArrayLike) -> tuple[IntArray, IntArray]:
        """Index of the corpus and token position in it of each sample; two arrays (B,). ``IndexError`` outside."""
        wanted = np.asarray(ids, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.num_samples:
            raise IndexError(f"sample ids {wanted.min()}..{wanted.max()} are outside 0..{self.num_samples - 1}")
        corpus = np.searchsorted(self._bounds, wanted, side="right") - 1
        return corpus, self._firsts[corpus] + (wanted - self._bounds[corpus]) * self.seq_length

    def locate_rest(self, places: ArrayLike) -> tuple[IntArray, IntArray, IntArray]:
        """Range, token position in its corpus, and tokens from there to that range's end, of places in the rest (B,).

        The rest is what no sample holds: fewer than ``seq_length`` tokens at the end of each range, laid end to end.
        """
        wanted = np.asarray(places, dtype=np.int64)
        of_range = np.searchsorted(self._rest_bounds, wanted, side="right") - 1
        counts = np.diff(self._bounds)[of_range]
        start = self._firsts[of_range] + counts * self.seq_length + wanted - self._rest_bounds[of_range]
        return of_range, start, self._rest_bounds[of_range + 1] - wanted

    def read(self, ids: ArrayLike, seqlen: int) -> NDArray[Any]:
        """The first ``seqlen + 1`` tokens of each sample, (B, seqlen + 1) as stored; the rest of it isn't touched."""
        if not 1 <= seqlen <= self.seq_length:
            raise ConfigError(f"seqlen: {seqlen} is outside 1..{self.seq_length}, the seq_length of the data")
        return self.gather(*self.locate(ids), seqlen + 1)

    def gather(self, of_range: IntArray, starts: IntArray, length: int) -> NDArray[Any]:
        """``length`` tokens from ``starts`` (B,) of the corpora of ranges ``of_range`` (B,), as (B, length), checked."""
        if len(self.ranges) == 1:
            tokens = self.ranges[0][0].gather(starts, length)
        else:
            tokens = np.empty((len(starts), length), dtype=self.dtype)
            for one in np.unique(of_range).tolist():
                rows = np.flatnonzero(of_range == one)
                tokens[rows] = self.ranges[one][0].gather(starts[rows], length)
        for row, column in self.foreign(tokens)[:1]:
            name = self.ranges[int(of_range[row])][0].prefix
            assert self.vocab_size is not None
            raise _foreign_id(name, int(starts[row] + column), int(tokens[row, column]), self.vocab_size)
        return tokens

    def foreign(self, tokens: NDArray[Any]) -> IntArray:
        """Indices (count, axes) of the ids in ``tokens`` that the model doesn't have."""
        # Seen as unsigned a negative id is huge: one pass finds both kinds of wrong id.
        unsigned = tokens.view(f"u{tokens.itemsize}")
        if self.vocab_size is None or not tokens.size or int(unsigned.max()) < self.vocab_size:
            return np.empty((0, tokens.ndim), dtype=np.int64)
        return np.argwhere(unsigned >= self.vocab_size)

    def _check_ranges(self) -> None:
        if self.seq_length < 1:
            raise ConfigError(f"seq_length: {self.seq_length} is not valid: it must be 1 or more")
        if not self.ranges:
            raise ConfigError("data: no corpus given; name at least one prefix")
        for corpus, first, end in self.ranges:
            if not 0 <= first <= end <= corpus.num_tokens:
                raise IndexError(f"{corpus.prefix}: tokens {first}..{end} are outside its {corpus.num_tokens}")

    def _too_short(self) -> str:
        found = ", ".join(f"{corpus.prefix} has {end - first} tokens" for corpus, first, end in self.ranges)
        return (
            f"no sample in this split: {found}, and one sample needs seq_length + 1 = {self.seq_length + 1}; "
            "prepare more text, set a smaller seq_length, or give this split a larger share"
        )


def split_bounds(num_documents: int, split: str) -> list[int]:
    """Document bounds ``[0, a, b, num_documents]`` of train, valid and test for weights such as ``"949,50,1"``.

    Rounded as Megatron does (``get_train_valid_test_split_``): each share is rounded by itself and the bounds are
    shifted by what is over or missing at the end. A bound that the shift takes below 0, which leaves Megatron without
    a usable range, is 0 here. Raises ``ConfigError`` for anything but one to three weights of 0 or more, not all 0.
    """
    weights = _weights(split)
    total = sum(weights)
    bounds = [0]
    for weight in weights:
        bounds.append(bounds[-1] + round(weight / total * float(num_documents)))
    shift = bounds[-1] - num_documents
    return [0, *(max(bound - shift, 0) for bound in bounds[1:])]


def _weights(split: str) -> list[float]:
    parts = [part.strip() for part in re.split("[,/]", split)]
    valid = len(parts) <= 3 and all(re.fullmatch(r"\d+\.?\d*|\.\d+", part) for part in parts)
    weights = [float(part) for part in parts] if valid else []
    if not sum(weights):
        raise ConfigError(
            f'split: "{split}" is not valid: expected up to three weights of train, valid and test, not all 0, '
            'such as "949,50,1"'
        )
    return weights + [0.0] * (3 - len(weights))


def split_ranges(
    prefixes: Sequence[str | os.PathLike[str]], split: str, which: str
) -> list[tuple[IndexedCorpus, int, int]]:
    """(corpus, first token, end token) of ``which`` (train, valid or test) split of each corpus, split by itself."""
    if which not in SPLITS:
        raise ConfigError(f"split: there is no {which!r}; valid names: {', '.join(SPLITS)}")
    number = SPLITS.index(which)
    ranges = []
    for prefix in prefixes:
        corpus = IndexedCorpus(prefix)
        first, end = split_bounds(corpus.num_documents, split)[number : number + 2]
        ranges.append((corpus, corpus.document_start(first), corpus.document_start(end)))
    return ranges


def open_split(
    prefixes: Sequence[str | os.PathLike[str]],
    split: str,
    which: str,
    seq_length: int,
    seed: int,
    vocab_size: int | None = None,
) -> Samples:
    """The ``Samples`` of ``which`` (train, valid or test) split of the corpora at ``prefixes``, each split by itself."""
    ranges = split_ranges(prefixes, split, which)
    try:
        return Samples(ranges, seq_length, seed, vocab_size)
    except DataError as error:
        raise DataError(f"data.split {split}, {which}: {error}") from None


def check_token_ids(corpus: IndexedCorpus, vocab_size: int) -> None:
    """Raise ``DataError`` if a token id is outside ``0..vocab_size - 1``.

    Looks at every token of a corpus of up to 2**24, else at evenly spaced blocks of as many, both ends included.
    """
    for start in _block_starts(corpus.num_tokens):
        block = corpus.tokens[start : start + _CHECK_BLOCK]
        if int(block.min()) < 0 or int(block.max()) >= vocab_size:
            column = int(np.flatnonzero((block < 0) | (block >= vocab_size))[0])
            raise _foreign_id(corpus.prefix, start + column, int(block[column]), vocab_size)


def _block_starts(num_tokens: int) -> list[int]:
    """Starts of the blocks to look at; up to 2**24 tokens the spacing is at most a block, so they cover everything."""
    count = min(-(-num_tokens // _CHECK_BLOCK), _CHECK_TOKENS // _CHECK_BLOCK)
    last = max(num_tokens - _CHECK_BLOCK, 0)
    return [number * last // max(count - 1, 1) for number in range(count)]


def _foreign_id(prefix: str, position: int, token: int, vocab_size: int) -> DataError:
    return DataError(
        f"{prefix}: token {position} has id {token}, outside the vocabulary of {vocab_size}; set the model's vocab_size "
        "to the tokenizer's, or prepare the corpus with this model's tokenizer"
    )
