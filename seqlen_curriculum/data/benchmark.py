"""Measure how fast a run locates its samples at any corpus size, and how fast it reads them compared with plain numpy."""

from __future__ import annotations

import gc
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from tqdm import tqdm

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.indexed import HEADER, MAGIC, VERSION, IndexedCorpus
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.data.training_data import TrainingData
from seqlen_curriculum.errors import ConfigError

__all__ = ["describe_finding", "measure_finding", "measure_reading", "reading_table"]

_DOCUMENT_TOKENS = 2**30  # the format holds fewer than 2**31 per document
_CHUNK_TOKENS = 2**24


def measure_finding(config: RunConfig, folder: Path, tokens: int, count: int) -> dict[str, Any]:
    """Time how long it takes to locate the samples of ``count`` random steps in a corpus of ``tokens`` tokens.

    The corpus is a sparse file in ``folder``, which takes no disk space. Returns ``start_seconds`` (opening the corpus,
    computing the timeline, locating the first step), ``milliseconds`` per step (median), ``most_milliseconds``,
    ``milliseconds_at_the_end`` (median over the last 1 % of the run), ``steps``, ``batch``, and ``memory_bytes``, the peak
    memory of this process.
    """
    _write_corpus(folder / "sparse", tokens, lambda stream: stream.truncate(2 * tokens))
    started = time.perf_counter()
    train_data = _training_data(config, IndexedCorpus(folder / "sparse"))
    train_data.token_spans(1)
    start_seconds = time.perf_counter() - started
    steps, random = train_data.timeline.steps, np.random.default_rng(0)
    any_steps = random.integers(1, steps + 1, count).tolist()
    last_steps = random.integers(steps - steps // 100, steps + 1, count).tolist()
    milliseconds = [_milliseconds(train_data.token_spans, step) for step in any_steps]
    milliseconds_at_the_end = [_milliseconds(train_data.token_spans, step) for step in last_steps]
    return {
        "tokens": tokens,
        "steps": steps,
        "batch": train_data.timeline.global_batch,
        "start_seconds": start_seconds,
        "milliseconds": statistics.median(milliseconds),
        "most_milliseconds": max(milliseconds),
        "milliseconds_at_the_end": statistics.median(milliseconds_at_the_end),
        "memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # KiB on Linux
    }


def measure_reading(folder: Path, tokens: int, rows: int, seq_length: int, rounds: int) -> list[dict[str, Any]]:
    """Time reading batches of ``rows`` rows from a real file of ``tokens`` random tokens, at lengths that double up to full.

    Returns one record per length: ``seqlen``, and for a file in memory (``warm``) and on disk (``cold``) three times for as
    many rows of ``seqlen + 1`` tokens: ``milliseconds`` of a batch, ``gather_milliseconds`` of a numpy gather from a memory
    map, and ``pread_milliseconds`` of a loop over ``os.preadv``. Each is a median over ``rounds`` rounds (a quarter of them
    for ``cold``).
    """
    random = np.random.default_rng(0)

    def fill(stream: Any) -> None:
        for start in tqdm(
            range(0, tokens, _CHUNK_TOKENS), desc=f"writing {tokens:,} tokens", unit="chunk", disable=None
        ):
            stream.write(random.integers(0, 50257, min(_CHUNK_TOKENS, tokens - start), dtype=np.uint16).tobytes())

    _write_corpus(folder / "real", tokens, fill)
    lengths = [length for length in (seq_length >> shift for shift in range(24)) if length >= 8][::-1]
    records: list[dict[str, Any]] = [{"seqlen": length} for length in lengths]
    for state, count in (("warm", rounds), ("cold", -(-rounds // 4))):  # a cold batch may take a thousand times as long
        # Each round measures all lengths, so that a slowdown of the machine doesn't affect only one of them.
        readers = [BatchReader(folder / "real", rows, seq_length, length, state == "cold") for length in lengths]
        timings: list[list[tuple[float, float, float]]] = [[] for _ in lengths]  # (read, gather, pread) of each round
        for turn in tqdm(range(count + 1), desc=f"reading, {state}", unit="round", disable=None):
            for reader, timing in zip(readers, timings, strict=True):
                timed = reader.read(turn + 1), reader.gather(), reader.pread()
                if turn > 0:  # the first round is a warmup
                    timing.append(timed)
        for record, timing in zip(records, timings, strict=True):
            names = ("milliseconds", "gather_milliseconds", "pread_milliseconds")
            columns = zip(*timing, strict=True)
            record[state] = {name: statistics.median(column) for name, column in zip(names, columns, strict=True)}
    return records


class BatchReader:
    """Timed readers of a batch: as in a run, with plain numpy, and with ``os.preadv``. All return milliseconds.

    ``cold`` drops the file from the page cache before each batch.
    """

    def __init__(self, prefix: Path, rows: int, seq_length: int, seqlen: int, cold: bool) -> None:
        self._prefix, self._rows, self._seqlen, self._cold = prefix, rows, seqlen, cold
        self._random = np.random.default_rng(seqlen)
        # A run with a constant length.
        self._config = RunConfig.from_dict(
            {
                "train_batch_size": rows,
                "curriculum_learning": {
                    "enabled": True,
                    "min_difficulty": seqlen,
                    "max_difficulty": seqlen,
                    "schedule_type": "fixed_discrete",
                    "schedule_config": {"difficulty": [seqlen], "max_step": []},
                },
                "data": {"train": ["real"], "seq_length": seq_length},
                "training": {"train_tokens": 10**12},
            }
        )
        self._open()

    def read(self, step: int) -> float:
        """Return the milliseconds of ``TrainingData.read``."""
        self._open_anew_if_cold()
        return _milliseconds(self._train_data.read, step)

    def gather(self) -> float:
        """Return the milliseconds of a numpy gather of the same number of random rows from a memory map."""
        self._open_anew_if_cold()
        shape = len(self._tokens) - self._seqlen, self._seqlen + 1  # overlapping windows of seqlen + 1 uint16 tokens
        starts = self._starts()

        def gather() -> NDArray[Any]:
            windows = as_strided(self._tokens, shape, (2, 2), writeable=False)
            tokens: NDArray[Any] = windows[starts]
            return tokens

        return _milliseconds(gather)

    def pread(self) -> float:
        """Return the milliseconds of reading the same number of random rows one by one into an array."""
        self._open_anew_if_cold()
        starts, rows = (2 * self._starts()).tolist(), np.empty((self._rows, self._seqlen + 1), np.uint16)
        with open(self._prefix.with_suffix(".bin"), "rb") as stream:
            number = stream.fileno()
            return _milliseconds(
                lambda: [os.preadv(number, [row.data], at) for row, at in zip(rows, starts, strict=True)]
            )

    def _starts(self) -> NDArray[np.int64]:
        return self._random.integers(0, len(self._tokens) - self._seqlen, self._rows)

    def _open(self) -> None:
        self._train_data = _training_data(self._config, IndexedCorpus(self._prefix))
        self._tokens = np.memmap(self._prefix.with_suffix(".bin"), np.uint16, "r")
        if not self._cold:  # read the whole file into memory and map it
            self._train_data.sources[0].ranges[0][0].tokens.max()
            self._tokens.max()

    def _open_anew_if_cold(self) -> None:
        if not self._cold:
            return
        del self._train_data, self._tokens
        gc.collect()  # pages that are still mapped stay in the page cache
        with open(self._prefix.with_suffix(".bin"), "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._open()


def describe_finding(record: dict[str, Any]) -> str:
    """Format the record of ``measure_finding`` for a terminal."""
    return (
        f"{record['tokens']:,} tokens, {record['steps']:,} steps of {record['batch']} samples: starts in "
        f"{record['start_seconds']:.3f} s, finds a step's samples in {record['milliseconds']:.2f} ms\n(at most "
        f"{record['most_milliseconds']:.2f}; at the end of the run, in leftovers, {record['milliseconds_at_the_end']:.2f}), "
        f"peak memory {record['memory_bytes'] / 1e6:.0f} MB"
    )


def reading_table(records: list[dict[str, Any]]) -> str:
    """Format the records of ``measure_reading`` as a table."""
    states, ways = ("warm", "cold"), ("milliseconds", "gather_milliseconds", "pread_milliseconds")
    lines = [f"{'seqlen':>6}" + "".join(f" {state + ', ms':>9} {'gather':>8} {'pread':>8}" for state in states)]
    for record in records:
        cells = [f" {record[state][way]:>{9 if way == ways[0] else 8}.3f}" for state in states for way in ways]
        lines.append(f"{record['seqlen']:>6}" + "".join(cells))
    return "\n".join(lines)


def _training_data(config: RunConfig, corpus: IndexedCorpus) -> TrainingData:
    if config.data is None:
        raise ConfigError("data: section required, but not given")
    samples = Samples([(corpus, 0, corpus.num_tokens)], config.data.seq_length, seed=0, vocab_size=50257)
    return TrainingData([samples], config.timeline(), recycle=config.data.leftovers == "recycle")


def _write_corpus(prefix: Path, tokens: int, fill: Callable[[Any], object]) -> None:
    """Write a corpus of ``tokens`` uint16 tokens; ``fill(stream)`` writes its .bin."""
    lengths = np.array(
        [min(_DOCUMENT_TOKENS, tokens - start) for start in range(0, tokens, _DOCUMENT_TOKENS)], dtype="<i4"
    )
    offsets = 2 * np.cumsum([0, *lengths[:-1]], dtype="<i8")
    with open(f"{prefix}.bin", "wb") as stream:
        fill(stream)
    header = HEADER.pack(MAGIC, VERSION, 8, len(lengths), len(lengths) + 1)
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + documents.tobytes())


def _milliseconds(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return 1e3 * (time.perf_counter() - started)
