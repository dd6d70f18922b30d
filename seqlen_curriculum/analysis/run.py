"""A run's log as curves against steps, consumed tokens and hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum import fields
from seqlen_curriculum.analysis.machine import describe_machine, machine_use
from seqlen_curriculum.analysis.stability import stability
from seqlen_curriculum.run_folder.ratios import ratios_to_best

__all__ = ["Run", "Series", "summarise"]

Records = list[dict[str, Any]]
Column = NDArray[np.float64]

_THROUGHPUT_POINTS = 200


@dataclass(frozen=True, eq=False)
class Series:
    """Logged values with their steps, tokens and hours, (n,) each."""

    values: Column
    step: Column
    tokens: Column
    """Consumed tokens."""
    hours: Column
    """Time of training and evaluation, without the gaps between launches."""

    def thinned(self, most: int = 2000) -> Series:
        """Return at most ``most`` points and the two ends. Every extreme is kept."""
        if len(self.values) <= most:
            return self
        # 400,000 steps and most = 2000: the lowest and the highest value of each of 1000 buckets of 400 steps. A spike of a
        # single step keeps its height. Means or every 200th value would hide it.
        edges = np.linspace(0, len(self.values), most // 2 + 1).astype(int)
        kept = {0, len(self.values) - 1}
        for start, end in pairwise(edges):
            bucket = self.values[start:end]
            kept |= {start + int(bucket.argmin()), start + int(bucket.argmax())}
        return self[np.array(sorted(kept))]

    def changes(self) -> Series:
        """Return the first point, and the last point of each run of equal values."""
        # 8, 8, 8, 16, 16 becomes 8, 8, 16: each value holds from the previous point on, so nothing is lost.
        kept = np.append(self.values[1:] != self.values[:-1], True)[: len(self.values)]
        kept[:1] = True
        return self[kept]

    def __getitem__(self, chosen: NDArray[Any]) -> Series:
        return Series(self.values[chosen], self.step[chosen], self.tokens[chosen], self.hours[chosen])


@dataclass(frozen=True, eq=False)
class Run:
    """The contents of a run folder."""

    name: str
    records: Records
    """The records of ``runlog.jsonl``, in order."""
    info: dict[str, Any] = field(default_factory=dict)
    """The contents of ``run.json``; {} if there is none."""
    rollbacks: Records | None = None
    """The contents of ``rollbacks.json``; None if there is none."""
    _series: dict[str, Series] = field(default_factory=dict, init=False, repr=False)
    """The results of ``series`` so far."""

    @cached_property
    def steps(self) -> Records:
        """Training records, without those of skipped steps, which have no loss."""
        return [record for record in self.records if "loss" in record]

    @cached_property
    def evaluations(self) -> Records:
        """Evaluation records."""
        return [record for record in self.records if "valid_loss" in record]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration with all defaults and overrides; {} if unknown."""
        config = self.info.get("config")
        return config if isinstance(config, dict) else {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration with keys like ``training.seed``."""
        return dict(fields.flat(self.config))

    @property
    def budget(self) -> int | None:
        """``training.train_tokens``; None if unknown."""
        tokens = self.settings.get("training.train_tokens")
        return tokens if type(tokens) is int and 0 < tokens < 2**63 else None

    @property
    def finished(self) -> bool:
        """True if the run has consumed its budget and made its last evaluation."""
        # The last step is logged before the last evaluation starts. A page that stopped there would lack its result.
        if not self.budget or not self.records or self.records[-1]["consumed_tokens"] < self.budget:
            return False
        return not self.settings.get("training.eval_interval") or "valid_loss" in self.records[-1]

    @cached_property
    def stability(self) -> dict[str, Any]:
        """The paper's measures, as ``stability.stability`` returns them."""
        return stability(self.steps, self.evaluations)

    @cached_property
    def points(self) -> Records:
        """``step, consumed_tokens, hours, valid_loss, valid_ppl`` of every evaluation."""
        keys = ("step", "consumed_tokens", "valid_loss", "valid_ppl")
        hours = self.series("valid_loss").hours.tolist()
        return [
            {"hours": at, **{key: record[key] for key in keys}}
            for at, record in zip(hours, self.evaluations, strict=True)
        ]

    def reached(self, best: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the first of ``points`` whose loss is at most that of ``best``; None if there is none."""
        return next((point for point in self.points if best and point["valid_loss"] <= best["valid_loss"]), None)

    @cached_property
    def ends(self) -> tuple[Column, Column, Column]:
        """Step, consumed tokens and hours at the end of every record, (records,) each."""
        step, tokens, seconds = (_column(self.records, key) for key in ("step", "consumed_tokens", "seconds"))
        elapsed = np.cumsum(seconds)
        # A rollback from step 70 to 50 removes steps 51 to 70 from the log, but their time was spent before the new step
        # 51: it is added to every record after step 50.
        for rollback in self.rollbacks or ():
            elapsed += np.where(step > rollback["returned_to"], rollback.get("seconds", 0), 0)
        return step, tokens, elapsed / 3600

    @property
    def end(self) -> dict[str, Any]:
        """``step, consumed_tokens, hours`` of the last record, skipped steps included."""
        step, tokens, hours = (end[-1].item() for end in self.ends)
        return {"step": int(step), "consumed_tokens": int(tokens), "hours": hours}

    @property
    def skipped_steps(self) -> int:
        """The number of steps that rollbacks skipped."""
        return sum(bool(record.get("skipped")) for record in self.records)

    def series(self, key: str) -> Series:
        """Return the logged values of ``key``, or the computed ``loss_ratio`` or ``tokens_per_second``."""
        # Twenty plots, tables and legends read the same few keys of up to 400,000 records.
        if key not in self._series:
            computed = {"loss_ratio": self.loss_ratios, "tokens_per_second": self.throughput}
            self._series[key] = computed[key]() if key in computed else self.logged(key)
        return self._series[key]

    def logged(self, key: str) -> Series:
        """Return the values of ``key`` from the records that have one."""
        chosen = np.array([n for n, record in enumerate(self.records) if record.get(key) is not None], dtype=int)
        values = np.array([self.records[n][key] for n in chosen.tolist()], dtype=np.float64)
        return Series(values, *(end[chosen] for end in self.ends))

    def loss_ratios(self) -> Series:
        """Return the loss ratio of every step that has one: not the first."""
        losses = self.series("loss")
        ratios = Series(ratios_to_best(losses.values), losses.step, losses.tokens, losses.hours)
        return ratios[np.flatnonzero(~np.isnan(ratios.values))]

    @cached_property
    def timed(self) -> tuple[NDArray[Any], Column, Column]:
        """Record indices, tokens and seconds, (n,) each, of the trained steps whose tokens are known."""
        training = np.array([n for n, record in enumerate(self.records) if "valid_loss" not in record], dtype=int)
        step, tokens = (end[training] for end in self.ends[:2])
        has_loss = np.array(["loss" in self.records[n] for n in training.tolist()], dtype=bool)
        # The log has consumed tokens. The tokens of a step are the difference from the previous step. If that is not in the
        # log (its beginning was lost), the difference would be that of many steps.
        known = has_loss & (step == np.concatenate([[0], step[:-1]]) + 1)
        step_tokens = tokens - np.concatenate([[0], tokens[:-1]])
        chosen = training[known]
        return chosen, step_tokens[known], _column([self.records[n] for n in chosen.tolist()], "seconds")

    @property
    def tokens_per_second(self) -> float | None:
        """Training throughput without evaluations; None if no step has a time."""
        _, tokens, seconds = self.timed
        return float(tokens.sum() / seconds.sum()) if seconds.sum() else None

    def throughput(self) -> Series:
        """Return the training throughput in tokens/s as at most 200 means, each over the same number of steps."""
        chosen, step_tokens, step_seconds = self.timed
        if not len(chosen):
            empty = np.zeros(0)
            return Series(empty, empty, empty, empty)
        # 1000 steps: the means start at steps 0, 5, 10, ... and each is plotted at its last step: 4, 9, 14, ...
        starts = np.unique(np.linspace(0, len(chosen), _THROUGHPUT_POINTS, endpoint=False).astype(int))
        lasts = chosen[np.append(starts[1:], len(chosen)) - 1]
        seconds = np.add.reduceat(step_seconds, starts)
        values = np.add.reduceat(step_tokens, starts) / np.maximum(seconds, 1e-9)
        return Series(values, *(end[lasts] for end in self.ends))


def _column(records: Sequence[dict[str, Any]], key: str) -> Column:
    """Return the values of ``key``, (records,), with 0 where a record has none."""
    return np.array([record.get(key) or 0 for record in records], dtype=np.float64)


def summarise(run: Run) -> str:
    """Return a summary of the run in a few lines for a terminal."""
    steps, evaluations, end = run.steps, run.evaluations, run.end
    seconds = sum(record["seconds"] for record in steps)
    speed = f", {run.tokens_per_second:,.0f} tokens/s" if run.tokens_per_second else ""
    skipped = f", {run.skipped_steps:,} of them skipped by rollbacks" if run.skipped_steps else ""
    lines = [
        f"steps            {end['step']:,}{skipped}",
        f"consumed tokens  {end['consumed_tokens']:,}",
        f"seqlen           {steps[0]['seqlen']} to {steps[-1]['seqlen']}",
        f"training loss    {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}",
        f"training time    {seconds:,.0f} s{speed}",
    ]
    if machine := describe_machine(machine_use(run.records)):
        lines.append(f"machine          {machine}")
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        lines.append(
            f"validation loss  {first['valid_loss']:.3f} at step {first['step']:,} to {last['valid_loss']:.3f} at step "
            f"{last['step']:,} (perplexity {last['valid_ppl']:.1f}), always at full length"
        )
    return "\n".join(lines)
