"""The pieces of documents that a run reads, by source and length, as numbers and as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from seqlen_curriculum.schedule.buckets import Buckets
from seqlen_curriculum.schedule.row_shares import RowShares
from seqlen_curriculum.schedule.timeline import Timeline

__all__ = ["bucket_use", "describe_bucket_use"]


def bucket_use(buckets: Buckets, timeline: Timeline | None = None) -> list[dict[str, Any]]:
    """Return one JSON-able object per source, with what a run with ``timeline`` reads of it, if one is given.

    ``name, weight, tokens`` (of an epoch), ``dropped_tokens`` (of an epoch, in pieces shorter than the shortest length),
    ``buckets`` [{length, pieces, tokens, steps, rows, epochs}], shortest first. ``rows`` are the pieces read, of which each
    epoch of the bucket reads every piece once. ``steps``, ``rows`` and ``epochs`` need ``timeline``.
    """
    sources: list[dict[str, Any]] = [
        {
            "name": source.name,
            "weight": source.weight,
            "tokens": buckets.tokens(source),
            "dropped_tokens": source.dropped_tokens,
            "buckets": [
                {"length": length, "pieces": pieces, "tokens": length * pieces}
                for length, pieces in zip(buckets.lengths, source.pieces, strict=True)
            ],
        }
        for source in buckets.sources
    ]
    if timeline is None:
        return sources
    for bucket, length in enumerate(buckets.lengths):
        rows, shares = timeline.samples_at(length, timeline.steps), RowShares(buckets.row_weights(bucket))
        for number, source in enumerate(sources):
            entry, own = source["buckets"][bucket], shares.count(number, rows)
            entry |= {"steps": rows * length // timeline.consumed_tokens(1), "rows": own}
            entry["epochs"] = own / entry["pieces"] if entry["pieces"] else 0.0
    return sources


def describe_bucket_use(sources: Sequence[dict[str, Any]]) -> str:
    """Format the result of ``bucket_use`` for a terminal."""
    return "\n".join(line for source in sources for line in _lines(source))


def _lines(source: dict[str, Any]) -> Iterator[str]:
    shortest, tokens, dropped = source["buckets"][0]["length"], source["tokens"], source["dropped_tokens"]
    share = dropped / (tokens + dropped)
    below = f"{dropped:,} dropped in pieces below {shortest:,} ({share:.2%})"
    yield f"pieces of {source['name']}: {tokens:,} tokens, {below}"
    columns = list(source["buckets"][0])
    yield "  " + "".join(f"{name:>16}" for name in columns)
    for bucket in source["buckets"]:
        yield "  " + "".join(
            f"{bucket[name]:>16,.2f}" if name == "epochs" else f"{bucket[name]:>16,}" for name in columns
        )
