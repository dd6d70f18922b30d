"""The learning rate: hand-worked values, equality with the step-wise cosine, and the torch scheduler around it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp
from seqlen_curriculum.schedule.pacing import Discrete, Root
from seqlen_curriculum.schedule.timeline import Timeline
from seqlen_curriculum.schedule.token_lr import TokenCosine, TokenCosineParams


def constant_length(steps, rows=4, seqlen=16):
    return Timeline(Discrete((seqlen,), ()), rows, steps * rows * seqlen)


def stepwise_cosine(step, warmup, steps, max_lr, min_lr):
    if step <= warmup:
        return max_lr * (step / warmup)
    if step >= steps:
        return min_lr
    return min_lr + (max_lr - min_lr) * (0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / (steps - warmup)))))


@given(st.integers(2, 400), st.integers(0, 100), st.integers(1, 64), st.integers(1, 2048), st.floats(1e-6, 1e-1))
def test_at_constant_length_equals_the_stepwise_cosine_to_the_last_bit(steps, warmup, rows, seqlen, max_lr):
    warmup = min(warmup, steps - 1)
    timeline = constant_length(steps, rows, seqlen)
    rate = TokenCosine(timeline, TokenCosineParams(warmup_steps=warmup, min_lr=max_lr / 15), max_lr)
    at = np.arange(1, steps + 3)
    assert rate(at).tolist() == [stepwise_cosine(t, warmup, steps, max_lr, max_lr / 15) for t in at.tolist()]
    assert [rate(t) for t in at.tolist()] == rate(at).tolist()


def test_values_by_hand():
    rate = TokenCosine(constant_length(8), TokenCosineParams(warmup_steps=4, min_lr=0.2), 1.0)
    # warmup a quarter a step; then 0.2 + 0.8 * (1 + cos(pi * q)) / 2 at q = 1/4, 1/2, 3/4, 1
    expected = [0.25, 0.5, 0.75, 1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2, 0.2]
    assert rate(np.arange(1, 10)) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("warmup", [{"warmup_steps": 30}, {"warmup_samples": 121}, {"warmup_tokens": 900}, {}], ids=str)
def test_first_step_is_above_zero_and_the_last_is_min_lr_under_a_curriculum(warmup):
    timeline = Timeline(Root(8, 64, 8, 100), rows=4, train_tokens=30_000)
    rate = TokenCosine(timeline, TokenCosineParams(min_lr=1e-5, **warmup), 6e-4)
    rates = rate(np.arange(1, timeline.steps + 1))
    assert rates[0] > 0
    assert rates.max() <= 6e-4
    assert rates[-2] > rates[-1] == 1e-5


@pytest.mark.parametrize(
    ("warmup", "rates"),
    [  # 4 rows of 8 tokens a step
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1]),
        ({"warmup_samples": 16}, [0.25, 0.5, 0.75, 1]),
        ({"warmup_tokens": 128}, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_the_three_warmups_agree_at_constant_length(warmup, rates):
    rate = TokenCosine(constant_length(100, rows=4, seqlen=8), TokenCosineParams(**warmup), 1.0)
    assert rate(np.arange(1, 5)).tolist() == rates
    assert rate(5) == TokenCosine(constant_length(100, 4, 8), TokenCosineParams(warmup_steps=4), 1.0)(5)


def test_a_warmup_in_samples_may_end_inside_a_step():
    # 6 samples of 8 tokens are over after one step of 4 rows and 2 rows: 48 tokens
    rate = TokenCosine(constant_length(100, rows=4, seqlen=8), TokenCosineParams(warmup_samples=6), 1.0)
    assert rate.warmup_tokens == 48
    assert rate(1) == 4 / 6
    assert rate(2) == 0.5 * (1 + math.cos(math.pi * (64 - 48) / (3200 - 48)))


def test_a_warmup_in_samples_counts_the_rows_of_a_batch_size_warmup():
    # rows 2, 2, 4, 4, ... of 8 tokens (4 from 20 tokens on): 7 samples are 2 + 2 + 3 of the third step, 56 tokens
    timeline = Timeline(Discrete((8,), ()), BatchSizeRamp(2, 2, 20, 4), train_tokens=1600)
    rate = TokenCosine(timeline, TokenCosineParams(warmup_samples=7), 1.0)
    assert rate.warmup_tokens == 56
    assert rate(np.array([1, 2])).tolist() == [2 / 7, 4 / 7]
    assert rate(3) == 0.5 * (1 + math.cos(math.pi * (64 - 56) / (1600 - 56)))


def test_decay_may_end_before_the_run():
    rate = TokenCosine(constant_length(10), TokenCosineParams(decay_tokens=5 * 64, min_lr=0.1), 1.0)
    assert rate(np.array([4, 5, 6, 10])).tolist()[1:] == [0.1, 0.1, 0.1]
    assert rate(4) > 0.1


def test_a_warmup_longer_than_the_decay_is_an_error():
    with pytest.raises(ConfigError, match=r"decay_tokens: 640 is not above the 704 tokens"):
        TokenCosine(constant_length(10), TokenCosineParams(warmup_steps=11), 1.0)


@pytest.mark.parametrize("warmup", ["warmup_steps", "warmup_samples", "warmup_tokens"])
def test_a_warmup_beyond_all_counting_is_an_error_too(warmup):
    with pytest.raises(ConfigError, match="decay_tokens: 640 is not above"):
        TokenCosine(constant_length(10), TokenCosineParams(**{warmup: 10**15}), 1.0)


def test_a_minimum_above_the_maximum_is_an_error():
    with pytest.raises(ConfigError, match=r"min_lr: 2\.0 is above optimizer\.params\.lr 1\.0"):
        TokenCosine(constant_length(10), TokenCosineParams(min_lr=2.0), 1.0)


def test_torch_scheduler_has_the_rate_of_the_step_to_come_in_force():
    torch = pytest.importorskip("torch")
    from seqlen_curriculum import TokenCosineLR

    rate = TokenCosine(Timeline(Root(8, 64, 8, 10), 4, 3_000), TokenCosineParams(warmup_steps=3), 0.5)
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.25}], lr=0.5)
    scheduler = TokenCosineLR(optimizer, rate)
    for step in range(1, 8):
        assert [group["lr"] for group in optimizer.param_groups] == [rate(step), rate(step) / 2]
        optimizer.step()
        scheduler.step()
    state = scheduler.state_dict()
    assert state == {"last_epoch": 7}
    scheduler.seek(2)
    assert scheduler.get_last_lr()[0] == rate(2)
    scheduler.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == rate(8)
