"""The run by arithmetic: the paper's Table 2, hand-worked sums, and equality with step-by-step counting."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.adjusted_pacing import bucketed
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp
from seqlen_curriculum.schedule.custom_pacing import Custom
from seqlen_curriculum.schedule.global_batch import BatchGrowth
from seqlen_curriculum.schedule.pacing import Discrete, Mixed, Root
from seqlen_curriculum.schedule.ramp_duration import ramp_steps_for_fraction, ramp_steps_for_tokens
from seqlen_curriculum.schedule.timeline import Timeline

BUDGET = 157_286_400_000


@pytest.mark.parametrize(
    ("rows", "minimum", "maximum", "ramp", "steps", "at", "tokens"),
    [  # Table 2: steps to the budget, and tokens where the paper states them
        (512, 8, 1024, 60_000, "330.0K", 200_000, "89B"),
        (4096, 8, 1024, 30_000, "52.5K", 37_000, "92B"),
        (512, 8, 2048, 110_000, "205.0K", 122_500, "71B"),
        (512, 64, 1024, 270_000, "427.6K", 360_000, "122B"),  # printed as 428K
        (4096, 64, 1024, 45_000, "58.8K", 50_000, "121B"),
    ],
)
def test_table_2_of_the_paper(rows, minimum, maximum, ramp, steps, at, tokens):
    timeline = Timeline(Root(minimum, maximum, 8, ramp), rows, BUDGET)
    assert f"{timeline.steps / 1e3:.1f}K" == steps
    assert f"{timeline.consumed_tokens(at) / 1e9:.0f}B" == tokens
    assert timeline.first_step_at(maximum) == ramp


def test_tokens_by_hand():
    # lengths 8, 8, 16, 16, 32, 32, ... of 4 rows: 32, 64, 128, 192, 320, 448, 576
    timeline = Timeline(Discrete((8, 16, 32), (2, 4)), rows=4, train_tokens=450)
    assert timeline.consumed_tokens(np.arange(8)).tolist() == [0, 32, 64, 128, 192, 320, 448, 576]
    assert timeline.steps == 7
    assert timeline.first_step_at(32) == 5
    assert timeline.shapes() == [(4, 8), (4, 16), (4, 32)]
    assert timeline.consumed_samples(7) == 28
    lengths, tokens = timeline.tokens_by_length()
    assert (lengths.tolist(), tokens.tolist()) == ([8, 16, 32], [64, 128, 384])


@pytest.mark.parametrize(("tokens", "steps"), [(447, 6), (448, 6), (449, 7), (1, 1), (32, 1), (33, 2)])
def test_stops_at_the_first_step_that_reaches_the_budget(tokens, steps):
    assert Timeline(Discrete((8, 16, 32), (2, 4)), rows=4, train_tokens=tokens).steps == steps


def test_a_run_that_ends_inside_its_ramp():
    timeline = Timeline(Root(8, 1024, 8, 1000), rows=1, train_tokens=100)
    assert timeline.first_step_at(1024) is None
    assert max(seqlen for _, seqlen in timeline.shapes()) == timeline.seqlen(timeline.steps) < 1024


def test_a_custom_schedule_is_followed_to_the_budget_however_long():
    timeline = Timeline(Custom(1, 4, 1, function=lambda step: 1 + step % 4), rows=1, train_tokens=500_000)
    assert timeline.steps == 200_000  # 2.5 tokens a step on average
    assert timeline.consumed_tokens(4) == 2 + 3 + 4 + 1


def test_a_custom_function_is_asked_for_the_steps_of_the_run_and_no_others():
    table = [8] * 60 + [16] * 40 + [64] * 41  # 480 + 640 + 2,624 tokens per row: 141 steps
    asked = []

    def look_up(step):
        asked.append(step)
        return table[step - 1]

    for rows in (4, BatchSizeRamp(2, 2, 40, 4), BatchGrowth(4, 50)):
        asked.clear()
        steps = np.arange(1, 142)
        lengths, consumed = np.array(table), 0
        for step in range(141):
            consumed += rows_of_step(rows, consumed, table[step]) * table[step]
        timeline = Timeline(Custom(8, 64, 8, function=look_up), rows, train_tokens=consumed)
        assert asked == list(range(1, 142))
        assert (timeline.steps, timeline.seqlen(steps).tolist()) == (141, lengths.tolist())
        assert asked == list(range(1, 142))


def test_alternating_lengths_over_trillions_of_steps():
    # 4 rows of 8 and 16 tokens in turn: 96 tokens in two steps, and 10**15 tokens are 10,416,666,666,666 of them and 64 more
    timeline = Timeline(Mixed((8, 16), (1, 1)), 4, 10**15)
    assert timeline.steps == 2 * 10_416_666_666_666 + 2
    assert timeline.consumed_tokens(timeline.steps) == 96 * 10_416_666_666_667
    assert timeline.seqlen(timeline.steps - 1) == 8
    lengths, tokens = timeline.tokens_by_length()
    assert (lengths.tolist(), tokens.tolist()) == ([8, 16], [32 * 10_416_666_666_667, 64 * 10_416_666_666_667])
    assert timeline.steps_to(96 * 10**12 + 1) == 2 * 10**12 + 1
    with pytest.raises(ConfigError, match=r"data.leftovers: recycle needs a list .* this run has 20,833,333,333,334"):
        timeline.tokens_by_sample()


def test_alternating_lengths_in_a_batch_that_grows():
    # 1 row until 60 tokens are consumed, then 3: steps of 8, 16, 8, 16, 8, 16 tokens reach 72, then 24, 48, ...
    timeline = Timeline(Mixed((8, 16), (1, 1)), BatchSizeRamp(1, 2, 60, 3), 72 + 72 * 10**12)
    assert timeline.consumed_tokens(np.arange(5, 9)).tolist() == [56, 72, 96, 144]
    assert timeline.steps == 6 + 2 * 10**12
    assert [part.tolist() for part in timeline.kinds_of_steps()] == [[8, 8, 16, 16], [1, 3, 1, 3], [3, 10**12] * 2]


def test_what_is_too_long_to_plan_is_refused_by_its_key():
    custom = Custom(8, 1024, 8, function=lambda step: pytest.fail(f"asked for step {step}"))
    with pytest.raises(ConfigError, match=r"training.train_tokens: 10{15} take more than 524,288 steps"):
        Timeline(custom, 512, 10**15)
    with pytest.raises(ConfigError, match=r"difficulty_step: 1 gives a ramp of 16,777,216 lengths.*raise it to 129 or"):
        Timeline(Root(1, 2**24, 1, 10**9), 1, 10**15)
    timeline = Timeline(Mixed((*range(1, 1001),), (1,) * 1000), BatchSizeRamp(1, 1, 10**11, 4000), 10**12)
    with pytest.raises(ConfigError, match=r"increment: 4,000 levels with 1,000 lengths in each cycle"):
        timeline.shapes()


def test_a_long_ramp_in_a_short_run_is_planned():
    # 16 million lengths, of which a run of 10**6 tokens in 1,000 steps reaches the first ones
    timeline = Timeline(Root(1, 2**24, 1, 10**9), 1, 10**6)
    lengths = 1 + (np.arange(1, timeline.steps + 1) * (2**24 - 1)) // 10**9
    assert np.cumsum(lengths)[-1] >= 10**6 > np.cumsum(lengths)[-2]
    assert timeline.seqlen(np.arange(1, timeline.steps + 1)).tolist() == lengths.tolist()
    assert Timeline(Root(1, 2**24, 1, 7), 1, 2**27).lengths() == [1 + (2**24 - 1) * step // 7 for step in range(1, 8)]


schedules = st.one_of(
    st.builds(
        lambda low, rungs, rung, total: Root(low * rung, (low + rungs) * rung, rung, total),
        st.integers(1, 4),
        st.integers(0, 20),
        st.integers(1, 8),
        st.integers(1, 300),
    ),
    st.builds(
        lambda lengths, gaps: Discrete(
            tuple(lengths[: len(gaps) + 1]), tuple(np.cumsum(gaps[: len(lengths) - 1]).tolist())
        ),
        st.lists(st.integers(1, 64), min_size=4, max_size=6),
        st.lists(st.integers(1, 40), min_size=3, max_size=3),
    ),
    st.builds(
        lambda turns: Mixed(*zip(*turns, strict=True)),
        st.lists(st.tuples(st.integers(1, 64), st.integers(1, 40)), min_size=1, max_size=4),
    ),
    st.just(Custom(4, 64, 4, function=lambda step: 7 * step % 80)),
).flatmap(lambda pacing: st.sampled_from([pacing, bucketed(pacing, pacing.lowest)]))

batches = st.one_of(
    st.integers(1, 16),
    st.builds(
        lambda start, increment, increments, tokens: BatchSizeRamp(
            start, increment, tokens, start + increments * increment
        ),
        st.integers(1, 8),
        st.integers(1, 4),
        st.integers(1, 12),
        st.integers(1, 60_000),
    ),
    st.builds(BatchGrowth, st.integers(1, 16), st.integers(1, 2000)),
)


def rows_of_step(rows, consumed, seqlen):
    if isinstance(rows, BatchGrowth):
        multiples = sorted([2**power for power in range(12)] + [3 * 2**power for power in range(12)])
        return rows.final * next(m for m in multiples if m * rows.final * seqlen >= rows.min_tokens)
    return rows if isinstance(rows, int) else rows(consumed)


@given(schedules, batches, st.integers(1, 50_000))
def test_arithmetic_equals_counting(pacing, rows, budget):
    timeline = Timeline(pacing, rows, budget)
    consumed, read, shapes = [0], [0], []
    while consumed[-1] < budget:
        seqlen = pacing(len(shapes) + 1)
        shapes.append((rows_of_step(rows, consumed[-1], seqlen), seqlen))
        read.append(read[-1] + shapes[-1][0])
        consumed.append(consumed[-1] + shapes[-1][0] * shapes[-1][1])
    steps = np.arange(1, len(shapes) + 1)
    assert timeline.steps == len(shapes)
    for ask, answers in ((timeline.consumed_tokens, consumed[1:]), (timeline.consumed_samples, read[1:])):
        assert [ask(step) for step in steps.tolist()] == ask(steps).tolist() == answers
    assert list(zip(timeline.rows(steps).tolist(), timeline.seqlen(steps).tolist(), strict=True)) == shapes
    assert [timeline.rows(step) for step in steps.tolist()] == [step_rows for step_rows, _ in shapes]
    assert timeline.shapes() == sorted(set(shapes), key=lambda shape: shape[::-1])
    for step in {1, len(shapes) // 2 + 1, len(shapes)}:
        assert timeline.steps_to(consumed[step]) == timeline.steps_to(consumed[step - 1] + 1) == step
        assert timeline.steps_to_samples(read[step]) == timeline.steps_to_samples(read[step - 1] + 1) == step
    for step_rows, seqlen in timeline.shapes():
        assert timeline.first_step_of_samples(step_rows) == 1 + [r for r, _ in shapes].index(step_rows)
        assert timeline.first_step_at(seqlen) == 1 + [s for _, s in shapes].index(seqlen)
    kinds = zip(*(part.tolist() for part in timeline.kinds_of_steps()), strict=True)
    assert [((samples, seqlen), count) for seqlen, samples, count in kinds] == sorted(
        Counter(shapes).items(), key=lambda kind: kind[0][::-1]
    )
    lengths, tokens = timeline.tokens_by_length()
    assert lengths.tolist() == timeline.lengths() == sorted({seqlen for _, seqlen in shapes})
    assert tokens.tolist() == [sum(r * s for r, s in shapes if s == seqlen) for seqlen in lengths.tolist()]
    by_sample = timeline.tokens_by_sample()
    assert by_sample.at(np.array(read) + 1)[:-1].tolist() == [seqlen for _, seqlen in shapes]
    assert by_sample.total(np.array(read)).tolist() == np.cumsum([0, *(r * s for r, s in shapes)]).tolist()


def test_a_batch_size_warmup_by_hand():
    # lengths 8, 8, 16, 16, ...; 2 rows until 40 tokens are consumed, then 4: 16, 32, 64 (past 40), 128, 192
    timeline = Timeline(Discrete((8, 16), (2,)), BatchSizeRamp(2, 2, 40, 4), train_tokens=180)
    assert timeline.rows(np.arange(1, 6)).tolist() == [2, 2, 2, 4, 4]
    assert timeline.consumed_tokens(np.arange(6)).tolist() == [0, 16, 32, 64, 128, 192]
    assert timeline.consumed_samples(np.arange(6)).tolist() == [0, 2, 4, 6, 10, 14]
    assert (timeline.steps, timeline.global_batch, timeline.first_step_of_samples(4)) == (5, 4, 4)
    assert timeline.shapes() == [(2, 8), (2, 16), (4, 16)]
    assert [timeline.steps_to_samples(rows) for rows in (1, 6, 7, 10, 11)] == [1, 3, 4, 4, 5]
    lengths, tokens = timeline.tokens_by_length()
    assert (lengths.tolist(), tokens.tolist()) == ([8, 16], [32, 160])


def test_a_batch_that_a_short_run_never_reaches():
    timeline = Timeline(Discrete((8,), ()), BatchSizeRamp(2, 2, 10_000, 4), train_tokens=160)
    assert (timeline.steps, timeline.first_step_of_samples(4), timeline.shapes()) == (10, None, [(2, 8)])


def test_a_long_run_of_many_shapes_costs_little():
    started = time.perf_counter()
    timeline = Timeline(Root(8, 1024, 8, 270_000), BatchSizeRamp(16, 16, 40_000_000_000, 512), BUDGET)
    assert timeline.steps > 400_000
    assert 128 < len(timeline.shapes()) < 128 + 32
    assert time.perf_counter() - started < 0.2  # it takes a millisecond; a loaded machine may take more


@given(batches, st.integers(1, 40_000), st.floats(0.5, 4), st.sampled_from([None, 24]))
def test_a_ramp_in_tokens_consumes_them_and_one_step_less_does_not(rows, tokens, degree, bucket):
    def ramp(total):
        return bucketed(Root(8, 128, 8, total, degree), bucket)

    def ramp_tokens(total):
        consumed = 0
        for seqlen in ramp(total)(np.arange(1, total + 1)).tolist():
            consumed += rows_of_step(rows, consumed, seqlen) * seqlen
        return consumed

    total = ramp_steps_for_tokens(ramp, rows, tokens)
    assert ramp_tokens(total) >= tokens
    assert total == 1 or ramp_tokens(total - 1) < tokens


@given(batches, st.integers(2_000, 400_000), st.integers(1, 100), st.sampled_from([None, 24]))
def test_a_ramp_as_a_fraction_fits_it_and_one_step_more_does_not(rows, budget, percent, bucket):
    def ramp(total):
        return bucketed(Root(8, 128, 8, total), bucket)

    total = ramp_steps_for_fraction(ramp, rows, budget, percent / 100)
    assert total == 1 or 100 * total <= percent * Timeline(ramp(total), rows, budget).steps
    assert 100 * (total + 1) > percent * Timeline(ramp(total + 1), rows, budget).steps


def test_a_fraction_is_the_decimal_as_written():
    # 0.29 * 100 is 28.999999999999996 in floats; at constant length the run has 100 steps whatever T is
    assert ramp_steps_for_fraction(lambda total: Root(8, 8, 8, total), 1, 800, 0.29) == 29
