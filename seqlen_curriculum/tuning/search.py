"""The search algorithm: choose the next schedule to probe from the verdicts so far, and stop at the result.

The paper's Section 4: (1) Start at a length of 8 with a T of a few LR warmups. (2) Raise the length until the validation
perplexity has no significant fluctuation at the beginning of training. (3) Search the largest T without one during the
first few LR warmups by bisection. In (3) the largest T is probed first: its steps are the shortest, so it is the cheapest
to probe, and if it is stable the search ends. The state depends only on the verdicts, so replaying them resumes a search.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["BudgetSpent", "Candidate", "Outcome", "Probe", "Space", "search", "tune", "upcoming"]


class Candidate(NamedTuple):
    """The tuned values of a schedule."""

    min_difficulty: int
    total_steps: int
    """T, ``total_curriculum_step``."""


class Probe(NamedTuple):
    """A test of whether a schedule is stable up to a step."""

    candidate: Candidate
    until_step: int


@dataclass(frozen=True)
class Space:
    """The values to search."""

    lengths: tuple[int, ...]
    """``min_difficulty`` to try, ascending."""
    totals: tuple[int, ...]
    """T to try, ascending."""
    first_total: int
    """The T in ``totals`` used to probe lengths."""
    beginning_steps: int
    """Steps over which a length must be stable: the beginning of training."""
    probe_steps: int
    """Steps over which a T must be stable: the first few LR warmups."""
    eval_interval: int = 1
    """Steps between the evaluations of a probe."""


class BudgetSpent(Exception):  # noqa: N818 - not an error: the search ends with the best schedule so far
    """Raised by a probe that exceeds the budget."""


class Outcome(NamedTuple):
    """The result of a search."""

    best: Candidate | None
    """The best schedule that is stable for ``probe_steps``, None if none was found."""
    complete: bool
    """True if it is the result of a complete search, false if the budget ended first."""
    verdicts: list[tuple[Probe, bool]]
    """All probes in order, each with whether it was stable."""


def search(space: Space) -> Generator[Probe, bool, Candidate | None]:
    """Yield probes, receive whether each was stable, and return the result, None if no schedule is stable."""
    for length in space.lengths:
        if (yield Probe(Candidate(length, space.first_total), space.beginning_steps)):
            total = yield from _largest_stable(space, length)
            if total is not None:
                return Candidate(length, total)
    return None


def _largest_stable(space: Space, length: int) -> Generator[Probe, bool, int | None]:
    """Return the largest stable T, or some stable T if stability is not monotone."""
    start = space.totals.index(space.first_total)
    top = space.totals[-1]
    if (yield Probe(Candidate(length, top), space.probe_steps)):
        return top
    # A smaller T costs more to probe, so those below the first are searched only if none from it on is stable.
    above = yield from _bisect(space, length, space.totals[start:-1])
    if above is not None:
        return above
    return (yield from _bisect(space, length, space.totals[:start]))


def _bisect(space: Space, length: int, totals: Sequence[int]) -> Generator[Probe, bool, int | None]:
    # Invariant: all up to ``stable`` count as stable, all from ``unstable`` on as unstable. Initially these are the indices
    # before and after ``totals``, so 7 values take at most 3 probes.
    stable, unstable = -1, len(totals)
    while unstable - stable > 1:
        middle = (stable + unstable) // 2
        if (yield Probe(Candidate(length, totals[middle]), space.probe_steps)):
            stable = middle
        else:
            unstable = middle
    return totals[stable] if stable >= 0 else None


def upcoming(space: Space, verdicts: Sequence[bool]) -> Probe | Candidate | None:
    """Return the next probe after these verdicts, or the result."""
    questions = search(space)
    try:
        question = next(questions)
        for verdict in verdicts:
            question = questions.send(verdict)
    except StopIteration as end:
        answer: Candidate | None = end.value
        return answer
    return question


def tune(space: Space, probe: Callable[[Probe], bool], affordable: Callable[[Probe], bool] = lambda _: True) -> Outcome:
    """Search with ``probe``, which returns whether a schedule is stable, until the result or the end of the budget.

    The budget ends with the first probe that is not ``affordable``, or that raises BudgetSpent. The outcome is then the
    largest T that was stable for ``probe_steps`` at the last length.
    """
    verdicts: list[tuple[Probe, bool]] = []
    while isinstance(question := upcoming(space, [stable for _, stable in verdicts]), Probe):
        try:
            if not affordable(question):
                raise BudgetSpent
            verdicts.append((question, probe(question)))
        except BudgetSpent:
            long_enough = [asked for asked, stable in verdicts if stable and asked.until_step >= space.probe_steps]
            return Outcome(max((asked.candidate for asked in long_enough), default=None), False, verdicts)
    return Outcome(question, True, verdicts)
