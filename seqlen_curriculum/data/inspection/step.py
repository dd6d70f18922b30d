"""Show what each rank reads at a step: the positions of each sample's tokens, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seqlen_curriculum.data.training_data import RunData
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.extras import missing_package

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["check_step", "describe_step", "read_step"]

_SHOWN_CHARACTERS = 100  # at either end of a text
_SHOWN_PARTS = 4  # spans of a sample, and rows of it


def check_step(train_data: RunData, step: int, ranks: int, rows: int) -> None:
    """Raise ConfigError naming the flag if the step is outside the run or its samples don't divide over ``ranks``."""
    steps = train_data.timeline.steps
    if not 1 <= step <= steps:
        raise ConfigError(f"--step: {step} is not a step of this run; its steps are 1 to {steps:,}")
    samples = train_data.timeline.samples(step)
    if ranks < 1 or samples % ranks:
        raise ConfigError(
            f"--ranks: {ranks} data-parallel ranks don't divide the {samples} samples of step {step}; give a "
            f"divisor of {samples}"
        )
    if rows < 1:
        raise ConfigError(f"--rows: {rows} is not valid; give 1 or more samples to show")


def read_step(
    train_data: RunData, step: int, ranks: int = 1, rows: int = 4, stops_at_documents: bool = False
) -> dict[str, Any]:
    """Return ``rows`` samples of each of ``ranks`` data-parallel ranks at ``step`` as a JSON-able object.

    ``step, seqlen, method, samples, sample_rows, row_tokens`` (a sample becomes ``sample_rows`` rows of ``row_tokens``),
    ``ranks`` [{rank, first_sample, samples, shown}]. Each entry of ``shown``: ``source, epoch, number`` (all from 0),
    ``fresh`` (false if made of leftovers), ``stretches`` [{corpus, start, end, documents: [first, last]}] in the order of
    the sample, ``ids`` (inputs) and ``text`` (None without a tokenizer), both with one entry per row or window. With
    ``stops_at_documents`` also ``document_starts``, the targets of the step that are the first token of a document. Raises
    ConfigError.
    """
    check_step(train_data, step, ranks, rows)
    timeline = train_data.timeline
    seqlen, samples = timeline.seqlen(step), timeline.samples(step)
    rank_samples = samples // ranks
    counted = {"document_starts": train_data.document_rows(step).num_first_targets} if stops_at_documents else {}
    return {
        "step": step,
        "seqlen": seqlen,
        "method": timeline.shortening.method,
        "samples": samples,
        "sample_rows": timeline.shortening.rows_per_sample(seqlen),
        "row_tokens": timeline.shortening.tokens_per_row(seqlen),
        **counted,
        "ranks": [
            {
                "rank": rank,
                "first_sample": rank * rank_samples,
                "samples": rank_samples,
                "shown": _read_samples(train_data, step, rank * rank_samples, min(rows, rank_samples)),
            }
            for rank in range(ranks)
        ],
    }


def _read_samples(train_data: RunData, step: int, first: int, count: int) -> list[dict[str, Any]]:
    seqlen = train_data.timeline.seqlen(step)
    inputs = train_data.read(step, first, count)[0].reshape(count, -1)  # (samples, tokens of a sample)
    spans = _spans_by_sample(train_data, step, first, count)
    sample_ids = np.stack(train_data.sample_ids(step, first, count), axis=1)  # (samples, 3)
    samples = []
    for sample, (source, epoch, number) in enumerate(sample_ids.tolist()):
        ids = [inputs[sample, start : start + seqlen].tolist() for start in range(0, inputs.shape[1], seqlen)]
        tokenizer = _tokenizer_beside(spans[sample][0]["corpus"])
        samples.append(
            {
                "source": source,
                "epoch": epoch,
                "number": number,
                "fresh": number < train_data.sources[source].num_samples,
                "stretches": spans[sample],
                "ids": ids,
                "text": [tokenizer.decode(row, skip_special_tokens=False) for row in ids] if tokenizer else None,
            }
        )
    return samples


def _spans_by_sample(train_data: RunData, step: int, first: int, count: int) -> list[list[dict[str, Any]]]:
    by_sample: list[dict[int, dict[str, Any]]] = [{} for _ in range(count)]  # {column: span} of each
    for source, spans in train_data.token_spans(step, first, count):
        for sample, column, length, range_index, start in np.stack(spans, axis=1).tolist():
            corpus, end = train_data.sources[source].ranges[range_index][0], start + length
            # A piece belongs to the document of its targets. Its first input may be the end token before them.
            shift = 0 if train_data.buckets is None else 1
            documents = [corpus.document_at(start + shift), corpus.document_at(end - 1 + shift)]
            span = {"corpus": corpus.prefix, "start": start, "end": end, "documents": documents}
            by_sample[sample][column] = span
    return [[by_column[column] for column in sorted(by_column)] for by_column in by_sample]


@lru_cache  # a step has many samples from one corpus
def _tokenizer_beside(prefix: str) -> Tokenizer | None:
    path = Path(prefix + ".tokenizer.json")
    if not path.is_file() or find_spec("tokenizers") is None:
        return None
    from seqlen_curriculum.data.tokenizer import read_tokenizer

    return read_tokenizer(path)


def describe_step(step: dict[str, Any], full: bool = False) -> str:
    """Format the result of ``read_step`` for a terminal; ``full`` shows all spans and rows, and complete texts."""
    rows, row_tokens = step["sample_rows"], step["row_tokens"]
    each = f"each is a row of {row_tokens:,} tokens"
    if step["method"] == "window":
        each += f" that attend within windows of {step['seqlen']:,}"
    elif rows > 1:
        each = f"each becomes {rows:,} rows of {row_tokens:,} tokens"
    lines = [f"step {step['step']:,}: {step['samples']:,} samples over all ranks, seqlen {step['seqlen']:,}; {each}"]
    if "document_starts" in step:
        lines.append(
            f"attention and positions stop at document ends; {step['document_starts']:,} targets are the first token of a "
            "document"
        )
    for rank in step["ranks"]:
        first, last = rank["first_sample"], rank["first_sample"] + rank["samples"] - 1
        lines += ["", f"rank {rank['rank']}: samples {first:,} to {last:,} of the step"]
        for number, sample in enumerate(rank["shown"], first):
            lines += _sample_lines(number, sample, full)
        hidden = rank["samples"] - len(rank["shown"])
        if hidden:
            lines.append(f"  and {hidden:,} more")
    if find_spec("tokenizers") is None:
        lines += ["", f"Token ids are shown instead of text: {missing_package('tokenizers')}"]
    return "\n".join(lines)


def _sample_lines(number: int, sample: dict[str, Any], full: bool) -> list[str]:
    kind = "fresh" if sample["fresh"] else "made of leftovers"
    source, epoch, number_in_epoch = sample["source"], sample["epoch"], sample["number"]
    head = f"  sample {number:,}: source {source}, epoch {epoch}, number {number_in_epoch:,}, {kind}"
    spans = []
    for span in sample["stretches"]:
        first, last = span["documents"]
        documents = f"document {first:,}" if first == last else f"documents {first:,} to {last:,}"
        spans.append(f"    {span['corpus']}, tokens {span['start']:,} to {span['end'] - 1:,}, {documents}")
    rows = []
    for text in sample["text"] or [" ".join(map(str, ids)) for ids in sample["ids"]]:
        shown = repr(text)
        if not full and len(text) > 2 * _SHOWN_CHARACTERS:
            shown = f"{text[:_SHOWN_CHARACTERS]!r} ... {text[-_SHOWN_CHARACTERS:]!r}"
        rows.append(f"    {shown}" if sample["text"] else f"    ids {shown}")
    return [head, *_first_lines(spans, full), *_first_lines(rows, full)]


def _first_lines(lines: Sequence[str], full: bool) -> list[str]:
    hidden = len(lines) - _SHOWN_PARTS
    if full or hidden <= 0:
        return list(lines)
    return [*lines[:_SHOWN_PARTS], f"    and {hidden:,} more"]
