"""A run's folder as curves: what was logged, against steps, consumed tokens and hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlen_curriculum.analysis.stability import stability
from seqlen_curriculum.run_folder.ratios import ratios_to_best

__all__ = ["Run", "Series", "summarise"]

Records = list[dict[str, Any]]
Column = NDArray[np.float64]

_SPEED_POINTS = 200


@dataclass(frozen=True, eq=False)
class Series:
    """Logged values (n,) and where they stand, each (n,) too; ``hours`` are those of training and evaluation alone."""

    values: Column
    step: Column
    tokens: Column
    hours: Column

    def thinned(self, most: int = 2000) -> Series:
        """At most ``most`` points and the two ends: of each of ``most / 2`` buckets the least and the largest value.

        So the shortest spike of the longest run stays as high as it was.
        """
        if len(self.values) <= most:
            return self
        edges = np.linspace(0, len(self.values), most // 2 + 1).astype(int)
        kept = {0, len(self.values) - 1}
        for start, end in pairwise(edges):
            bucket = self.values[start:end]
            kept |= {start + int(bucket.argmin()), start + int(bucket.argmax())}
        return self[np.array(sorted(kept))]

    def __getitem__(self, chosen: NDArray[Any]) -> Series:
        return Series(self.values[chosen], self.step[chosen], self.tokens[chosen], self.hours[chosen])


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds. ``info`` is ``run.json`` ({} in a folder without), ``rollbacks`` None where none is told."""

    name: str
    records: Records
    info: dict[str, Any] = field(default_factory=dict)
    rollbacks: Records | None = None

    @cached_property
    def steps(self) -> Records:
        """Training records; steps that were skipped have no loss and are not among them."""
        return [record for record in self.records if "loss" in record]

    @cached_property
    def evaluations(self) -> Records:
        """Evaluation records."""
        return [record for record in self.records if "valid_loss" in record]

    @cached_property
    def config(self) -> dict[str, Any]:
        """As trained, all defaults and overrides in it; {} where the folder doesn't tell."""
        config = self.info.get("config")
        return config if isinstance(config, dict) else {}

    def _training(self, key: str) -> int | None:
        section = self.config.get("training")
        value = section.get(key) if isinstance(section, dict) else None
        return value if isinstance(value, int) else None

    @property
    def budget(self) -> int | None:
        """``training.train_tokens``, None where the folder doesn't tell."""
        return self._training("train_tokens")

    @cached_property
    def stability(self) -> dict[str, Any]:
        """The paper's measures, of ``stability.stability``."""
        return stability(self.steps, self.evaluations)

    @property
    def finished(self) -> bool:
        """Whether the budget is reached, and the evaluation that comes at the end is there."""
        if not self.budget or not self.records or self.records[-1]["consumed_tokens"] < self.budget:
            return False
        return not self._training("eval_interval") or "valid_loss" in self.records[-1]

    @cached_property
    def points(self) -> Records:
        """``step, consumed_tokens, hours, valid_loss, valid_ppl`` of every evaluation."""
        hours = self.series("valid_loss").hours.tolist()
        told = ("step", "consumed_tokens", "valid_loss", "valid_ppl")
        return [
            {"hours": at, **{name: record[name] for name in told}}
            for at, record in zip(hours, self.evaluations, strict=True)
        ]

    def reached(self, best: dict[str, Any] | None) -> dict[str, Any] | None:
        """The first of its ``points`` that is as good as ``best``; None if there is none of either."""
        return next((point for point in self.points if best and point["valid_loss"] <= best["valid_loss"]), None)

    @cached_property
    def _places(self) -> tuple[Column, Column, Column]:
        """Step, consumed tokens and hours at the end of every record, (records,) each."""
        step, tokens, seconds = (_column(self.records, name) for name in ("step", "consumed_tokens", "seconds"))
        # What a rollback gave up is no longer in the log, but its time was spent before what is there instead.
        given_up = sum((one.get("seconds", 0) * (step > one["returned_to"]) for one in self.rollbacks or ()), 0.0)
        return step, tokens, (np.cumsum(seconds) + given_up) / 3600

    @property
    def end(self) -> dict[str, Any]:
        """``step, consumed_tokens, hours`` of what is done, skipped steps too."""
        step, tokens, hours = (place[-1].item() for place in self._places)
        return {"step": int(step), "consumed_tokens": int(tokens), "hours": hours}

    @property
    def skipped_steps(self) -> int:
        """Steps that rollbacks passed over."""
        return sum(bool(record.get("skipped")) for record in self.records)

    @cached_property
    def _known(self) -> dict[str, Series]:
        return {}

    def series(self, name: str) -> Series:
        """The records' values of a key, where they have one; ``loss_ratio`` and ``tokens_per_second`` follow from them."""
        if name not in self._known:
            self._known[name] = self._series(name)
        return self._known[name]

    def _series(self, name: str) -> Series:
        if name == "tokens_per_second":
            return self._speed()
        if name == "loss_ratio":
            losses = self.series("loss")
            ratios = Series(ratios_to_best(losses.values), losses.step, losses.tokens, losses.hours)
            return ratios[np.arange(1, max(1, len(losses.values)))]  # the first step has none
        found = [(n, record[name]) for n, record in enumerate(self.records) if record.get(name) is not None]
        chosen = np.array([n for n, _ in found], dtype=int)
        values = np.array([value for _, value in found], dtype=np.float64)
        return Series(values, *(place[chosen] for place in self._places))

    @cached_property
    def _timed(self) -> tuple[NDArray[Any], Column, Column]:
        """(records, tokens, seconds) of the steps that were trained and whose tokens are known."""
        step, tokens, _ = self._places
        others = [(n, "loss" in record) for n, record in enumerate(self.records) if "valid_loss" not in record]
        trained = np.array([n for n, _ in others], dtype=int)
        timed = np.array([has_loss for _, has_loss in others], dtype=bool)
        last_step, before = (np.concatenate([[0.0], place[trained][:-1]]) for place in (step, tokens))
        timed &= step[trained] == last_step + 1  # of a step after others that are not in the log it tells no tokens
        chosen = trained[timed]
        return chosen, (tokens[trained] - before)[timed], _column([self.records[n] for n in chosen.tolist()], "seconds")

    @property
    def tokens_per_second(self) -> float | None:
        """Of training alone; None where no step has a time."""
        _, tokens, seconds = self._timed
        return float(tokens.sum() / seconds.sum()) if seconds.sum() else None

    def _speed(self) -> Series:
        """Means over equally many steps each, at most 200 of them, of training alone."""
        step, tokens, hours = self._places
        chosen, step_tokens, step_seconds = self._timed
        if not len(chosen):
            return Series(*[np.zeros(0)] * 4)
        starts = np.unique(np.linspace(0, len(chosen), _SPEED_POINTS, endpoint=False).astype(int))
        seconds = np.add.reduceat(step_seconds, starts)
        ends = chosen[np.append(starts[1:], len(chosen)) - 1]
        speeds = np.add.reduceat(step_tokens, starts) / np.maximum(seconds, 1e-9)
        return Series(speeds, step[ends], tokens[ends], hours[ends])


def _column(records: Sequence[dict[str, Any]], name: str) -> Column:
    return np.array([record.get(name) or 0 for record in records], dtype=np.float64)


def summarise(run: Run) -> str:
    """The run in a few lines for a terminal."""
    steps, evaluations = run.steps, run.evaluations
    seconds = sum(record["seconds"] for record in steps)
    speed = f", {run.tokens_per_second:,.0f} tokens/s" if run.tokens_per_second else ""
    end, skipped = run.end, run.skipped_steps
    lines = [
        f"steps            {end['step']:,}" + (f", {skipped:,} of them skipped by rollbacks" if skipped else ""),
        f"consumed tokens  {end['consumed_tokens']:,}",
        f"seqlen           {steps[0]['seqlen']} to {steps[-1]['seqlen']}",
        f"training loss    {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}",
        f"training time    {seconds:,.0f} s{speed}",
    ]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        lines.append(
            f"validation loss  {first['valid_loss']:.3f} at step {first['step']:,} to {last['valid_loss']:.3f} at step "
            f"{last['step']:,} (perplexity {last['valid_ppl']:.1f}), always at full length"
        )
    return "\n".join(lines)
