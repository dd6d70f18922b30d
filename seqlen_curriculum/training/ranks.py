"""Call functions so that all ranks get the same result, or all fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from deepspeed import comm as dist

from seqlen_curriculum.errors import CheckpointError, SeqlenCurriculumError

__all__ = ["on_all_ranks", "on_rank_0"]

T = TypeVar("T")
_FIX = "free space or fix the folder, then rerun the same command"


def on_rank_0(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and return its value on every rank, or raise CheckpointError on every rank.

    All ranks use what rank 0 reads, because a shared file system may be inconsistent between nodes.
    """
    outcome: list[Any] = [None, None]  # value, problem
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except SeqlenCurriculumError as error:
            outcome[1] = str(error)
        except OSError as error:  # not raised here, because the other ranks would wait forever
            outcome[1] = f"{error}; {_FIX}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    value: T = outcome[0]
    return value


def on_all_ranks(function: Callable[[], T]) -> list[T]:
    """Call ``function`` on every rank and return the values of all, by rank, or raise CheckpointError on every rank."""
    outcomes: list[Any] = [None] * dist.get_world_size()
    try:
        outcome: tuple[T | None, str] = (function(), "")
    except (OSError, SeqlenCurriculumError) as error:
        outcome = (None, f"rank {dist.get_rank()}: {error}")
    dist.all_gather_object(outcomes, outcome)
    for _, problem in outcomes:
        if problem:
            raise CheckpointError(f"{problem}; {_FIX}")
    return [value for value, _ in outcomes]
