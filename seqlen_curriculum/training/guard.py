"""What is a spike of the training loss, which steps a rollback passes over, and the record of the rollbacks. No engine.

The loss ratio of a step is its training loss over the least of all earlier steps (Section 3 of the paper). A rollback
returns to a checkpoint and passes over the steps up to the spike, as Megatron's ``--iterations-to-skip`` does: their tokens
are consumed, nothing is trained on them. So a run is a function of the step and of its skipped steps, which
``rollbacks.json`` holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from seqlen_curriculum.config import TrainingConfig
from seqlen_curriculum.errors import CheckpointError, DivergenceError
from seqlen_curriculum.fields import Count, CountOrZero, Section
from seqlen_curriculum.jsonfile import replace_text

__all__ = [
    "LEDGER",
    "MOST_ROLLBACKS",
    "REMEDIES",
    "Abandoned",
    "Guard",
    "LossesSoFar",
    "Rollback",
    "Spike",
    "begun_by",
    "is_skipped",
    "read_ledger",
    "same_course",
    "skipped_window",
    "steps_to_keep",
    "write_ledger",
]

LEDGER = "rollbacks.json"
REMEDIES = (
    "Lower optimizer.params.lr, lengthen the curriculum, raise its min_difficulty or check the precision settings, then "
    "train into another --save"
)
MOST_ROLLBACKS = 10
"""Of a run. What spikes again and again is no accident of the data, and each rollback costs what it repeats."""


class Rollback(Section):
    """A spike and what was done about it."""

    step: Count
    """Of the spike."""
    loss: float | None
    """Its training loss; None if not finite."""
    ratio: float | None
    """Its loss ratio; None if not finite or without an earlier loss."""
    seqlen: Count
    lr: float
    returned_to: CountOrZero
    """The step of the checkpoint."""
    skipped: tuple[Count, Count]
    """The first and the last step passed over."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Spent on the steps and evaluations after ``returned_to`` that were logged and given up; the spike's own is not among
    them. Tells nothing of the course, as it differs from machine to machine."""

    @model_validator(mode="after")
    def _in_order(self) -> Rollback:
        if self.skipped[0] > self.skipped[1]:
            raise ValueError(f"skipped: the first step {self.skipped[0]} is after the last {self.skipped[1]}")
        return self


_ROLLBACKS = TypeAdapter(list[Rollback])


def begun_by(rollbacks: Iterable[Rollback], step: int) -> list[Rollback]:
    """Those whose skipped steps begin at or before ``step``: what the weights of the end of ``step`` depend on."""
    return [rollback for rollback in rollbacks if rollback.skipped[0] <= step]


def is_skipped(rollbacks: Iterable[Rollback], step: int) -> bool:
    """Whether ``step`` is passed over."""
    return any(first <= step <= last for first, last in (rollback.skipped for rollback in rollbacks))


def skipped_window(step: int, count: int) -> tuple[int, int]:
    """The first and the last of the ``count`` steps up to the spike at ``step``; the run's first step is 1."""
    return max(1, step - count + 1), step


def same_course(ours: Iterable[Rollback], theirs: Iterable[Rollback]) -> bool:
    """Whether both pass over the same steps, which is all that training depends on."""
    return [rollback.skipped for rollback in ours] == [rollback.skipped for rollback in theirs]


def steps_to_keep(steps: Sequence[int], keep_last: int, skip_steps: int) -> set[int]:
    """Which of the checkpoints at ``steps``, ascending, stay: the newest ``keep_last``, and one to roll back to.

    That is the newest one from before the ``skip_steps`` steps that a spike right after the newest, at n + 1, would skip: at
    n + 1 - skip_steps or earlier. A later spike skips later steps. Without such a one, the oldest stays until it is.
    """
    first, _ = skipped_window(steps[-1] + 1, skip_steps)
    old_enough = [step for step in steps if step < first]
    return {*steps[-keep_last:], old_enough[-1] if old_enough else steps[0]}


def read_ledger(save: Path) -> list[Rollback] | None:
    """The rollbacks of the run in the folder ``save``, None if nothing was written of them. Raises CheckpointError."""
    path = save / LEDGER
    try:
        return _ROLLBACKS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{path}: can't be read as a list of rollbacks, which tells the skipped steps ({error}); restore it"
        ) from error


def write_ledger(save: Path, rollbacks: Sequence[Rollback]) -> None:
    """Replace the record by ``rollbacks``; on return the disk has it. Raises CheckpointError, the old one untouched."""
    path = save / LEDGER
    text = json.dumps([rollback.model_dump(mode="json") for rollback in rollbacks], indent=2, allow_nan=False)
    try:
        replace_text(path, text)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error}); free space, then give the same command") from error


class LossesSoFar(NamedTuple):
    """What of the losses of all earlier steps it takes to judge the next one."""

    least: float = math.inf
    spiking: bool = False
    """Whether the last of them is a spike."""

    @classmethod
    def of(cls, losses: Iterable[float], spike_ratio: float) -> LossesSoFar:
        """Of finite ``losses`` in their order."""
        so_far = cls()
        for loss in losses:
            so_far = so_far.then(loss, spike_ratio)
        return so_far

    def then(self, loss: float, spike_ratio: float) -> LossesSoFar:
        """With one more."""
        return LossesSoFar(min(self.least, loss), loss > spike_ratio * self.least)

    def ratio(self, loss: float) -> float | None:
        """The loss ratio of a step of this ``loss``; None for the first one, and where it is not finite."""
        ratio = loss / self.least if 0 < self.least < math.inf else math.nan
        return ratio if math.isfinite(ratio) else None


class Spike(NamedTuple):
    """A step whose loss, gradient or validation loss is not what training may go on from. ``what`` says which, and how."""

    step: int
    seqlen: int
    lr: float
    loss: float
    ratio: float | None
    what: str
    is_finite: bool
    """All of it, so that training could go on."""

    @property
    def told(self) -> str:
        """In words."""
        return f"step {self.step}: {self.what}, at seqlen {self.seqlen} and lr {self.lr:.3g}"

    def to_rollback(self, returned_to: int, skipped: tuple[int, int], seconds: float = 0.0) -> Rollback:
        """The record of a return to the checkpoint of a step."""
        loss = self.loss if math.isfinite(self.loss) else None
        return Rollback(
            step=self.step,
            loss=loss,
            ratio=self.ratio,
            seqlen=self.seqlen,
            lr=self.lr,
            returned_to=returned_to,
            skipped=skipped,
            seconds=seconds,
        )


class Abandoned(Exception):  # noqa: N818 - no error: the loop above goes on from an earlier checkpoint
    """The course of training since some checkpoint is given up because of ``spike``."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(spike.told)
        self.spike = spike


class Guard:
    """Judges each step of a course by what all ranks have agreed on, so all of them judge alike."""

    def __init__(self, settings: TrainingConfig, rollbacks: Sequence[Rollback], so_far: LossesSoFar) -> None:
        self._settings, self._rollbacks, self._so_far = settings, rollbacks, so_far
        self._now = (0, 0, 0.0)

    def begin(self, step: int, seqlen: int, lr: float) -> bool:
        """Note where training stands. Returns whether ``step`` is to be trained, not passed over."""
        self._now = step, seqlen, lr
        return not is_skipped(self._rollbacks, step)

    def judge(self, loss: float, broken: str | None = None) -> str | None:
        """A line to say, if there is one, of the step's ``loss``; ``broken`` tells what else forbids to go on.

        Raises DivergenceError or Abandoned, as ``training.on_spike`` asks.
        """
        broken = broken if math.isfinite(loss) else f"the loss is {loss}"
        if broken is not None:
            self.give_up(broken, loss)
        before, threshold = self._so_far, self._settings.spike_ratio
        self._so_far = before.then(loss, threshold)
        if not self._so_far.spiking:
            return None
        what = (
            f"the loss {loss:.4f} is {loss / before.least:.3f} times"
            if before.least
            else f"the loss {loss:.4f} is above"
        )
        what += f" the least before it, {before.least:.4f} (training.spike_ratio {threshold})"
        if self._settings.on_spike != "log":
            self.give_up(what, loss, is_finite=True)
        return None if before.spiking else self._spike(what, loss, is_finite=True).told

    def give_up(self, what: str, loss: float = math.nan, is_finite: bool = False) -> None:
        """Don't go on from this step. Raises Abandoned where rollbacks are asked for, else DivergenceError."""
        spike = self._spike(what, loss, is_finite)
        if self._settings.on_spike == "rollback":
            raise Abandoned(spike)
        or_go_on = ' or "log", which only tells of it' if is_finite else ""
        raise DivergenceError(
            f"{spike.told}; training stops, this step is not saved and the last checkpoint is intact. {REMEDIES}; or set "
            'training.on_spike to "rollback", which goes back and passes over the steps before the spike'
            f"{or_go_on}, and give the same command"
        )

    def _spike(self, what: str, loss: float, is_finite: bool) -> Spike:
        step, seqlen, lr = self._now
        return Spike(step, seqlen, lr, loss, self._so_far.ratio(loss), what, is_finite)
