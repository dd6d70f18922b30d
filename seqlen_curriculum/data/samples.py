"""The samples of one split of a list of corpora.

Sample k of a range is its tokens ``[k * L, k * L + L]``: L inputs and the next token. Consecutive samples share one token,
the last target of one and the first input of the next. Positions are computed, so no sample index is stored.

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

__all__ = [
    "SPLITS",
    "Samples",
    "TokenRanges",
    "check_token_ids",
    "open_split",
    "split_bounds",
    "split_documents",
    "split_ranges",
]

SPLITS = ("train", "valid", "test")
_CHECK_TOKENS = 2**24  # at most this many are checked before a run: 32 MiB of uint16, under a second
_CHECK_BLOCK = 2**16


class TokenRanges:
    """Token ranges ``(corpus, first_token, end_token)``, read by position.

    With ``vocab_size``, reading a token id outside the vocabulary raises ``DataError``. ``seed`` keys the order in which a
    run reads them, in rows of up to ``seq_length`` tokens. ``num_samples`` are the rows that they give, ``num_tokens`` the
    targets.
    """

    num_samples: int
    num_tokens: int

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
        self.dtype = np.result_type(*(corpus.dtype for corpus, _, _ in self.ranges))

    def _check_ranges(self) -> None:
        if self.seq_length < 1:
            raise ConfigError(f"seq_length: {self.seq_length} is not valid: it must be 1 or more")
        if not self.ranges:
            raise ConfigError("data: no corpus given; give at least one prefix")
        for corpus, first, end in self.ranges:
            if not 0 <= first <= end <= corpus.num_tokens:
                raise IndexError(f"{corpus.prefix}: tokens {first}..{end} are outside its {corpus.num_tokens}")

    def gather(self, range_index: IntArray, starts: IntArray, length: int) -> NDArray[Any]:
        """Return ``length`` tokens from each of ``starts`` (B,), positions in the corpora of ``range_index`` (B,).

        The result is (B, length), in the narrowest dtype that holds the tokens of all corpora. Raises ``DataError`` for an
        id outside the vocabulary.
        """
        if len(self.ranges) == 1:
            tokens = self.ranges[0][0].gather(starts, length)
        else:
            tokens = np.empty((len(starts), length), dtype=self.dtype)
            for index in np.unique(range_index).tolist():
                rows = np.flatnonzero(range_index == index)
                tokens[rows] = self.ranges[index][0].gather(starts[rows], length)
        for row, column in self.find_invalid_ids(tokens)[:1]:
            prefix = self.ranges[int(range_index[row])][0].prefix
            assert self.vocab_size is not None
            raise _invalid_id(prefix, int(starts[row] + column), int(tokens[row, column]), self.vocab_size)
        return tokens

    def find_invalid_ids(self, tokens: NDArray[Any]) -> IntArray:
        """Return the indices (count, axes) of the ids in ``tokens`` that are outside the vocabulary."""
        # As unsigned numbers negative ids are large (int32 -1 is 4,294,967,295), so one maximum finds both kinds of bad id.
        unsigned = tokens.view(f"u{tokens.itemsize}")
        if self.vocab_size is None or not tokens.size or int(unsigned.max()) < self.vocab_size:
            return np.empty((0, tokens.ndim), dtype=np.int64)
        return np.argwhere(unsigned >= self.vocab_size)


class Samples(TokenRanges):
    """Samples of ``seq_length`` tokens from the ranges ``corpora``, concatenated.

    ``num_tokens`` tokens are targets: all except the first token of each range. A range too short for a sample gives none.
    Raises ``DataError`` if no range gives a sample.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[IndexedCorpus, int, int]],
        seq_length: int,
        seed: int,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(corpora, seq_length, seed, vocab_size)
        # With L = 4, ranges of 5, 1, 3 and 6 tokens have 4, 0, 2 and 5 targets, so 1, 0, 0 and 1 samples. The rests have
        # 0, 0, 2 and 1 targets: bounds 0 1 1 1 2, rest bounds 0 0 0 2 3.
        tokens = np.array([max(end - first - 1, 0) for _, first, end in self.ranges], dtype=np.int64)
        self._bounds = np.cumsum([0, *(tokens // seq_length)], dtype=np.int64)  # (ranges + 1,) sample ids
        self._rest_bounds = np.cumsum(
            [0, *(tokens % seq_length)], dtype=np.int64
        )  # (ranges + 1,) positions in the rest
        self._firsts = np.array([first for _, first, _ in self.ranges], dtype=np.int64)
        self.num_samples, self.num_tokens = int(self._bounds[-1]), int(tokens.sum())
        if not self.num_samples:
            sizes = ", ".join(f"{corpus.prefix} has {end - first} tokens" for corpus, first, end in self.ranges)
            raise DataError(
                f"no sample in this split: {sizes}, and a sample needs seq_length + 1 = {seq_length + 1}; "
                "prepare more text, set a smaller seq_length, or give this split a larger share"
            )

    def locate(self, ids: ArrayLike) -> tuple[IntArray, IntArray]:
        """Return the range index and the token position in its corpus of each sample, (B,) both.

        Raises ``IndexError`` for a sample id outside 0..num_samples - 1.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_samples:
            raise IndexError(f"sample ids {ids.min()}..{ids.max()} are outside 0..{self.num_samples - 1}")
        range_index = np.searchsorted(self._bounds, ids, side="right") - 1
        return range_index, self._firsts[range_index] + (ids - self._bounds[range_index]) * self.seq_length

    def locate_rest(self, positions: ArrayLike) -> tuple[IntArray, IntArray, IntArray]:
        """Return range index, token position, and tokens up to the end of the range, for ``positions`` in the rest, (B,).

        The rest is the concatenation of the targets that don't fill a sample: fewer than ``seq_length`` at the end of each
        range.
        """
        positions = np.asarray(positions, dtype=np.int64)
        range_index = np.searchsorted(self._rest_bounds, positions, side="right") - 1
        num_samples = np.diff(self._bounds)[range_index]
        within = positions - self._rest_bounds[range_index]
        start = self._firsts[range_index] + num_samples * self.seq_length + within
        return range_index, start, self._rest_bounds[range_index + 1] - positions

    def read(self, ids: ArrayLike, seqlen: int) -> NDArray[Any]:
        """Read only the first ``seqlen + 1`` tokens of each sample from the disk; return them, (B, seqlen + 1)."""
        if not 1 <= seqlen <= self.seq_length:
            raise ConfigError(f"seqlen: {seqlen} is outside 1..{self.seq_length}, the seq_length of the data")
        return self.gather(*self.locate(ids), seqlen + 1)


def split_bounds(num_documents: int, split: str) -> list[int]:
    """Return the document bounds ``[0, a, b, num_documents]`` of train, valid and test for weights such as ``"949,50,1"``.

    Rounded as in Megatron (``get_train_valid_test_split_``): each share is rounded separately, then all bounds are shifted
    by the difference at the end. Ten documents split "949,50,1" give shares of 9, 0 and 0 (from 9.49, 0.5, 0.01) and bounds
    0, 9, 9, 9. One document is missing, so they become 0, 10, 10, 10. A bound shifted below 0, which is unusable in
    Megatron, becomes 0 here. Raises ``ConfigError`` unless there are one to three weights of 0 or more, not all 0.
    """
    parts = [part.strip() for part in re.split("[,/]", split)]
    is_valid = len(parts) <= 3 and all(re.fullmatch(r"\d+\.?\d*|\.\d+", part) for part in parts)
    weights = [float(part) for part in parts] if is_valid else []
    total = sum(weights)
    if not total:
        raise ConfigError(
            f'split: "{split}" is not valid: expected up to three weights of train, valid and test, not all 0, '
            'such as "949,50,1"'
        )
    bounds = [0]
    for weight in [*weights, 0.0, 0.0][:3]:
        bounds.append(bounds[-1] + round(weight / total * float(num_documents)))
    shift = bounds[-1] - num_documents
    return [0, *(max(bound - shift, 0) for bound in bounds[1:])]


def split_documents(
    prefixes: Sequence[str | os.PathLike[str]], split: str, which: str
) -> list[tuple[IndexedCorpus, int, int]]:
    """Return (corpus, first document, end document) of split ``which`` (train, valid or test) of each corpus."""
    if which not in SPLITS:
        raise ConfigError(f"split: there is no {which!r}; valid names: {', '.join(SPLITS)}")
    number, ranges = SPLITS.index(which), []
    for prefix in prefixes:
        corpus = IndexedCorpus(prefix)
        first, end = split_bounds(corpus.num_documents, split)[number : number + 2]
        ranges.append((corpus, first, end))
    return ranges


def split_ranges(
    prefixes: Sequence[str | os.PathLike[str]], split: str, which: str
) -> list[tuple[IndexedCorpus, int, int]]:
    """Return (corpus, first token, end token) of split ``which`` (train, valid or test) of each corpus."""
    documents = split_documents(prefixes, split, which)
    return [(corpus, corpus.document_start(first), corpus.document_start(end)) for corpus, first, end in documents]


def open_split(
    prefixes: Sequence[str | os.PathLike[str]],
    split: str,
    which: str,
    seq_length: int,
    seed: int,
    vocab_size: int | None = None,
) -> Samples:
    """Return the ``Samples`` of split ``which`` (train, valid or test); each corpus is split separately."""
    ranges = split_ranges(prefixes, split, which)
    try:
        return Samples(ranges, seq_length, seed, vocab_size)
    except DataError as error:
        raise DataError(f"data.split {split}, {which}: {error}") from None


def check_token_ids(corpus: IndexedCorpus, vocab_size: int) -> None:
    """Raise ``DataError`` if a token id is outside ``0..vocab_size - 1``.

    Checks every token of a corpus of up to 2**24 tokens, else 2**24 of them in evenly spaced blocks, including both ends.
    """
    for start in _block_starts(corpus.num_tokens):
        block = corpus.block(start, _CHECK_BLOCK)
        if int(block.min()) < 0 or int(block.max()) >= vocab_size:
            column = int(np.flatnonzero((block < 0) | (block >= vocab_size))[0])
            raise _invalid_id(corpus.prefix, start + column, int(block[column]), vocab_size)


def _block_starts(num_tokens: int) -> list[int]:
    """Return the starts of the blocks to check, without gaps up to 2**24 tokens."""
    # 150,000 tokens: 3 blocks of 65,536, the last from 84,464; starts 0, 42,232, 84,464. At most 256 blocks.
    count = min(-(-num_tokens // _CHECK_BLOCK), _CHECK_TOKENS // _CHECK_BLOCK)
    last = max(num_tokens - _CHECK_BLOCK, 0)
    return [number * last // max(count - 1, 1) for number in range(count)]


def _invalid_id(prefix: str, position: int, token: int, vocab_size: int) -> DataError:
    return DataError(
        f"{prefix}: token {position} has id {token}, outside the vocabulary of {vocab_size}; set the model's vocab_size "
        "to the tokenizer's, or prepare the corpus with this model's tokenizer"
    )
