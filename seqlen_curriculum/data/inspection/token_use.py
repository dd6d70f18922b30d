"""What a run makes of its corpora, by arithmetic: splits, shares, epochs, and what each way of cutting would train on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from seqlen_curriculum.config.data import DataConfig
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.from_config import corpora_of, open_training_data
from seqlen_curriculum.data.leftovers import Epochs
from seqlen_curriculum.data.samples import SPLITS, Samples, split_ranges
from seqlen_curriculum.data.training_data import TrainingData
from seqlen_curriculum.schedule.piecewise import IntArray, Piecewise
from seqlen_curriculum.schedule.shortening import Method
from seqlen_curriculum.schedule.timeline import Timeline

__all__ = ["SourceUse", "account", "describe_account", "source_use"]

_MOST_EPOCHS = 100  # of a source whose first steps are in the summary
_TOLD_EPOCHS = 6  # and in its text
_COLUMNS = {
    "tokens read": "read_tokens",
    "trained on": "trained_tokens",
    "recycled": "recycled_tokens",
    "dropped": "dropped_tokens",
}


def account(config: RunConfig) -> dict[str, Any]:
    """One JSON-able object for a file with a data section; what needs steps is left out of a file that has none.

    ``seq_length, splits`` {train, valid, test: [{prefix, tokens, samples}]}, and with a training section and
    ``train_batch_size``: ``steps, first_epoch_steps`` (those before any source begins its second epoch, None if none does);
    ``sources`` [{name, weight, share, tokens and samples of an epoch, drawn_samples, epochs, epoch_steps}], the last being
    the first steps of up to 100 epochs; ``ways`` to cut [{method, leftovers, configured, steps, read_tokens,
    trained_tokens, recycled_tokens, dropped_tokens, epochs}] where read = trained + dropped, and recycled is a part of
    trained. Raises ConfigError, DataError.
    """
    assert config.data is not None
    summary: dict[str, Any] = {"seq_length": config.data.seq_length, "splits": _splits(config.data)}
    if config.training is None or config.keys.train_batch_size is None:
        return summary
    feed = open_training_data(config)
    sources = [_source(feed, number, config.data.weights) for number in range(len(feed.sources))]
    second = [source["epoch_steps"][1] for source in sources if len(source["epoch_steps"]) > 1]
    return summary | {
        "steps": feed.timeline.steps,
        "first_epoch_steps": min(second) - 1 if second else None,
        "sources": sources,
        "ways": [_way(feed, config, method, leftovers) for method, leftovers in _ways(config)],
    }


def _splits(data: DataConfig) -> dict[str, list[dict[str, Any]]]:
    splits = {}
    for which in SPLITS:
        if which == "test" and data.valid is not None and data.test is None:
            continue  # corpora of train are then read whole: none of them is left to test on
        ranges = split_ranges(*corpora_of(data, which), which)
        splits[which] = [
            {
                "prefix": corpus.prefix,
                "tokens": end - first,
                "samples": max(end - first - 1, 0) // data.seq_length,
            }
            for corpus, first, end in ranges
        ]
    return splits


def _source(feed: TrainingData, number: int, weights: Sequence[float] | None) -> dict[str, Any]:
    source, timeline = feed.sources[number], feed.timeline
    use = source_use(feed, number, timeline, feed.recycle)
    prefix, more = source.ranges[0][0].prefix, len(source.ranges) - 1
    return {
        "name": f"{prefix} and {more} more" if more else prefix,
        "weight": weights[number] if weights else None,
        "share": feed.blend.shares[number] / feed.blend.period,
        "tokens": source.num_tokens,
        "samples": source.num_samples,
        "drawn_samples": use.rows,
        "epochs": use.epochs,
        "epoch_steps": [_step_of(feed, number, row) for row in use.begins.tolist()],
    }


def _step_of(feed: TrainingData, number: int, row: int) -> int:
    """The step that reads sample ``row`` of a source, counted from 0 over the whole run."""
    steps = range(feed.timeline.steps + 1)
    return bisect_left(steps, row + 1, key=lambda step: _drawn(feed, number, feed.timeline, step))


def _drawn(feed: TrainingData, number: int, timeline: Timeline, step: int) -> int:
    """Samples of a source that are read by the end of ``step``."""
    return int(feed.blend.count(number, np.asarray(timeline.consumed_samples(step))))


class SourceUse(NamedTuple):
    """What a run makes of one source, in samples and target tokens."""

    rows: int
    """Samples drawn."""
    begins: IntArray
    """The sample, counted from 0 over the run, that each of the first epochs begins with."""
    epochs: float
    """Epochs done, and the part of the last one: of its fresh samples, or of its tokens where they are recycled."""
    read_tokens: int
    """Tokens of all samples read, one that lies in several samples of an epoch counted once."""
    trained_tokens: int
    recycled_tokens: int
    """Tokens trained on in samples made of leftovers."""


def source_use(feed: TrainingData, number: int, timeline: Timeline, recycle: bool) -> SourceUse:
    """What a run of ``timeline`` makes of source ``number`` of ``feed``, whose own timeline and recycling don't count."""
    source, rows = feed.sources[number], _drawn(feed, number, timeline, timeline.steps)
    used = feed.tokens_by_sample_of(number, timeline.tokens_by_sample())
    if recycle and rows:
        return _recycled(source, used, rows)
    begins = np.arange(0, min(rows, _MOST_EPOCHS * source.num_samples), source.num_samples)
    return SourceUse(rows, begins, rows / source.num_samples, rows * source.seq_length, used.total(rows), 0)


def _recycled(source: Samples, used: Piecewise, rows: int) -> SourceUse:
    begins = _epoch_begins(source, used, rows)
    ends = np.append(begins[1:], rows)
    fresh_ends = np.minimum(begins + source.num_samples, ends)
    trained, recycled = (used.total(ends) - used.total(first) for first in (begins, fresh_ends))
    rest = source.num_tokens - source.num_samples * source.seq_length
    rest_read = np.minimum(rest, (ends - fresh_ends) * source.seq_length)  # it is first among the leftovers
    done = trained[-1] > source.num_tokens - source.seq_length
    return SourceUse(
        rows,
        begins[:_MOST_EPOCHS],
        len(begins) - 1 + (1.0 if done else float(trained[-1] / source.num_tokens)),
        int((fresh_ends - begins).sum() * source.seq_length + rest_read.sum()),
        int(trained.sum()),
        int(recycled.sum()),
    )


def _epoch_begins(source: Samples, used: Piecewise, rows: int) -> IntArray:
    """The rows that epochs begin with. No epoch has fewer than its fresh rows, so rows as far apart find them all."""
    some = np.append(np.arange(0, rows, source.num_samples), rows - 1)
    return np.unique(Epochs(source.num_samples, source.num_tokens, source.seq_length, used).of(some)[1])


def _ways(config: RunConfig) -> list[tuple[Method, str]]:
    """Without a curriculum nothing is cut; windows leave nothing over but what fills no sample."""
    assert config.data is not None
    ways: list[tuple[Method, str]] = [("truncate", "drop"), ("truncate", "recycle")]
    if config.curriculum is not None:
        ways += [("segment", "drop"), ("segment", "recycle"), ("window", config.data.leftovers)]
    return ways


def _way(feed: TrainingData, config: RunConfig, method: Method, leftovers: str) -> dict[str, Any]:
    """The run for the same budget, cut by ``method``."""
    timeline = feed.timeline
    if config.curriculum is not None and method != config.shortening.method:
        changed = config.curriculum.model_copy(update={"method": method, "restart_positions": False})
        timeline = replace(config, curriculum=changed).timeline()
    uses = [source_use(feed, number, timeline, leftovers == "recycle") for number in range(len(feed.sources))]
    read, trained = (sum(getattr(use, name) for use in uses) for name in ("read_tokens", "trained_tokens"))
    return {
        "method": method,
        "leftovers": leftovers,
        "configured": method == config.shortening.method and (leftovers == "recycle") == feed.recycle,
        "steps": timeline.steps,
        "read_tokens": read,
        "trained_tokens": trained,
        "recycled_tokens": sum(use.recycled_tokens for use in uses),
        "dropped_tokens": read - trained,
        "epochs": [use.epochs for use in uses],
    }


def describe_account(summary: dict[str, Any]) -> str:
    """The account as text for a terminal."""
    lines = [f"samples of {summary['seq_length']:,} tokens"]
    for which, corpora in summary["splits"].items():
        lines.append(f"  {which:<7} {sum(one['samples'] for one in corpora):>15,}")
        lines += [f"  {one['samples']:>23,}  {one['prefix']}" for one in corpora if len(corpora) > 1]
    if "ways" not in summary:
        return "\n".join([*lines, "", "steps and epochs need a training section and train_batch_size"])
    lines += ["", f"{summary['steps']:,} steps; {_first_epoch(summary)}"]
    lines += [_source_line(source) for source in summary["sources"]]
    lines += ["", "what a run of this budget makes of them, by method and leftovers (* is this file's)"]
    lines.append(f"  {'':18} {'steps':>11}" + "".join(f" {name:>18}" for name in _COLUMNS) + "  epochs")
    return "\n".join([*lines, *map(_way_line, summary["ways"]), "recycled tokens are among those trained on"])


def _first_epoch(summary: dict[str, Any]) -> str:
    steps = summary["first_epoch_steps"]
    if steps is None:
        return "no source begins a second epoch"
    return f"the corpora feed {steps:,} of them before a second epoch begins"


def _source_line(source: dict[str, Any]) -> str:
    weight = "" if source["weight"] is None else f"weight {source['weight']:g}, {source['share']:.3%} of the samples, "
    steps = source["epoch_steps"]
    begins = ", ".join(f"{step:,}" for step in steps[:_TOLD_EPOCHS]) + (", ..." if len(steps) > _TOLD_EPOCHS else "")
    return (
        f"  {source['name']}: {weight}{source['drawn_samples']:,} samples, {_epochs(source['epochs'])} epochs, "
        f"beginning at step {begins}"
    )


def _way_line(way: dict[str, Any]) -> str:
    name = f"{'*' if way['configured'] else ' '} {way['method']:<9} {way['leftovers']:<8}"
    numbers = "".join(f" {way[key]:>18,}" for key in _COLUMNS.values())
    return f"{name} {way['steps']:>11,}{numbers}  {', '.join(map(_epochs, way['epochs']))}"


def _epochs(epochs: float) -> str:
    return f"{epochs:.2f}" if epochs >= 0.1 else f"{epochs:.2g}"
