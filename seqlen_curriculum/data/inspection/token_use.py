"""Compute which tokens a run reads from its corpora: splits, shares, epochs, and the tokens each method trains on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.decomposed_data import buckets_of
from seqlen_curriculum.data.document_use import describe_document_use, document_use
from seqlen_curriculum.data.from_config import corpora_of, open_decomposed_data, open_packed_data, open_pieces
from seqlen_curriculum.data.leftovers import Epochs
from seqlen_curriculum.data.samples import SPLITS, Samples, split_ranges
from seqlen_curriculum.data.training_data import TrainingData
from seqlen_curriculum.schedule.bucket_use import bucket_use, describe_bucket_use
from seqlen_curriculum.schedule.piecewise import IntArray, Piecewise
from seqlen_curriculum.schedule.shortening import Method
from seqlen_curriculum.schedule.timeline import Timeline

__all__ = ["SourceUse", "account", "describe_account", "source_use"]

_LISTED_EPOCHS = 100  # of a source, whose first steps are listed in the summary
_SHOWN_EPOCHS = 6  # and in its text
_COLUMNS = {
    "tokens read": "read_tokens",
    "trained on": "trained_tokens",
    "recycled": "recycled_tokens",
    "dropped": "dropped_tokens",
}


def account(config: RunConfig) -> dict[str, Any]:
    """Return the token use of a file with a data section as one JSON-able object. Raises ConfigError, DataError.

    - ``seq_length, splits`` {train, valid, test: [{prefix, tokens, samples}]}. The keys below need a training section and
      ``train_batch_size``.
    - ``steps, first_epoch_steps``: the steps before any source starts its second epoch, None if none does.
    - ``sources`` [{name, weight, share, tokens and samples of an epoch, drawn_samples, epochs, epoch_steps}], where
      ``epoch_steps`` are the first steps of up to 100 epochs.
    - ``ways`` to shorten [{method, leftovers, configured, steps, read_tokens, trained_tokens, recycled_tokens,
      dropped_tokens, epochs}], where read = trained + dropped. Recycled tokens are part of the trained ones.
    - If attention stops at document ends, ``documents`` as ``document_use`` returns them.
    - If the rows are pieces of documents, ``pieces`` as ``bucket_use`` returns them instead of ``sources`` and ``ways``.
    """
    assert config.data is not None
    summary: dict[str, Any] = {"seq_length": config.data.seq_length, "splits": _splits(config)}
    if config.decomposed:
        return summary | _pieces_of_run(config)
    summary |= document_use(config)
    if config.training is None or config.keys.train_batch_size is None:
        return summary
    train_data = open_packed_data(config)
    sources = [_source(train_data, number, config.data.weights) for number in range(len(train_data.sources))]
    second_epochs = [source["epoch_steps"][1] for source in sources if len(source["epoch_steps"]) > 1]
    ways: list[tuple[Method, str]] = [("truncate", "drop"), ("truncate", "recycle")]
    if config.curriculum is not None:  # without a curriculum, samples aren't shortened
        # Windows use whole samples, so the only leftover is the rest that doesn't fill a sample.
        ways += [("segment", "drop"), ("segment", "recycle"), ("window", config.data.leftovers)]
    return summary | {
        "steps": train_data.timeline.steps,
        "first_epoch_steps": min(second_epochs) - 1 if second_epochs else None,
        "sources": sources,
        "ways": [_way(train_data, config, method, leftovers) for method, leftovers in ways],
    }


def _pieces_of_run(config: RunConfig) -> dict[str, Any]:
    """Return the pieces of the training data, and what the run reads of them if it has training and a batch."""
    assert config.data is not None
    if config.training is None or config.keys.train_batch_size is None:
        return {"pieces": bucket_use(buckets_of(open_pieces(config), config.data.weights))}
    data = open_decomposed_data(config)
    return {"steps": data.timeline.steps, "pieces": bucket_use(data.buckets, data.timeline)}


def _splits(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    assert config.data is not None
    data, splits = config.data, {}
    for which in SPLITS:
        if which == "test" and data.valid is not None and data.test is None:
            continue  # then the corpora of train aren't split, and there is no test split
        ranges = split_ranges(*corpora_of(config, which), which)
        splits[which] = [
            {
                "prefix": corpus.prefix,
                "tokens": end - first,
                "samples": max(end - first - 1, 0) // data.seq_length,
            }
            for corpus, first, end in ranges
        ]
    return splits


def _source(train_data: TrainingData, number: int, weights: Sequence[float] | None) -> dict[str, Any]:
    source, timeline = train_data.sources[number], train_data.timeline
    use = source_use(train_data, number, timeline, train_data.recycle)
    # An epoch starts in the first step by whose end more rows are drawn than precede the epoch.
    steps = range(timeline.steps + 1)
    epoch_steps = [
        bisect_left(
            steps, row + 1, key=lambda step: int(train_data.blend.count(number, timeline.consumed_samples(step)))
        )
        for row in use.first_rows.tolist()
    ]
    prefix, further = source.ranges[0][0].prefix, len(source.ranges) - 1
    return {
        "name": f"{prefix} and {further} more" if further else prefix,
        "weight": weights[number] if weights else None,
        "share": train_data.blend.shares[number] / train_data.blend.period,
        "tokens": source.num_tokens,
        "samples": source.num_samples,
        "drawn_samples": use.samples,
        "epochs": use.epochs,
        "epoch_steps": epoch_steps,
    }


class SourceUse(NamedTuple):
    """The samples and target tokens that a run reads from one source."""

    samples: int
    """Samples drawn."""
    first_rows: IntArray
    """The first sample of each of the first 100 epochs, counted from 0 over the run."""
    epochs: float
    """Completed epochs plus the fraction of the last one: of its fresh samples, or of its tokens with recycling."""
    read_tokens: int
    """Tokens of all samples read. A token in several samples of an epoch is counted once."""
    trained_tokens: int
    recycled_tokens: int
    """Trained tokens in samples made of leftovers."""

    @classmethod
    def with_recycling(cls, source: Samples, used: Piecewise, rows: int) -> SourceUse:
        """Return the use of ``source`` by its first ``rows`` rows, each of which uses ``used`` tokens, with recycling."""
        # An epoch has at least its fresh rows, so every num_samples-th row is in each epoch at least once.
        probes = np.append(np.arange(0, rows, source.num_samples), rows - 1)
        epochs = Epochs(source.num_samples, source.num_tokens, source.seq_length, used)
        begins = np.unique(epochs.of(probes)[1])
        ends = np.append(begins[1:], rows)
        fresh_ends = np.minimum(begins + source.num_samples, ends)
        trained = used.total(ends) - used.total(begins)
        recycled = used.total(ends) - used.total(fresh_ends)
        # Rows made of leftovers contain the rest of the stream, then tokens of fresh rows, which are already counted. With
        # samples of 16 and a rest of 5 tokens, the first such row adds 5 tokens and later ones add none.
        rest = source.num_tokens - source.num_samples * source.seq_length
        rest_read = np.minimum(rest, (ends - fresh_ends) * source.seq_length)
        last_is_done = trained[-1] > source.num_tokens - source.seq_length
        return cls(
            rows,
            begins[:_LISTED_EPOCHS],
            len(begins) - 1 + (1.0 if last_is_done else float(trained[-1] / source.num_tokens)),
            int((fresh_ends - begins).sum() * source.seq_length + rest_read.sum()),
            int(trained.sum()),
            int(recycled.sum()),
        )


def source_use(train_data: TrainingData, number: int, timeline: Timeline, recycle: bool) -> SourceUse:
    """Return the use of source ``number`` by a run with ``timeline``, with or without recycling.

    Only the sources and weights of ``train_data`` are used, not its own timeline and recycling.
    """
    source, samples = train_data.sources[number], timeline.consumed_samples(timeline.steps)
    rows = int(train_data.blend.count(number, samples))
    used = train_data.tokens_by_sample_of(number, timeline.tokens_by_sample())
    if recycle and rows:
        return SourceUse.with_recycling(source, used, rows)
    first_rows = np.arange(0, min(rows, _LISTED_EPOCHS * source.num_samples), source.num_samples)
    return SourceUse(rows, first_rows, rows / source.num_samples, rows * source.seq_length, used.total(rows), 0)


def _way(train_data: TrainingData, config: RunConfig, method: Method, leftovers: str) -> dict[str, Any]:
    """Return the token use of a run with the same budget whose samples are shortened by ``method``."""
    timeline = train_data.timeline
    if config.curriculum is not None and method != config.shortening.method:
        changed = config.curriculum.model_copy(update={"method": method, "restart_positions": False})
        timeline = replace(config, curriculum=changed).timeline()
    recycle = leftovers == "recycle"
    uses = [source_use(train_data, number, timeline, recycle) for number in range(len(train_data.sources))]
    read_tokens, trained_tokens = sum(use.read_tokens for use in uses), sum(use.trained_tokens for use in uses)
    return {
        "method": method,
        "leftovers": leftovers,
        "configured": method == config.shortening.method and recycle == train_data.recycle,
        "steps": timeline.steps,
        "read_tokens": read_tokens,
        "trained_tokens": trained_tokens,
        "recycled_tokens": sum(use.recycled_tokens for use in uses),
        "dropped_tokens": read_tokens - trained_tokens,
        "epochs": [use.epochs for use in uses],
    }


def describe_account(summary: dict[str, Any]) -> str:
    """Format the result of ``account`` for a terminal."""
    lines = [f"samples of {summary['seq_length']:,} tokens"]
    for which, corpora in summary["splits"].items():
        lines.append(f"  {which:<7} {sum(corpus['samples'] for corpus in corpora):>15,}")
        if len(corpora) > 1:
            lines += [f"  {corpus['samples']:>23,}  {corpus['prefix']}" for corpus in corpora]
    if "pieces" in summary:
        steps = [f"{summary['steps']:,} steps"] if "steps" in summary else []
        return "\n".join([*lines, "", *steps, describe_bucket_use(summary["pieces"])])
    if "documents" in summary:
        lines += ["", describe_document_use(summary["documents"])]
    if "ways" not in summary:
        return "\n".join([*lines, "", "steps and epochs need a training section and train_batch_size"])
    first_epoch = "no source starts a second epoch"
    if summary["first_epoch_steps"] is not None:
        first_epoch = f"the corpora last for {summary['first_epoch_steps']:,} of them before a second epoch starts"
    lines += ["", f"{summary['steps']:,} steps; {first_epoch}"]
    lines += [_source_line(source) for source in summary["sources"]]
    lines += ["", "tokens that a run with this budget reads, by method and leftovers (* marks this file's)"]
    lines.append(f"  {'':18} {'steps':>11}" + "".join(f" {name:>18}" for name in _COLUMNS) + "  epochs")
    for way in summary["ways"]:
        mark = "*" if way["configured"] else " "
        numbers = "".join(f" {way[key]:>18,}" for key in _COLUMNS.values())
        epochs = ", ".join(map(_epochs, way["epochs"]))
        lines.append(f"{mark} {way['method']:<9} {way['leftovers']:<8} {way['steps']:>11,}{numbers}  {epochs}")
    return "\n".join([*lines, "recycled tokens are part of the trained tokens"])


def _source_line(source: dict[str, Any]) -> str:
    weight = "" if source["weight"] is None else f"weight {source['weight']:g}, {source['share']:.3%} of the samples, "
    steps = [f"{step:,}" for step in source["epoch_steps"]]
    if len(steps) > _SHOWN_EPOCHS:
        steps = [*steps[:_SHOWN_EPOCHS], "..."]
    return (
        f"  {source['name']}: {weight}{source['drawn_samples']:,} samples, {_epochs(source['epochs'])} epochs, "
        f"beginning at step {', '.join(steps)}"
    )


def _epochs(epochs: float) -> str:
    return f"{epochs:.2f}" if epochs >= 0.1 else f"{epochs:.2g}"
