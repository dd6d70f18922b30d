"""The search itself, of one answer from verdicts alone: which schedule to probe next, and when to stop.

The paper's Section 4: (1) start at a length of 8 with T of a few LR warmups; (2) raise the length until the validation
perplexity has no significant fluctuation at the very beginning; (3) search the largest T without one during the first few
LR warmups by bisection. The largest T comes first in (3): its steps are the shortest, so it is the cheapest to probe, and
where it is stable nothing else need be. The verdicts decide everything, so a search is resumed by telling them again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["BudgetSpent", "Candidate", "Outcome", "Probe", "Space", "search", "tune", "upcoming"]


class Candidate(NamedTuple):
    """What is tuned of a schedule."""

    min_difficulty: int
    total_steps: int
    """T, ``total_curriculum_step``."""


class Probe(NamedTuple):
    """The question whether a schedule is stable up to a step."""

    candidate: Candidate
    until_step: int


@dataclass(frozen=True)
class Space:
    """What is searched."""

    lengths: tuple[int, ...]
    """``min_difficulty`` to try, ascending."""
    totals: tuple[int, ...]
    """T to try, ascending."""
    first_total: int
    """Of them the one that lengths are probed with."""
    beginning_steps: int
    """The very beginning, over which a length must be stable."""
    probe_steps: int
    """The first few LR warmups, over which a T must be stable."""
    eval_interval: int = 1
    """Steps between the evaluations of a probe."""


class BudgetSpent(Exception):  # noqa: N818 - no error: the search ends with what it has
    """Raised by a probe that the budget cut off."""


class Outcome(NamedTuple):
    """What a search came to."""

    best: Candidate | None
    """Stable for ``probe_steps``; None if none was found."""
    complete: bool
    """Whether it is the answer, not just the best until the budget ended."""
    verdicts: list[tuple[Probe, bool]]
    """Each probe in its order, and whether it was stable."""


def search(space: Space) -> Generator[Probe, bool, Candidate | None]:
    """Yields probes, is sent whether each was stable, returns the answer: None if no schedule is."""
    for length in space.lengths:
        if (yield Probe(Candidate(length, space.first_total), space.beginning_steps)):
            total = yield from _largest_stable(space, length)
            if total is not None:
                return Candidate(length, total)
    return None


def _largest_stable(space: Space, length: int) -> Generator[Probe, bool, int | None]:
    """The largest T that is stable, or a stable one where stability is not monotone."""
    start = space.totals.index(space.first_total)
    top = space.totals[-1]
    if (yield Probe(Candidate(length, top), space.probe_steps)):
        return top
    # The smaller T are, the dearer: those below the first are only looked at where none from it on is stable.
    above = yield from _bisect(space, length, space.totals[start:-1])
    return above if above is not None else (yield from _bisect(space, length, space.totals[:start]))


def _bisect(space: Space, length: int, totals: Sequence[int]) -> Generator[Probe, bool, int | None]:
    stable, unstable = -1, len(totals)
    while unstable - stable > 1:
        middle = (stable + unstable) // 2
        if (yield Probe(Candidate(length, totals[middle]), space.probe_steps)):
            stable = middle
        else:
            unstable = middle
    return totals[stable] if stable >= 0 else None


def upcoming(space: Space, verdicts: Sequence[bool]) -> Probe | Candidate | None:
    """What follows after these verdicts: the next probe, or the answer."""
    questions = search(space)
    try:
        question = next(questions)
        for verdict in verdicts:
            question = questions.send(verdict)
    except StopIteration as answer:
        found: Candidate | None = answer.value
        return found
    return question


def tune(space: Space, probe: Callable[[Probe], bool], affordable: Callable[[Probe], bool] = lambda _: True) -> Outcome:
    """Search with ``probe``, which tells whether a schedule is stable, to the answer or the end of the budget.

    That is the first probe not ``affordable``, or one that raises BudgetSpent.
    """
    verdicts: list[tuple[Probe, bool]] = []
    while isinstance(question := upcoming(space, [stable for _, stable in verdicts]), Probe):
        try:
            if not affordable(question):
                raise BudgetSpent
            verdicts.append((question, probe(question)))
        except BudgetSpent:
            return Outcome(_best_so_far(space, verdicts), False, verdicts)
    return Outcome(question, True, verdicts)


def _best_so_far(space: Space, verdicts: Sequence[tuple[Probe, bool]]) -> Candidate | None:
    """The largest T that was stable for long enough, at the last length that was tried."""
    stable = [one.candidate for one, is_stable in verdicts if is_stable and one.until_step >= space.probe_steps]
    return max(stable, default=None)
