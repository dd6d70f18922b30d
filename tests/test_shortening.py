"""How a sample is shortened to a length, by hand."""

import numpy as np
import pytest

from seqlen_curriculum.schedule.pacing import Discrete, Root
from seqlen_curriculum.schedule.ramp_duration import ramp_steps_for_fraction, ramp_steps_for_tokens
from seqlen_curriculum.schedule.shortening import TRUNCATE, Shortening
from seqlen_curriculum.schedule.timeline import Timeline


@pytest.mark.parametrize(
    ("method", "seqlen", "rows", "row_tokens", "used"),
    [
        ("truncate", 3, 1, 3, 3),
        ("truncate", 10, 1, 10, 10),
        ("segment", 1, 10, 1, 10),
        ("segment", 3, 3, 3, 9),
        ("segment", 6, 1, 6, 6),
        ("segment", 10, 1, 10, 10),
        ("window", 3, 1, 10, 10),
        ("window", 10, 1, 10, 10),
    ],
)
def test_a_sample_of_ten_tokens(method, seqlen, rows, row_tokens, used):
    shortening = Shortening(method, 10)
    assert (
        shortening.rows_per_sample(seqlen),
        shortening.tokens_per_row(seqlen),
        shortening.used_tokens_per_sample(seqlen),
    ) == (rows, row_tokens, used)
    for function in (shortening.rows_per_sample, shortening.tokens_per_row, shortening.used_tokens_per_sample):
        assert function(np.array([seqlen, 10])).tolist() == [function(seqlen), function(10)]
    assert (
        1
        <= shortening.least_used_tokens(seqlen)
        <= min(shortening.used_tokens_per_sample(length) for length in range(seqlen, 11))
    )


def test_truncation_needs_no_full_length():
    assert TRUNCATE.used_tokens_per_sample(7) == 7


def test_segments_in_a_timeline():
    # lengths 3, 3, 6, 10, ...; 2 samples of 10 tokens: 6 rows of 3, 2 of 6, 2 of 10
    timeline = Timeline(Discrete((3, 6, 10), (2, 3)), 2, 75, Shortening("segment", 10))
    steps = np.arange(1, 6)
    assert timeline.samples(steps).tolist() == [2] * 5
    assert timeline.rows(steps).tolist() == [6, 6, 2, 2, 2]
    assert timeline.consumed_tokens(np.arange(6)).tolist() == [0, 18, 36, 48, 68, 88]
    assert (timeline.steps, timeline.consumed_samples(5)) == (5, 10)
    assert timeline.shapes() == [(6, 3), (2, 6), (2, 10)]
    assert timeline.lengths() == [3, 6, 10]
    used = timeline.tokens_by_sample()
    assert used.at(np.arange(1, 9)).tolist() == [9, 9, 9, 9, 6, 6, 10, 10]


def test_windows_in_a_timeline():
    timeline = Timeline(Discrete((3, 10), (2,)), 2, 75, Shortening("window", 10))
    assert timeline.consumed_tokens(np.arange(5)).tolist() == [0, 20, 40, 60, 80]
    assert (timeline.steps, timeline.shapes(), timeline.lengths()) == (4, [(2, 10)], [3, 10])


def test_ramps_given_in_tokens_and_as_a_share_count_the_tokens_of_the_method():
    def ramp(steps):
        return Root(2, 10, 2, steps)

    for method in ("truncate", "segment", "window"):
        shortening = Shortening(method, 10)
        for tokens in (1, 20, 99, 1000):
            steps = ramp_steps_for_tokens(ramp, 2, tokens, shortening)
            assert Timeline(ramp(steps), 2, tokens, shortening).consumed_tokens(steps) >= tokens
            assert steps == 1 or Timeline(ramp(steps - 1), 2, tokens, shortening).consumed_tokens(steps - 1) < tokens
        steps = ramp_steps_for_fraction(ramp, 2, 1000, 0.5, shortening)
        assert steps <= 0.5 * Timeline(ramp(steps), 2, 1000, shortening).steps
        assert steps + 1 > 0.5 * Timeline(ramp(steps + 1), 2, 1000, shortening).steps
    assert ramp_steps_for_tokens(ramp, 2, 99, Shortening("window", 10)) == 5  # 20 tokens a step
