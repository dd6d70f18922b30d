"""The search on synthetic landscapes: which schedules it asks for, in which order, and what it answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.tuning.search import Candidate, Probe, Space, search, tune, upcoming

TOTALS = (10, 20, 40, 80, 160, 320, 640)
SPACE = Space(lengths=(8, 16, 32), totals=TOTALS, first_total=40, beginning_steps=5, probe_steps=15)


def asked(outcome):
    return [(*probe.candidate, probe.until_step, stable) for probe, stable in outcome.verdicts]


def test_everything_stable_takes_two_probes():
    outcome = tune(SPACE, lambda _: True)
    assert asked(outcome) == [(8, 40, 5, True), (8, 640, 15, True)]
    assert (outcome.best, outcome.complete) == (Candidate(8, 640), True)


def test_nothing_stable_tries_every_length_at_its_beginning_only():
    outcome = tune(SPACE, lambda _: False)
    assert asked(outcome) == [(8, 40, 5, False), (16, 40, 5, False), (32, 40, 5, False)]
    assert (outcome.best, outcome.complete) == (None, True)


def test_the_largest_stable_duration_by_bisection():
    outcome = tune(SPACE, lambda probe: probe.candidate.total_steps <= 160)
    # after the largest, of 40, 80, 160, 320: the middle, then between
    assert asked(outcome) == [
        (8, 40, 5, True),
        (8, 640, 15, False),
        (8, 80, 15, True),
        (8, 160, 15, True),
        (8, 320, 15, False),
    ]
    assert outcome.best == Candidate(8, 160)


def test_a_beginning_that_fluctuates_raises_the_length():
    outcome = tune(SPACE, lambda probe: probe.candidate.min_difficulty >= 32)
    assert asked(outcome) == [(8, 40, 5, False), (16, 40, 5, False), (32, 40, 5, True), (32, 640, 15, True)]
    assert outcome.best == Candidate(32, 640)


def test_durations_below_the_first_are_looked_at_last():
    outcome = tune(SPACE, lambda probe: probe.until_step == 5 or probe.candidate.total_steps <= 10)
    durations = [probe.candidate.total_steps for probe, _ in outcome.verdicts]
    assert durations == [40, 640, 80, 40, 10, 20]
    assert outcome.best == Candidate(8, 10)


def test_a_length_without_any_stable_duration_gives_way_to_the_next():
    def only_at_the_beginning(probe):
        return probe.candidate.min_difficulty == 16 or probe.until_step == 5

    outcome = tune(SPACE, only_at_the_beginning)
    assert outcome.best == Candidate(16, 640)
    assert [one.candidate.min_difficulty for one, _ in outcome.verdicts].count(8) == 5  # 40, 640, 80, 40, 10


def test_a_budget_ends_it_with_the_best_so_far():
    spent = []

    def affordable(probe):
        spent.append(probe)
        return len(spent) <= 3

    outcome = tune(SPACE, lambda probe: probe.candidate.total_steps <= 160, affordable)
    assert asked(outcome) == [(8, 40, 5, True), (8, 640, 15, False), (8, 80, 15, True)]
    assert (outcome.best, outcome.complete) == (Candidate(8, 80), False)
    # stable at the very beginning alone is no answer
    outcome = tune(SPACE, lambda _: True, lambda probe: probe.until_step == 5)
    assert (outcome.best, outcome.complete) == (None, False)


@given(st.integers(0, len(TOTALS)), st.sampled_from(SPACE.lengths))
def test_every_monotone_landscape_is_answered_exactly(stable, least_length):
    largest = TOTALS[stable - 1] if stable else 0

    def probe(one):
        if one.candidate.min_difficulty < least_length:
            return False
        return one.until_step == SPACE.beginning_steps or one.candidate.total_steps <= largest

    outcome = tune(SPACE, probe)
    assert outcome.best == (Candidate(least_length, largest) if stable else None)


@given(st.data())
def test_on_any_noise_it_ends_and_answers_what_was_stable(data):
    seen = {}

    def probe(one):
        return seen.setdefault(one, data.draw(st.booleans()))

    outcome = tune(SPACE, probe)
    asked_for = [one for one, _ in outcome.verdicts]
    assert len(asked_for) == len(set(asked_for)) <= 3 * (1 + len(TOTALS))
    if outcome.best is not None:
        assert seen[Probe(outcome.best, SPACE.probe_steps)]
    # given its own verdicts again it answers the same: so is it resumed
    assert upcoming(SPACE, [stable for _, stable in outcome.verdicts]) == outcome.best


def test_a_single_duration_is_probed_once():
    space = Space(lengths=(8,), totals=(40,), first_total=40, beginning_steps=5, probe_steps=15)
    assert asked(tune(space, lambda probe: probe.until_step == 5)) == [(8, 40, 5, True), (8, 40, 15, False)]
    assert next(search(space)) == Probe(Candidate(8, 40), 5)


@pytest.mark.parametrize("verdicts", [[], [True], [True, False]])
def test_what_is_upcoming_is_what_the_search_asks_next(verdicts):
    questions = search(SPACE)
    question = next(questions)
    for verdict in verdicts:
        question = questions.send(verdict)
    assert upcoming(SPACE, verdicts) == question
