"""The record of a run's rollbacks, ``rollbacks.json``: which steps were passed over, and why.

A rollback returns to a checkpoint and passes over the steps up to the spike, as Megatron's ``--iterations-to-skip`` does:
their tokens are consumed, nothing is trained on them. So a run is a function of the step and of its skipped steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.fields import Count, CountOrZero, Section
from seqlen_curriculum.files import replace_text

__all__ = [
    "ROLLBACKS",
    "Rollback",
    "begun_by",
    "is_skipped",
    "read_rollbacks",
    "same_course",
    "skipped_window",
    "steps_to_keep",
    "write_rollbacks",
]

ROLLBACKS = "rollbacks.json"


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


def steps_to_keep(steps: Sequence[int], keep_last: int, skip_steps: int, always: Iterable[int] = ()) -> set[int]:
    """Which of the checkpoints at ``steps``, ascending, stay: the newest ``keep_last``, ``always``, and one to roll back to.

    That is the newest one from before the ``skip_steps`` steps that a spike right after the newest, at n + 1, would skip: at
    n + 1 - skip_steps or earlier. A later spike skips later steps. Without such a one, the oldest stays until it is.
    """
    first, _ = skipped_window(steps[-1] + 1, skip_steps)
    old_enough = [step for step in steps if step < first]
    return {*always, *steps[-keep_last:], old_enough[-1] if old_enough else steps[0]}


def read_rollbacks(save: Path) -> list[Rollback] | None:
    """The rollbacks of the run in the folder ``save``, None if nothing was written of them. Raises CheckpointError."""
    path = save / ROLLBACKS
    try:
        return _ROLLBACKS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{path}: can't be read as a list of rollbacks, which tells the skipped steps ({error}); restore it"
        ) from error


def write_rollbacks(save: Path, rollbacks: Sequence[Rollback]) -> None:
    """Replace the record by ``rollbacks``; on return the disk has it. Raises CheckpointError, the old one untouched."""
    path = save / ROLLBACKS
    text = json.dumps([rollback.model_dump(mode="json") for rollback in rollbacks], indent=2, allow_nan=False)
    try:
        replace_text(path, text)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error}); free space, then give the same command") from error
