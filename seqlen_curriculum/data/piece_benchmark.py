"""Measure how long the index of the pieces of documents takes to make and to open, and to find the pieces of a step."""

from __future__ import annotations

import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.decomposed_data import DecomposedData, buckets_of
from seqlen_curriculum.data.indexed import HEADER, MAGIC, VERSION, IndexedCorpus
from seqlen_curriculum.data.pieces import Pieces

__all__ = ["describe_pieces", "measure_pieces"]

_MEDIAN_TOKENS, _SPREAD = 400, 1.0  # of log-normal lengths, whose mean is 660
_LONGEST_TOKENS = 2**20
_CHUNK = 2**20  # documents


def measure_pieces(config: RunConfig, folder: Path, documents: int, count: int) -> dict[str, Any]:
    """Time the index of a corpus of ``documents`` documents of random lengths, and ``count`` random steps of the run.

    The corpus is written to ``folder``: its .bin is sparse, its .idx takes 20 bytes per document. Returns ``index_seconds``
    (making the index), ``open_seconds`` (opening the corpus and its index again), ``milliseconds`` to locate the pieces of a
    step (median), ``most_milliseconds``, ``index_bytes``, ``memory_bytes`` (the peak of this process, mapped files
    included), ``documents, tokens, pieces, steps, batch``.
    """
    assert config.data is not None
    _write(folder / "sparse", documents)
    lengths, seed = config.data.piece_lengths, config.training.seed if config.training else 0
    seconds = list[float]()
    for _ in range(2):  # the second time, the index is there
        started = time.perf_counter()
        corpus = IndexedCorpus(folder / "sparse")
        opened = time.perf_counter()
        pieces = Pieces([(corpus, 0, documents)], lengths, seed)
        seconds += [opened - started, time.perf_counter() - opened]
    buckets = buckets_of([pieces], None)
    data = DecomposedData([pieces], config.with_buckets(buckets).timeline(), buckets)
    steps = np.random.default_rng(0).integers(1, data.timeline.steps + 1, count).tolist()
    milliseconds = list[float]()
    for step in steps:
        started = time.perf_counter()
        data.token_spans(step)
        milliseconds.append(1e3 * (time.perf_counter() - started))
    return {
        "documents": documents,
        "tokens": corpus.num_tokens,
        "pieces": pieces.num_samples,
        "index_seconds": seconds[1],
        "open_seconds": seconds[2] + seconds[3],
        "milliseconds": statistics.median(milliseconds),
        "most_milliseconds": max(milliseconds),
        "index_bytes": sum(path.stat().st_size for path in folder.glob("sparse.pieces*.npy")),
        "memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # KiB on Linux
        "steps": data.timeline.steps,
        "batch": config.global_batch,
    }


def _write(prefix: Path, documents: int) -> None:
    """Write a corpus of uint16 zeros whose documents have log-normal lengths, in blocks."""
    random, tokens = np.random.default_rng(0), 0
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        offsets_at, documents_at = HEADER.size + 4 * documents, HEADER.size + 12 * documents
        for first in range(0, documents, _CHUNK):
            count = min(_CHUNK, documents - first)
            drawn = np.exp(random.normal(np.log(_MEDIAN_TOKENS), _SPREAD, count))
            lengths = np.clip(drawn, 1, _LONGEST_TOKENS).astype("<i4")
            ends = tokens + np.cumsum(lengths, dtype="<i8")
            os.pwrite(index.fileno(), lengths.tobytes(), HEADER.size + 4 * first)
            os.pwrite(index.fileno(), (2 * (ends - lengths)).tobytes(), offsets_at + 8 * first)
            os.pwrite(
                index.fileno(), np.arange(first, first + count + 1, dtype="<i8").tobytes(), documents_at + 8 * first
            )
            tokens = int(ends[-1])
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(2 * tokens)


def describe_pieces(record: dict[str, Any]) -> str:
    """Format the record of ``measure_pieces`` for a terminal."""
    return (
        f"{record['documents']:,} documents, {record['tokens']:,} tokens, {record['pieces']:,} pieces: index made in "
        f"{record['index_seconds']:.1f} s ({record['index_bytes'] / 1e6:.0f} MB)\n"
        f"opened again with its corpus in {record['open_seconds']:.2f} s; finds a step's pieces in "
        f"{record['milliseconds']:.2f} ms (at most {record['most_milliseconds']:.2f}), peak memory "
        f"{record['memory_bytes'] / 1e6:.0f} MB"
    )
