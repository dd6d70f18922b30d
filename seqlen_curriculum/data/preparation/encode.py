"""Encode pieces of documents as tokens; order and result are the same for any number of processes."""

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

from seqlen_curriculum.data.preparation.pieces import PIECE_BYTES, FilePiece, InputProblem, Rules
from seqlen_curriculum.data.preparation.texts import Tally, text_parts
from seqlen_curriculum.data.tokenizer import END_OF_TEXT, vocab_size
from seqlen_curriculum.data.writer import token_dtype
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["EncodedBatch", "Encoder", "encode"]


class EncodedBatch(NamedTuple):
    """The tokens of one batch of pieces."""

    tokens: NDArray[Any]  # (n,) in the corpus's dtype
    ends: IntArray  # (documents,) positions where a document ends, its end-of-text token included
    text_bytes: int
    input_bytes: int
    left_out: Counter[str]
    """Number of occurrences of each kind of problem."""
    problems: list[InputProblem]
    """The first few problems of each kind."""


class Encoder:
    """Encoder of batches with one tokenizer. Appends the end token to each document and skips empty documents."""

    def __init__(self, tokenizer_json: str, rules: Rules) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        # A document whose text contains <|endoftext|> must not end there.
        self._tokenizer.encode_special_tokens = True
        end = self._tokenizer.token_to_id(rules.eod_token or END_OF_TEXT)
        assert end is not None or not rules.append_eod  # choose_end refuses a tokenizer without it
        self._closing = [end] if rules.append_eod else []
        self._dtype = token_dtype(vocab_size(self._tokenizer))
        self._rules = rules

    def __call__(self, batch: Sequence[FilePiece]) -> EncodedBatch:
        """Return the tokens of ``batch``. Raises ``DataError`` with file and line for input that the rules refuse."""
        tally = Tally(self._rules)
        rows = [np.empty(0, self._dtype)]
        ends: list[int] = []
        num_tokens = text_bytes = 0
        for piece in batch:
            for part in text_parts(piece, self._rules, tally):
                # One text per call: for a longer list the library starts threads in addition to our processes.
                ids = self._tokenizer.encode_batch_fast([part.text], add_special_tokens=False)[0].ids
                rows.append(np.array(ids + self._closing if part.ends else ids, dtype=self._dtype))
                num_tokens += len(rows[-1])
                text_bytes += len(part.text.encode())
                if part.ends:
                    ends.append(num_tokens)
        input_bytes = sum(piece.input_bytes for piece in batch)
        end_positions = np.array(ends, dtype=np.int64)
        return EncodedBatch(np.concatenate(rows), end_positions, text_bytes, input_bytes, tally.counts, tally.problems)


def encode(
    batches: Iterable[Sequence[FilePiece]], tokenizer_json: str, rules: Rules, workers: int
) -> Iterator[EncodedBatch]:
    """Encode each batch in order; the result is the same for any number of ``workers``."""
    if workers == 1:
        yield from map(Encoder(tokenizer_json, rules), batches)
        return
    # Not fork: a forked process doesn't inherit threads that the tokenizer may have started.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_json, rules))
    # Three pieces per worker: one being encoded, one queued, and one waiting to be written in order. With 16 workers
    # and pieces of 256 KiB that is 12 MiB for a corpus of any size. A single larger batch is allowed.
    max_bytes = 3 * workers * PIECE_BYTES
    pending: deque[tuple[Future[EncodedBatch], int]] = deque()
    try:
        for batch in batches:
            batch_bytes = sum(len(piece.data) for piece in batch)
            while pending and sum(size for _, size in pending) + batch_bytes > max_bytes:
                yield pending.popleft()[0].result()
            pending.append((pool.submit(_encode_in_worker, batch), batch_bytes))
        while pending:
            yield pending.popleft()[0].result()
    except BrokenProcessPool:
        raise DataError(
            f"--workers {workers}: a worker process died, probably for lack of memory; use fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # in a worker process, set once at its start


def _start_worker(tokenizer_json: str, rules: Rules) -> None:
    global _encoder

    def exit_with_parent() -> None:
        # A killed parent can't stop its workers, which would then wait forever.
        parent = multiprocessing.parent_process()
        assert parent is not None
        wait([parent.sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(tokenizer_json, rules)


def _encode_in_worker(batch: Sequence[FilePiece]) -> EncodedBatch:
    assert _encoder is not None
    return _encoder(batch)
