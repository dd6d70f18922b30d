"""What is in a corpus: its documents and tokens, counted in blocks, as numbers and as text.

Shapes: D distinct lengths of documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.errors import ConfigError, DataError
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["corpus_warnings", "describe_corpora", "inspect_corpora"]

_TOKENS = 2**22  # of a block
_DOCUMENTS = 2**20


def inspect_corpora(prefixes: Iterable[str], seq_length: int | None = None) -> list[dict[str, Any]]:
    """One JSON-able object a corpus; every token is looked at, with a progress bar where that takes over a second.

    ``prefix, documents, empty_documents, shortest_document, median_document, longest_document`` (tokens), ``tokens, dtype,
    vocab_size`` (as recorded, or None), ``smallest_id, largest_id``, and with ``seq_length`` also ``samples`` of that length
    and ``rest_tokens``, which fill none. Raises ConfigError, and DataError for a missing or damaged pair.
    """
    if seq_length is not None and seq_length < 1:
        raise ConfigError(f"--seq-length: {seq_length} is not a length of samples; give 1 or more tokens")
    corpora = [IndexedCorpus(prefix) for prefix in prefixes]  # all of them before any is read
    return [_facts(corpus, seq_length) for corpus in corpora]


def _facts(corpus: IndexedCorpus, seq_length: int | None) -> dict[str, Any]:
    lengths, counts = _document_lengths(corpus)
    smallest, largest = _extremes(corpus)
    facts = {
        "prefix": corpus.prefix,
        "documents": corpus.num_documents,
        "empty_documents": int(counts[lengths == 0].sum()),
        "shortest_document": int(lengths[0]),
        "median_document": _median(lengths, counts),
        "longest_document": int(lengths[-1]),
        "tokens": corpus.num_tokens,
        "dtype": corpus.dtype.name,
        "vocab_size": corpus.vocab_size,
        "smallest_id": smallest,
        "largest_id": largest,
    }
    if seq_length is not None:
        facts["samples"], facts["rest_tokens"] = divmod(corpus.num_tokens - 1, seq_length)
    return facts


def _blocks(corpus: IndexedCorpus, total: int, block: int, what: str) -> Iterator[tuple[int, int]]:
    """(first, end) of each block of ``total``, under a bar that shows after a second."""
    with tqdm(total=total, desc=f"{corpus.prefix}: {what}", unit_scale=True, delay=1, leave=False) as bar:
        for first in range(0, total, block):
            end = min(first + block, total)
            yield first, end
            bar.update(end - first)


def _document_lengths(corpus: IndexedCorpus) -> tuple[IntArray, IntArray]:
    """Each length in tokens, ascending, and how many documents have it, (D,) both: D**2 is at most twice the tokens."""
    lengths, counts = np.empty((2, 0), dtype=np.int64)
    for first, end in _blocks(corpus, corpus.num_documents, _DOCUMENTS, "documents"):
        found = np.diff(corpus.document_starts(first, end))
        lengths, where = np.unique(np.concatenate([lengths, found]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, np.ones_like(found)])).astype(np.int64)
    if lengths[0] < 0:
        raise DataError(f"{corpus.prefix}.idx: its documents are out of order; prepare the pair again")
    return lengths, counts


def _median(lengths: IntArray, counts: IntArray) -> float:
    ends = np.cumsum(counts)
    middle = np.array([ends[-1] - 1, ends[-1]]) // 2
    return float(lengths[np.searchsorted(ends, middle, side="right")].mean())


def _extremes(corpus: IndexedCorpus) -> tuple[int, int]:
    """The smallest and the largest token id."""
    smallest, largest = [], []
    with open(corpus.prefix + ".bin", "rb") as file:  # read: pages of a memory map would count as ours to the end
        for first, end in _blocks(corpus, corpus.num_tokens, _TOKENS, "tokens"):
            block = np.fromfile(file, corpus.dtype, end - first)
            smallest.append(int(block.min()))
            largest.append(int(block.max()))
    return min(smallest), max(largest)


def corpus_warnings(facts: Iterable[dict[str, Any]], model_vocab_size: int | None = None) -> list[str]:
    """One line for each corpus with ids outside the vocabulary it was made with, or the model's."""
    found = []
    for one in facts:
        sizes = [("vocabulary it was made with", one["vocab_size"]), ("vocabulary of the model", model_vocab_size)]
        for name, size in sizes:
            if size is not None and not 0 <= one["smallest_id"] <= one["largest_id"] < size:
                found.append(f"{one['prefix']}: has ids {_ids(one)}, outside the {name}, 0 to {size - 1:,}")
    return found


def describe_corpora(facts: Iterable[dict[str, Any]]) -> str:
    """The facts as text for a terminal."""
    return "\n\n".join(map(_describe, facts))


def _describe(facts: dict[str, Any]) -> str:
    lengths = "shortest {shortest_document:,}, median {median_document:,.10g}, longest {longest_document:,} tokens"
    vocabulary = "not recorded" if facts["vocab_size"] is None else f"{facts['vocab_size']:,}"
    lines = [
        facts["prefix"],
        f"  documents   {facts['documents']:,}, {facts['empty_documents']:,} empty; {lengths.format(**facts)}",
        f"  tokens      {facts['tokens']:,} of {facts['dtype']}",
        f"  ids         {_ids(facts)}, vocabulary {vocabulary}",
    ]
    if "samples" in facts:
        lines.append(f"  samples     {facts['samples']:,}, and {facts['rest_tokens']:,} tokens that fill none")
    return "\n".join(lines)


def _ids(facts: dict[str, Any]) -> str:
    return f"{facts['smallest_id']:,} to {facts['largest_id']:,}"
