"""Statistics of the documents and tokens of a corpus, as numbers and as text.

Shapes: D distinct document lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from seqlen_curriculum.config.data import DataConfig
from seqlen_curriculum.data.decomposed_data import buckets_of
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.pieces import Pieces
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import parse_section
from seqlen_curriculum.schedule.bucket_use import bucket_use, describe_bucket_use

__all__ = ["corpus_warnings", "describe_corpora", "inspect_corpora"]

_TOKENS = 2**22  # per block
_DOCUMENTS = 2**20


def inspect_corpora(
    prefixes: Iterable[str], seq_length: int | None = None, shortest_piece: int | None = None
) -> list[dict[str, Any]]:
    """Return one JSON-able object per corpus. Reads every token, with a progress bar if that takes over a second.

    ``prefix, documents, empty_documents, shortest_document, median_document, longest_document`` (tokens), ``tokens, dtype,
    vocab_size`` (as recorded, or None), ``smallest_id, largest_id``. With ``seq_length`` also ``samples`` of that length
    and ``rest_tokens``, which don't fill a sample. With ``shortest_piece`` also ``pieces``, the result of ``bucket_use`` for
    pieces of ``shortest_piece`` to ``seq_length`` tokens. Raises ConfigError, and DataError for a missing or damaged pair.
    """
    if seq_length is not None and seq_length < 1:
        raise ConfigError(f"--seq-length: {seq_length} is not valid; give 1 or more tokens")
    lengths = _piece_lengths(seq_length, shortest_piece)
    corpora = [IndexedCorpus(prefix) for prefix in prefixes]  # open all of them before reading any
    pieces = [Pieces([(corpus, 0, corpus.num_documents)], lengths, 0) if lengths else None for corpus in corpora]
    facts = []
    for corpus, cut in zip(corpora, pieces, strict=True):
        smallest_id, largest_id = _id_range(corpus)
        fact: dict[str, Any] = {
            "prefix": corpus.prefix,
            **_document_facts(corpus),
            "tokens": corpus.num_tokens,
            "dtype": corpus.dtype.name,
            "vocab_size": corpus.vocab_size,
            "smallest_id": smallest_id,
            "largest_id": largest_id,
        }
        if seq_length is not None:
            fact["samples"], fact["rest_tokens"] = divmod(corpus.num_tokens - 1, seq_length)
        if cut is not None:
            fact["pieces"] = bucket_use(buckets_of([cut], None))
        facts.append(fact)
    return facts


def _piece_lengths(seq_length: int | None, shortest_piece: int | None) -> tuple[int, ...]:
    """Return the lengths of the pieces, as a run's ``data`` section gives them; none without ``shortest_piece``."""
    if shortest_piece is None:
        return ()
    if seq_length is None:
        raise ConfigError(f"--decomposed {shortest_piece}: needs --seq-length, the longest piece; give it too")
    problems: list[str] = []
    keys = {"train": ["-"], "seq_length": seq_length, "order": "decomposed", "min_piece_tokens": shortest_piece}
    data = parse_section(DataConfig, keys, "--decomposed, --seq-length", problems)
    if data is None:
        raise ConfigError(problems)
    return data.piece_lengths


def _document_facts(corpus: IndexedCorpus) -> dict[str, int | float]:
    # Distinct lengths, ascending, and their number of documents, (D,) both. D is small: documents of D different lengths
    # have at least 0 + 1 + ... + (D - 1) tokens, so 10**12 tokens have at most 1.4 million lengths.
    lengths, counts = np.empty((2, 0), dtype=np.int64)
    for first, end in _blocks(corpus, corpus.num_documents, _DOCUMENTS, "documents"):
        block = np.diff(corpus.document_starts(first, end))
        lengths, where = np.unique(np.concatenate([lengths, block]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, np.ones_like(block)])).astype(np.int64)
    # The median is the mean of the two middle documents in order of length: for 4 documents numbers 1 and 2, from 0.
    ends = np.cumsum(counts)
    middle = np.array([ends[-1] - 1, ends[-1]]) // 2
    return {
        "documents": corpus.num_documents,
        "empty_documents": int(counts[lengths == 0].sum()),
        "shortest_document": int(lengths[0]),
        "median_document": float(lengths[np.searchsorted(ends, middle, side="right")].mean()),
        "longest_document": int(lengths[-1]),
    }


def _id_range(corpus: IndexedCorpus) -> tuple[int, int]:
    smallest, largest = [], []
    # Read as a file, because pages read through the memory map count as memory of this process until it exits.
    with open(corpus.prefix + ".bin", "rb") as file:
        for first, end in _blocks(corpus, corpus.num_tokens, _TOKENS, "tokens"):
            block = np.fromfile(file, corpus.dtype, end - first)
            smallest.append(int(block.min()))
            largest.append(int(block.max()))
    return min(smallest), max(largest)


def _blocks(corpus: IndexedCorpus, total: int, block: int, unit: str) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of each block of ``total`` items, with a progress bar that appears after a second."""
    with tqdm(total=total, desc=f"{corpus.prefix}: {unit}", unit_scale=True, delay=1, leave=False, disable=None) as bar:
        for first in range(0, total, block):
            end = min(first + block, total)
            yield first, end
            bar.update(end - first)


def corpus_warnings(facts: Iterable[dict[str, Any]], model_vocab_size: int | None = None) -> list[str]:
    """Return one line per corpus with ids outside the vocabulary it was made with or the model's vocabulary."""
    warnings = []
    for fact in facts:
        sizes = [("vocabulary it was made with", fact["vocab_size"]), ("vocabulary of the model", model_vocab_size)]
        for name, size in sizes:
            if size is not None and not 0 <= fact["smallest_id"] <= fact["largest_id"] < size:
                ids = f"{fact['smallest_id']:,} to {fact['largest_id']:,}"
                warnings.append(f"{fact['prefix']}: has ids {ids}, outside the {name}, 0 to {size - 1:,}")
    return warnings


def describe_corpora(facts: Iterable[dict[str, Any]]) -> str:
    """Format the result of ``inspect_corpora`` for a terminal."""
    descriptions = []
    for fact in facts:
        lengths = "shortest {shortest_document:,}, median {median_document:,.10g}, longest {longest_document:,} tokens"
        vocabulary = "not recorded" if fact["vocab_size"] is None else f"{fact['vocab_size']:,}"
        lines = [
            fact["prefix"],
            f"  documents   {fact['documents']:,}, {fact['empty_documents']:,} empty; {lengths.format(**fact)}",
            f"  tokens      {fact['tokens']:,} of {fact['dtype']}",
            f"  ids         {fact['smallest_id']:,} to {fact['largest_id']:,}, vocabulary {vocabulary}",
        ]
        if "samples" in fact:
            lines.append(f"  samples     {fact['samples']:,}, and {fact['rest_tokens']:,} tokens that don't fill one")
        if "pieces" in fact:
            lines += ["", describe_bucket_use(fact["pieces"])]
        descriptions.append("\n".join(lines))
    return "\n\n".join(descriptions)
