"""A run's ``rollbacks.json``: the steps that its rollbacks skip, and the spikes that caused them.

A rollback returns to a checkpoint and skips the steps up to the spike, like Megatron's ``--iterations-to-skip``: their
tokens are consumed but not trained on. So a run's weights are a function of the step and of the skipped steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, model_validator

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.fields import Count, CountOrZero, Section
from seqlen_curriculum.files import replace_text
from seqlen_curriculum.run_folder import ROLLBACKS
from seqlen_curriculum.run_folder.json_file import read_checked

__all__ = [
    "Rollback",
    "begun_by",
    "is_skipped",
    "read_rollbacks",
    "skip_same_steps",
    "skipped_window",
    "steps_to_keep",
    "write_rollbacks",
]


class Rollback(Section):
    """A spike and the steps that were skipped because of it."""

    step: Count
    """The step of the spike."""
    loss: float | None
    """Its training loss; None if not finite."""
    ratio: float | None
    """Its loss ratio; None if not finite or without an earlier loss."""
    seqlen: Count
    lr: float
    returned_to: CountOrZero
    """The step of the checkpoint."""
    skipped: tuple[Count, Count]
    """The first and the last skipped step."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds of the discarded steps and evaluations after ``returned_to``, without the step of the spike. Depends on the
    machine, so it doesn't affect training."""

    @model_validator(mode="after")
    def _in_order(self) -> Rollback:
        if self.skipped[0] > self.skipped[1]:
            raise ValueError(f"skipped: the first step {self.skipped[0]} is after the last {self.skipped[1]}")
        return self


_SCHEMA = TypeAdapter(list[Rollback])


def begun_by(rollbacks: Iterable[Rollback], step: int) -> list[Rollback]:
    """Return the rollbacks whose skipped steps start at or before ``step``, on which the weights after ``step`` depend."""
    return [rollback for rollback in rollbacks if rollback.skipped[0] <= step]


def is_skipped(rollbacks: Iterable[Rollback], step: int) -> bool:
    """Return whether one of ``rollbacks`` skips ``step``."""
    return any(first <= step <= last for first, last in (rollback.skipped for rollback in rollbacks))


def skipped_window(step: int, count: int) -> tuple[int, int]:
    """Return the first and the last of the ``count`` steps up to the spike at ``step``; the run's first step is 1."""
    return max(1, step - count + 1), step


def skip_same_steps(one: Iterable[Rollback], other: Iterable[Rollback]) -> bool:
    """Return whether both skip the same steps, so that weights trained with one are valid for the other."""
    return [rollback.skipped for rollback in one] == [rollback.skipped for rollback in other]


def steps_to_keep(steps: Sequence[int], keep_last: int, skip_steps: int, always: Iterable[int] = ()) -> set[int]:
    """Return the checkpoints to keep of those at ``steps``, ascending: the newest ``keep_last``, ``always``, and one more.

    The last one is for a rollback: the newest from before all steps that a spike at the next step would skip, or the oldest
    if there is none.
    """
    # With checkpoints at 12, 18 and 24 and skip_steps 8, a spike at 25 would skip 18 to 25, so 12 is kept. A later spike
    # skips later steps, so it can use the same checkpoint.
    first, _ = skipped_window(steps[-1] + 1, skip_steps)
    old_enough = [step for step in steps if step < first]
    return {*always, *steps[-keep_last:], old_enough[-1] if old_enough else steps[0]}


def read_rollbacks(save: Path) -> list[Rollback] | None:
    """Return the rollbacks of the run in the folder ``save``, None without the file. Raises CheckpointError."""
    return read_checked(save / ROLLBACKS, _SCHEMA, "restore it: it lists the steps that the run skips")


def write_rollbacks(save: Path, rollbacks: Sequence[Rollback]) -> None:
    """Replace ``rollbacks.json`` and flush it to disk. Raises CheckpointError; the old file is then unchanged."""
    path = save / ROLLBACKS
    text = json.dumps([rollback.model_dump(mode="json") for rollback in rollbacks], indent=2, allow_nan=False)
    try:
        replace_text(path, text)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error}); free space, then rerun the same command") from error
