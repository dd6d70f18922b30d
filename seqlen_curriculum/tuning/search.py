"""The search for the one answer, from verdicts alone: which schedule to probe next, and when to stop.

The paper's Section 4: (1) start at a length of 8 with T of a few LR warmups; (2) raise the length until the validation
perplexity has no significant fluctuation at the very beginning; (3) search the largest T without one during the first few
LR warmups by bisection. In (3) the largest T comes first: its steps are the shortest, so it is the cheapest to probe, and
if it is stable no other T has to be probed. The verdicts decide everything, so sending them again resumes a search.
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
    """The question whether a schedule is stable up to a step."""

    candidate: Candidate
    until_step: int


@dataclass(frozen=True)
class Space:
    """The values that are searched."""

    lengths: tuple[int, ...]
    """``min_difficulty`` to try, ascending."""
    totals: tuple[int, ...]
    """T to try, ascending."""
    first_total: int
    """The one of ``totals`` that lengths are probed with."""
    beginning_steps: int
    """The very beginning, over which a length must be stable."""
    probe_steps: int
    """The first few LR warmups, over which a T must be stable."""
    eval_interval: int = 1
    """Steps between the evaluations of a probe."""


class BudgetSpent(Exception):  # noqa: N818 - no error: the search ends with the best schedule so far
    """Raised by a probe that the budget cut off."""


class Outcome(NamedTuple):
    """The result of a search."""

    best: Candidate | None
    """Stable for ``probe_steps``; None if none was found."""
    complete: bool
    """Whether it is the answer, not just the best until the budget ended."""
    verdicts: list[tuple[Probe, bool]]
    """Each probe in its order, and whether it was stable."""


def search(space: Space) -> Generator[Probe, bool, Candidate | None]:
    """Yield probes, receive whether each was stable, and return the answer: None if no schedule is stable."""
    for length in space.lengths:
        if (yield Probe(Candidate(length, space.first_total), space.beginning_steps)):
            total = yield from _largest_stable(space, length)
            if total is not None:
                return Candidate(length, total)
    return None


def _largest_stable(space: Space, length: int) -> Generator[Probe, bool, int | None]:
    """Return the largest T that is stable, or a stable one where stability is not monotone."""
    start = space.totals.index(space.first_total)
    top = space.totals[-1]
    if (yield Probe(Candidate(length, top), space.probe_steps)):
        return top
    # A smaller T is dearer to probe: those below the first are only searched if none from it on is stable.
    above = yield from _bisect(space, length, space.totals[start:-1])
    if above is not None:
        return above
    return (yield from _bisect(space, length, space.totals[:start]))


def _bisect(space: Space, length: int, totals: Sequence[int]) -> Generator[Probe, bool, int | None]:
    # Invariant: all up to ``stable`` count as stable, all from ``unstable`` on as unstable. At first these are the places
    # before and behind ``totals``, so 7 values take at most 3 probes.
    stable, unstable = -1, len(totals)
    while unstable - stable > 1:
        middle = (stable + unstable) // 2
        if (yield Probe(Candidate(length, totals[middle]), space.probe_steps)):
            stable = middle
        else:
            unstable = middle
    return totals[stable] if stable >= 0 else None


def upcoming(space: Space, verdicts: Sequence[bool]) -> Probe | Candidate | None:
    """Return what follows after these verdicts: the next probe, or the answer."""
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
    """Search with ``probe``, which returns whether a schedule is stable, to the answer or the end of the budget.

    The budget ends with the first probe that is not ``affordable``, or that raises BudgetSpent. The best so far is then the
    largest T that was stable for ``probe_steps``, at the last length that was tried.
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
