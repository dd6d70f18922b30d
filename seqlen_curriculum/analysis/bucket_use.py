"""The pieces of documents that a run has read, by length, from its log."""

from __future__ import annotations

from typing import Any

import numpy as np

from seqlen_curriculum.analysis.run import Run

__all__ = ["pieces_read"]


def pieces_read(run: Run) -> list[dict[str, Any]] | None:
    """Return ``{length, steps, rows, tokens, share}`` of each length, shortest first; None if rows aren't pieces.

    Counts the steps in the log, also those that a rollback skips. ``share`` is that of the tokens.
    """
    if run.settings.get("data.order") != "decomposed":
        return None
    steps = [(record["seqlen"], record["rows"]) for record in run.records if "valid_loss" not in record]
    lengths, rows = np.array(steps, np.int64).reshape(-1, 2).T
    unique, number = np.unique(lengths, return_inverse=True)
    # Exact: sums of floats are integers up to 2**53 rows.
    counts, read = np.bincount(number), np.bincount(number, rows).astype(np.int64)
    tokens = unique * read
    return [
        {"length": length, "steps": count, "rows": of_length, "tokens": used, "share": used / int(tokens.sum())}
        for length, count, of_length, used in zip(
            unique.tolist(), counts.tolist(), read.tolist(), tokens.tolist(), strict=True
        )
    ]
