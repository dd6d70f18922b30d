"""Turns pieces of documents into tokens on any number of processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from seqlen_curriculum.data.preparation.pieces import PIECE_BYTES, Piece, Problem, Rules
from seqlen_curriculum.data.preparation.texts import Part, Tally, parts
from seqlen_curriculum.data.tokenizer import end_of_text_id, vocab_size
from seqlen_curriculum.data.writer import token_dtype
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["Encoded", "Encoder", "encode"]


class Encoded(NamedTuple):
    """The tokens of one batch of pieces."""

    tokens: NDArray[Any]  # (n,) in the corpus's dtype
    ends: IntArray  # (documents,) positions where a document ends, its end-of-text token included
    text_bytes: int
    input_bytes: int
    left_out: Counter[str]
    """How often each kind of problem was met."""
    told: list[Problem]
    """The first few of each kind."""


class Encoder:
    """Encodes batches with one tokenizer; ``<|endoftext|>`` closes each document, empty documents are left out."""

    def __init__(self, tokenizer_json: str, rules: Rules) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        # A document that spells out <|endoftext|> must not end there.
        self._tokenizer.encode_special_tokens = True
        self._closing = [end_of_text_id(self._tokenizer)] if rules.append_eod else []
        self._dtype = token_dtype(vocab_size(self._tokenizer))
        self._rules = rules

    def __call__(self, batch: Sequence[Piece]) -> Encoded:
        """Raises ``DataError`` that names file and line for what the rules don't let pass."""
        tally = Tally(self._rules)
        rows, ends, text_bytes = [np.empty(0, self._dtype)], [], 0
        for part in (part for piece in batch for part in parts(piece, self._rules, tally)):
            rows.append(self._row(part))
            ends.append(part.ends)
            text_bytes += len(part.text.encode())
        stops = np.cumsum([len(row) for row in rows[1:]], dtype=np.int64)[np.array(ends, dtype=bool)]
        input_bytes = sum(piece.input_bytes for piece in batch)
        return Encoded(np.concatenate(rows), stops, text_bytes, input_bytes, tally.counts, tally.told)

    def _row(self, part: Part) -> NDArray[Any]:
        # One text at a time: a longer list would start the library's own threads beside our processes.
        ids = self._tokenizer.encode_batch_fast([part.text], add_special_tokens=False)[0].ids
        return np.array(ids + self._closing if part.ends else ids, dtype=self._dtype)


def encode(batches: Iterable[Sequence[Piece]], tokenizer_json: str, rules: Rules, workers: int) -> Iterator[Encoded]:
    """Each batch encoded, in order and the same for any number of ``workers``; few batches are held at a time."""
    if workers == 1:
        yield from map(Encoder(tokenizer_json, rules), batches)
        return
    # Not fork: the tokenizer may have started threads, which a forked process doesn't inherit.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_json, rules))
    try:
        yield from _in_order(pool, batches, 3 * workers * PIECE_BYTES)
    except BrokenProcessPool:
        raise DataError("--workers: a worker process died, likely for want of memory; use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, batches: Iterable[Sequence[Piece]], most_bytes: int) -> Iterator[Encoded]:
    """Hands out batches of ``most_bytes`` together, or one that is larger."""
    waiting: deque[tuple[Future[Encoded], int]] = deque()
    for batch in batches:
        size = sum(len(piece.data) for piece in batch)
        while waiting and sum(other for _, other in waiting) + size > most_bytes:
            yield waiting.popleft()[0].result()
        waiting.append((pool.submit(_encode_in_worker, batch), size))
    while waiting:
        yield waiting.popleft()[0].result()


_encoder: Encoder | None = None  # of a worker process, set once when it starts


def _start_worker(tokenizer_json: str, rules: Rules) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(tokenizer_json, rules)


def _end_with_parent() -> None:
    """A parent that was killed can't end its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(batch: Sequence[Piece]) -> Encoded:
    assert _encoder is not None
    return _encoder(batch)
