"""Turns pieces of documents into tokens on any number of processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from seqlen_curriculum.data.documents import Part, Piece, parts
from seqlen_curriculum.data.tokenizer import end_of_text_id, vocab_size
from seqlen_curriculum.data.writer import token_dtype
from seqlen_curriculum.errors import DataError

__all__ = ["Encoded", "Encoder", "encode"]


class Encoded(NamedTuple):
    """The tokens of one batch of pieces."""

    tokens: NDArray[Any]  # (n,) in the corpus's dtype
    ends: NDArray[np.int64]  # (documents,) positions where a document ends, its end-of-text token included
    text_bytes: int
    skipped: int
    input_bytes: int


class Encoder:
    """Encodes batches with one tokenizer; ``<|endoftext|>`` closes each document, empty documents are skipped."""

    def __init__(self, tokenizer_json: str, json_keys: Sequence[str]) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        # A document that spells out <|endoftext|> must not end there.
        self._tokenizer.encode_special_tokens = True
        self._end = end_of_text_id(self._tokenizer)
        self._dtype = token_dtype(vocab_size(self._tokenizer))
        self._json_keys = tuple(json_keys)

    def __call__(self, batch: Sequence[Piece]) -> Encoded:
        """Raises ``DataError`` that names file and line for text that can't be read."""
        found = [part for piece in batch for part in parts(piece, self._json_keys)]
        kept = [part for part in found if not part.is_empty]
        rows = [self._row(part) for part in kept]
        stops = np.cumsum([len(row) for row in rows], dtype=np.int64)
        return Encoded(
            np.concatenate([np.empty(0, self._dtype), *rows]),
            stops[np.array([part.ends for part in kept], dtype=bool)],
            sum(len(part.text.encode()) for part in kept),
            len(found) - len(kept),
            sum(piece.input_bytes for piece in batch),
        )

    def _row(self, part: Part) -> NDArray[Any]:
        # One text at a time: a longer list would start the library's own threads beside our processes.
        ids = self._tokenizer.encode_batch_fast([part.text], add_special_tokens=False)[0].ids
        return np.array([*ids, self._end] if part.ends else ids, dtype=self._dtype)


def encode(
    batches: Iterable[Sequence[Piece]], tokenizer_json: str, json_keys: Sequence[str], workers: int
) -> Iterator[Encoded]:
    """Each batch encoded, in order and the same for any number of ``workers``; few batches are held at a time."""
    if workers == 1:
        yield from map(Encoder(tokenizer_json, json_keys), batches)
        return
    # Not fork: the tokenizer may have started threads, which a forked process doesn't inherit.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_json, tuple(json_keys)))
    try:
        yield from _in_order(pool, batches, 2 * workers)
    except BrokenProcessPool:
        raise DataError("--workers: a worker process died, likely for want of memory; use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, batches: Iterable[Sequence[Piece]], most: int) -> Iterator[Encoded]:
    waiting: deque[Future[Encoded]] = deque()
    for batch in batches:
        waiting.append(pool.submit(_encode_in_worker, batch))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_encoder: Encoder | None = None  # of a worker process, set once when it starts


def _start_worker(tokenizer_json: str, json_keys: Sequence[str]) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(tokenizer_json, json_keys)


def _encode_in_worker(batch: Sequence[Piece]) -> Encoded:
    assert _encoder is not None
    return _encoder(batch)
