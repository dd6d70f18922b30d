"""The documents that a run's attention stops at, by source, as numbers and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.decomposed_data import source_name
from seqlen_curriculum.data.from_config import check_ends, open_sources
from seqlen_curriculum.data.indexed import IndexedCorpus

__all__ = ["describe_document_use", "document_use"]

_BLOCK = 2**20  # documents


def document_use(config: RunConfig) -> dict[str, Any]:
    """Return ``{"documents": [...]}``, one object per source of training data; empty if attention is that of rows.

    Each has ``name, documents`` (without empty ones), ``tokens`` (the targets of an epoch), ``first_targets`` (those that
    are the first token of a document, predicted from the end token alone) and ``parts_per_row`` (the mean number of parts
    that a sample of full length consists of). Raises ConfigError, and DataError for documents without a common end token.
    """
    if not config.stops_at_documents:
        return {}
    found = []
    for source in open_sources(config):
        check_ends(config, (corpus for corpus, _, _ in source.ranges))
        # The first token of a range has no input, so it is not a target.
        documents = [_count(*part) for part in source.ranges]
        first_targets = sum(max(count - 1, 0) for count in documents)
        found.append(
            {
                "name": source_name(source),
                "documents": sum(documents),
                "tokens": source.num_tokens,
                "first_targets": first_targets,
                "parts_per_row": 1 + (source.seq_length - 1) * first_targets / source.num_tokens,
            }
        )
    return {"documents": found}


def _count(corpus: IndexedCorpus, first: int, end: int) -> int:
    """Return the number of documents in tokens ``[first, end)`` of ``corpus``, without empty ones."""
    begin, stop = corpus.first_documents_from(np.array([first, end])).tolist()
    counts = [
        np.count_nonzero(np.diff(corpus.document_starts(block, min(block + _BLOCK, stop))))
        for block in range(begin, stop, _BLOCK)
    ]
    return int(sum(counts))


def describe_document_use(documents: Sequence[dict[str, Any]]) -> str:
    """Format the sources of ``document_use`` for a terminal."""
    return "\n".join(
        f"documents of {source['name']}: {source['documents']:,}, {source['parts_per_row']:,.1f} parts per full row; of the "
        f"{source['tokens']:,} targets per epoch {source['first_targets']:,} are the first token of a document"
        for source in documents
    )
