"""How fast a run finds and reads its samples: at any corpus size, and against numpy alone."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
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
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["measure_finding", "measure_reading", "tell_finding", "tell_reading"]

_DOCUMENT = 2**30  # tokens of a document: the format holds fewer than 2**31
_CHUNK = 2**24


def measure_finding(config: RunConfig, folder: Path, tokens: int, count: int) -> dict[str, Any]:
    """Where the samples of ``count`` random steps lie in a corpus of ``tokens`` tokens: a sparse file, which takes no space.

    ``start_seconds`` (opening the corpus, the whole run's arithmetic, the first step), ``milliseconds`` a step (median) and
    ``most_milliseconds``, the same of the run's last hundredth, ``steps``, and ``memory_bytes`` of the process.
    """
    _write_corpus(folder / "sparse", tokens, lambda stream: stream.truncate(2 * tokens))
    started = time.perf_counter()
    feed = _feed(config, IndexedCorpus(folder / "sparse"))
    feed.token_spans(1)
    start_seconds = time.perf_counter() - started
    steps, draw = feed.timeline.steps, np.random.default_rng(0)
    anywhere = [_milliseconds(feed, step) for step in draw.integers(1, steps + 1, count).tolist()]
    at_the_end = [_milliseconds(feed, step) for step in draw.integers(steps - steps // 100, steps + 1, count).tolist()]
    return {
        "tokens": tokens,
        "steps": steps,
        "batch": feed.timeline.global_batch,
        "start_seconds": start_seconds,
        "milliseconds": statistics.median(anywhere),
        "most_milliseconds": max(anywhere),
        "milliseconds_at_the_end": statistics.median(at_the_end),
        "memory_bytes": _memory_bytes(),
    }


def measure_reading(folder: Path, tokens: int, rows: int, seq_length: int, rounds: int) -> list[dict[str, Any]]:
    """Reading batches of ``rows`` rows from a real file of ``tokens`` random tokens, at lengths that double up to full.

    A record for each length: ``seqlen``, and for a file in memory (``warm``) and on disk (``cold``) the ``milliseconds`` of
    a batch, ``gather_milliseconds`` of a bare numpy gather of as many rows of ``seqlen + 1`` tokens, and ``speed``, the
    latter over the former; medians of ``rounds`` (a quarter of them for ``cold``) in which all take turns.
    """
    draw = np.random.default_rng(0)

    def fill(stream: Any) -> None:
        for start in tqdm(range(0, tokens, _CHUNK), desc=f"writing {tokens:,} tokens", unit="chunk"):
            stream.write(draw.integers(0, 50257, min(_CHUNK, tokens - start), dtype=np.uint16).tobytes())

    _write_corpus(folder / "real", tokens, fill)
    lengths = [length for length in (seq_length >> shift for shift in range(24)) if length >= 8][::-1]
    records: list[dict[str, Any]] = [{"seqlen": length} for length in lengths]
    for state, count in (("warm", rounds), ("cold", -(-rounds // 4))):  # a cold batch may take a thousand times as long
        readers = {length: _Readers(folder / "real", rows, seq_length, length, state == "cold") for length in lengths}
        seen: dict[tuple[int, str], list[float]] = {(length, of): [] for length in lengths for of in ("read", "gather")}
        for turn in tqdm(range(count + 1), desc=f"reading, {state}", unit="round"):
            for (length, of), milliseconds in seen.items():
                seconds = getattr(readers[length], of)(turn + 1)
                milliseconds += [1e3 * seconds] if turn else []
        for record in records:
            ours, gather = (statistics.median(seen[record["seqlen"], of]) for of in ("read", "gather"))
            record[state] = {"milliseconds": ours, "gather_milliseconds": gather, "speed": gather / ours}
    return records


class _Readers:
    """Reads a batch as a run does, and as numpy alone: seconds of either. ``cold`` drops the file from memory before."""

    def __init__(self, prefix: Path, rows: int, seq_length: int, seqlen: int, cold: bool) -> None:
        self._prefix, self._rows, self._seqlen, self._cold = prefix, rows, seqlen, cold
        self._config = _constant(rows, seq_length, seqlen)
        self._draw = np.random.default_rng(seqlen)
        if not cold:
            self._feed = _feed(self._config, IndexedCorpus(prefix))
            self._feed.sources[0].ranges[0][0].tokens.max()  # all of it is in memory and mapped now

    def read(self, step: int) -> float:
        feed = self._opened()
        return _seconds(partial(feed.read, step))

    def gather(self, _step: int) -> float:
        corpus = self._opened().sources[0].ranges[0][0]
        starts = self._draw.integers(0, corpus.num_tokens - self._seqlen, self._rows)
        return _seconds(partial(_gather, corpus, starts, self._seqlen + 1))

    def _opened(self) -> TrainingData:
        if not self._cold:
            return self._feed
        gc.collect()  # a page that is still mapped stays
        _drop_from_memory(self._prefix.with_suffix(".bin"))
        return _feed(self._config, IndexedCorpus(self._prefix))


def _gather(corpus: IndexedCorpus, starts: IntArray, length: int) -> NDArray[Any]:
    windows = as_strided(corpus.tokens, (corpus.num_tokens - length + 1, length), (2, 2), writeable=False)
    rows: NDArray[Any] = windows[starts]
    return rows


def _drop_from_memory(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tell_finding(record: dict[str, Any]) -> str:
    """The record of ``measure_finding`` for a terminal."""
    return (
        f"{record['tokens']:,} tokens, {record['steps']:,} steps of {record['batch']} samples: starts in "
        f"{record['start_seconds']:.3f} s, finds a step's samples in {record['milliseconds']:.2f} ms\n(at most "
        f"{record['most_milliseconds']:.2f}; at the end of the run, of leftovers, {record['milliseconds_at_the_end']:.2f}), "
        f"in a process of {record['memory_bytes'] / 1e6:.0f} MB"
    )


def tell_reading(records: list[dict[str, Any]]) -> str:
    """The records of ``measure_reading`` as a table."""
    lines = [
        f"{'seqlen':>6}" + "".join(f" {state + ', ms':>9} {'gather':>7} {'speed':>5}" for state in ("warm", "cold"))
    ]
    for r in records:
        told = (
            f" {r[s]['milliseconds']:>9.3f} {r[s]['gather_milliseconds']:>7.3f} {r[s]['speed']:>5.2f}"
            for s in ("warm", "cold")
        )
        lines.append(f"{r['seqlen']:>6}" + "".join(told))
    return "\n".join(lines)


def _feed(config: RunConfig, corpus: IndexedCorpus) -> TrainingData:
    if config.data is None:
        raise ConfigError("data: section required, but not given")
    samples = Samples([(corpus, 0, corpus.num_tokens)], config.data.seq_length, seed=0, vocab_size=50257)
    return TrainingData([samples], config.timeline(), recycle=config.data.leftovers == "recycle")


def _constant(rows: int, seq_length: int, seqlen: int) -> RunConfig:
    """A run that always reads ``rows`` rows of ``seqlen``."""
    schedule = {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [seqlen], "max_step": []}}
    lengths = {"enabled": True, "min_difficulty": seqlen, "max_difficulty": seqlen}
    return RunConfig.from_dict(
        {
            "train_batch_size": rows,
            "curriculum_learning": {**lengths, **schedule},
            "data": {"train": ["real"], "seq_length": seq_length},
            "training": {"train_tokens": 10**12},
        }
    )


def _write_corpus(prefix: Path, tokens: int, fill: Callable[[Any], object]) -> None:
    """A pair of ``tokens`` 16-bit tokens, whose .bin ``fill(stream)`` writes."""
    lengths = np.array([min(_DOCUMENT, tokens - start) for start in range(0, tokens, _DOCUMENT)], dtype="<i4")
    offsets = 2 * np.cumsum([0, *lengths[:-1]], dtype="<i8")
    with open(f"{prefix}.bin", "wb") as stream:
        fill(stream)
    header = HEADER.pack(MAGIC, VERSION, 8, len(lengths), len(lengths) + 1)
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + documents.tobytes())


def _milliseconds(feed: TrainingData, step: int) -> float:
    return 1e3 * _seconds(lambda: feed.token_spans(step))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _memory_bytes() -> int:
    """The most that this process has held."""
    import resource  # not on every system

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
