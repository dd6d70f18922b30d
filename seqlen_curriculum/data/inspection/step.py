"""Exactly what the ranks read at a step: where each sample's tokens lie, and their text where a tokenizer is beside them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.training_data import TrainingData
from seqlen_curriculum.errors import ConfigError, DataError

__all__ = ["check_step", "describe_step", "read_step"]

_SHOWN = 100  # characters at either end of a text
_PARTS = 4  # token_spans of a sample, or rows of it, that are shown


def check_step(feed: TrainingData, step: int, ranks: int, rows: int) -> None:
    """Raise ConfigError, naming the flag, for a step that the run hasn't or that doesn't divide over ``ranks``."""
    steps = feed.timeline.steps
    if not 1 <= step <= steps:
        raise ConfigError(f"--step: {step} is not a step of this run; its steps are 1 to {steps:,}")
    samples = feed.timeline.samples(step)
    if ranks < 1 or samples % ranks:
        raise ConfigError(
            f"--ranks: {ranks} data-parallel ranks don't share the {samples} samples of step {step} evenly; give a "
            f"divisor of {samples}"
        )
    if rows < 1:
        raise ConfigError(f"--rows: {rows} is not a number of samples to show; give 1 or more")


def read_step(feed: TrainingData, step: int, ranks: int = 1, rows: int = 4) -> dict[str, Any]:
    """One JSON-able object: what each of ``ranks`` data-parallel ranks reads at ``step``, up to ``rows`` samples of each.

    ``step, seqlen, method, samples, sample_rows, row_tokens`` (a sample becomes so many rows of so many tokens), ``ranks``
    [{rank, first_sample, samples, shown}]. Each of ``shown``: ``source, epoch, number`` (all from 0),
    ``fresh`` or made of leftovers, ``stretches`` [{corpus, start, end, documents: [first, last]}] in the order they are laid
    in, ``ids`` (inputs) and ``text`` (None without a tokenizer): lists of one entry a row, or a window. Raises ConfigError.
    """
    check_step(feed, step, ranks, rows)
    timeline = feed.timeline
    seqlen, samples = timeline.seqlen(step), timeline.samples(step)
    count = samples // ranks
    return {
        "step": step,
        "seqlen": seqlen,
        "method": timeline.shortening.method,
        "samples": samples,
        "sample_rows": timeline.shortening.rows_per_sample(seqlen),
        "row_tokens": timeline.shortening.tokens_per_row(seqlen),
        "ranks": [
            {
                "rank": rank,
                "first_sample": rank * count,
                "samples": count,
                "shown": _samples(feed, step, rank * count, min(rows, count)),
            }
            for rank in range(ranks)
        ],
    }


def _samples(feed: TrainingData, step: int, first: int, count: int) -> list[dict[str, Any]]:
    seqlen = feed.timeline.seqlen(step)
    inputs = feed.read(step, first, count)[0].reshape(count, -1)  # (samples, tokens of a sample)
    token_spans = _stretches(feed, step, first, count)
    found = []
    for sample, (source, epoch, number) in enumerate(
        zip(*map(np.ndarray.tolist, feed.sample_ids(step, first, count)), strict=True)
    ):
        ids = [inputs[sample, start : start + seqlen].tolist() for start in range(0, inputs.shape[1], seqlen)]
        found.append(
            {
                "source": source,
                "epoch": epoch,
                "number": number,
                "fresh": number < feed.sources[source].num_samples,
                "stretches": token_spans[sample],
                "ids": ids,
                "text": _texts(token_spans[sample][0]["corpus"], ids),
            }
        )
    return found


def _stretches(feed: TrainingData, step: int, first: int, count: int) -> list[list[dict[str, Any]]]:
    """The token_spans of each sample from its first column on."""
    by_sample: list[list[tuple[int, dict[str, Any]]]] = [[] for _ in range(count)]
    for source, parts in feed.token_spans(step, first, count):
        for row, column, length, range_index, start in zip(*map(np.ndarray.tolist, parts), strict=True):
            by_sample[row].append(
                (column, _stretch(feed.sources[source].ranges[range_index][0], start, start + length))
            )
    return [[part for _, part in sorted(parts, key=lambda part: part[0])] for parts in by_sample]


def _stretch(corpus: IndexedCorpus, start: int, end: int) -> dict[str, Any]:
    documents = [corpus.document_at(start), corpus.document_at(end - 1)]
    return {"corpus": corpus.prefix, "start": start, "end": end, "documents": documents}


def _texts(prefix: str, rows: list[list[int]]) -> list[str] | None:
    tokenizer = _tokenizer(prefix)
    return tokenizer and [tokenizer.decode(ids, skip_special_tokens=False) for ids in rows]


@lru_cache
def _tokenizer(prefix: str) -> Any:
    """The tokenizer that was saved beside the corpus; None without one."""
    path = Path(prefix + ".tokenizer.json")
    if not path.is_file():
        return None
    from tokenizers import Tokenizer  # slow to import, and only needed where there is a text to show

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"{path}: not a tokenizer.json ({error}); prepare the corpus again, or remove this file"
        ) from None


def describe_step(found: dict[str, Any], full: bool = False) -> str:
    """What is read as text for a terminal; ``full`` leaves nothing out of the texts."""
    lines = [
        f"step {found['step']:,}: {found['samples']:,} samples over all ranks, seqlen {found['seqlen']:,}; {_rows(found)}"
    ]
    for rank in found["ranks"]:
        first, last = rank["first_sample"], rank["first_sample"] + rank["samples"] - 1
        lines += ["", f"rank {rank['rank']}: samples {first:,} to {last:,} of the step"]
        for place, sample in enumerate(rank["shown"], first):
            lines += _sample_lines(place, sample, full)
        more = rank["samples"] - len(rank["shown"])
        lines += [f"  and {more:,} more"] if more else []
    return "\n".join(lines)


def _rows(found: dict[str, Any]) -> str:
    rows, tokens = found["sample_rows"], found["row_tokens"]
    if found["method"] == "window":
        return f"each is a row of {tokens:,} tokens that attend within windows of {found['seqlen']:,}"
    if rows > 1:
        return f"each becomes {rows:,} rows of {tokens:,} tokens"
    return f"each is a row of {tokens:,} tokens"


def _sample_lines(place: int, sample: dict[str, Any], full: bool) -> list[str]:
    kind = "fresh" if sample["fresh"] else "made of leftovers"
    lines = [
        f"  sample {place:,}: source {sample['source']}, epoch {sample['epoch']}, number {sample['number']:,}, {kind}"
    ]
    lines += _limited([_stretch_line(part) for part in sample["stretches"]], full)
    texts = sample["text"] or [" ".join(map(str, ids)) for ids in sample["ids"]]
    kinds = "" if sample["text"] else "ids "
    return lines + _limited([f"    {kinds}{_shortened(text, full)}" for text in texts], full)


def _stretch_line(part: dict[str, Any]) -> str:
    first, last = part["documents"]
    documents = f"document {first:,}" if first == last else f"documents {first:,} to {last:,}"
    return f"    {part['corpus']}, tokens {part['start']:,} to {part['end'] - 1:,}, {documents}"


def _limited(lines: Sequence[str], full: bool) -> list[str]:
    more = 0 if full else len(lines) - _PARTS
    return [*lines[:_PARTS], f"    and {more:,} more"] if more > 0 else list(lines)


def _shortened(text: str, full: bool) -> str:
    if full or len(text) <= 2 * _SHOWN:
        return repr(text)
    return f"{text[:_SHOWN]!r} ... {text[-_SHOWN:]!r}"
