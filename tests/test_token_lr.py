"""The learning rate: hand-worked values, equality with step-wise loops, and the torch scheduler around it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeRamp
from seqlen_curriculum.schedule.pacing import Discrete, Root
from seqlen_curriculum.schedule.timeline import Timeline
from seqlen_curriculum.schedule.token_lr import (
    TokenCosine,
    TokenCosineParams,
    TokenLinearParams,
    TokenRate,
    TokenWSDParams,
)

REMAINING = {
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "linear": lambda x: 1.0 - x,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
}
WARMUPS = ["warmup_steps", "warmup_samples", "warmup_tokens"]
KINDS = ["cosine", "linear", "wsd 1-sqrt", "wsd linear", "wsd cosine"]


def params_of(kind, decay_tokens, **common):
    """The settings of a kind of schedule; of ``decay_tokens`` where it is a WSD."""
    if kind.startswith("wsd"):
        return TokenWSDParams(decay_tokens=decay_tokens, decay_type=kind.removeprefix("wsd "), **common)
    return {"cosine": TokenCosineParams, "linear": TokenLinearParams}[kind](**common)


def constant_length(steps, rows=4, seqlen=16):
    return Timeline(Discrete((seqlen,), ()), rows, steps * rows * seqlen)


def stepwise(kind, step, warmup, decay, steps, max_lr, min_lr):
    """The rate by steps: ``warmup`` steps up, then down to the last of ``steps``, in a WSD over ``decay`` steps."""
    start = steps - decay if kind.startswith("wsd") else warmup
    if step <= warmup:
        return max_lr * (step / warmup)
    if step <= start:
        return max_lr
    if step >= steps:
        return min_lr
    return min_lr + (max_lr - min_lr) * REMAINING[kind.removeprefix("wsd ")]((step - start) / (steps - start))


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.integers(2, 400),
    st.integers(0, 100),
    st.integers(1, 400),
    st.integers(1, 64),
    st.integers(1, 2048),
    st.floats(1e-6, 1e-1),
)
def test_at_constant_length_equals_the_stepwise_loop_to_the_last_bit(kind, steps, warmup, decay, rows, seqlen, max_lr):
    warmup = min(warmup, steps - 1)
    decay = min(decay, steps - warmup)
    timeline, at = constant_length(steps, rows, seqlen), np.arange(1, steps + 3)
    expected = [stepwise(kind, t, warmup, decay, steps, max_lr, max_lr / 15) for t in at.tolist()]
    for name, unit in zip(WARMUPS, (1, rows, rows * seqlen), strict=True):
        params = params_of(kind, decay * rows * seqlen, min_lr=max_lr / 15, **{name: warmup * unit})
        rate = TokenRate(timeline, params, max_lr)
        assert rate(at).tolist() == expected
        assert [rate(t) for t in (1, warmup + 1, steps)] == [expected[t - 1] for t in (1, warmup + 1, steps)]


def test_values_by_hand():
    rate = TokenCosine(constant_length(8), TokenCosineParams(warmup_steps=4, min_lr=0.2), 1.0)
    # warmup a quarter a step; then 0.2 + 0.8 * (1 + cos(pi * q)) / 2 at q = 1/4, 1/2, 3/4, 1
    expected = [0.25, 0.5, 0.75, 1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2, 0.2]
    assert rate(np.arange(1, 10)) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("params", "expected"),
    [  # 8 steps of 64 tokens at a rate of 1; warmup of 2 steps
        (TokenLinearParams(warmup_steps=2, min_lr=0.4), [0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4]),
        (TokenLinearParams(), [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0]),
        # The decay is that of the last 4 steps: at 1/4 of it a square root has fallen by 1/2.
        (
            TokenWSDParams(warmup_steps=2, decay_tokens=256, min_lr=0.2),
            [0.5, 1, 1, 1, 0.6, 1 - 0.8 * math.sqrt(0.5), 1 - 0.8 * math.sqrt(0.75), 0.2, 0.2],
        ),
        (
            TokenWSDParams(warmup_steps=2, decay_tokens=256, decay_type="linear"),
            [0.5, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0],
        ),
        (TokenWSDParams(warmup_steps=2, decay_tokens=1), [0.5, 1, 1, 1, 1, 1, 1, 0, 0]),
    ],
)
def test_linear_and_wsd_by_hand(params, expected):
    assert TokenRate(constant_length(8), params, 1.0)(np.arange(1, 10)) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [{"warmup_steps": 30}, {"warmup_samples": 121}, {"warmup_tokens": 900}, {}], ids=str)
def test_under_a_curriculum_the_rate_rises_above_zero_then_falls_to_exactly_min_lr(kind, warmup):
    timeline = Timeline(Root(8, 64, 8, 100), rows=4, train_tokens=30_000)
    rate = TokenRate(timeline, params_of(kind, 9_000, min_lr=1e-5, **warmup), 6e-4)
    rates = rate(np.arange(1, timeline.steps + 1))
    assert rates[0] > 0
    assert rates.max() <= 6e-4
    assert rates[-2] > rates[-1] == 1e-5
    ended = timeline.steps_to(rate.warmup_tokens)
    assert (np.diff(rates[: max(ended - 1, 0)]) > 0).all()
    assert (np.diff(rates[ended:]) <= 0).all()


def test_a_wsd_counts_tokens_under_a_batch_size_warmup_and_a_ramp():
    # rows 2 until 160 tokens are consumed, then 4; lengths 8, 16 and 32 from steps 1, 6 and 11: 16 tokens in steps 1 to 5
    # (80), 32 in steps 6 to 8 (176), 64 in steps 9 and 10 (304), then 128: 432, 560, 688, 816
    timeline = Timeline(Discrete((8, 16, 32), (5, 10)), BatchSizeRamp(2, 2, 160, 4), train_tokens=800)
    assert timeline.consumed_tokens(np.arange(1, 15)).tolist() == [
        16, 32, 48, 64, 80, 112, 144, 176, 240, 304, 432, 560, 688, 816,
    ]  # fmt: skip
    rate = TokenRate(timeline, TokenWSDParams(warmup_tokens=64, decay_tokens=400, decay_type="linear"), 1.0)
    expected = [0.25, 0.5, 0.75, *[1] * 7, 1 - 32 / 400, 1 - 160 / 400, 1 - 288 / 400, 0]
    assert rate(np.arange(1, 15)).tolist() == expected
    assert rate.decay == ("linear", 400, 800)


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


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            TokenWSDParams(decay_tokens=700),
            "decay_tokens: 700 and the 0 tokens of the learning rate warmup are more than",
        ),
        (
            TokenWSDParams(decay_tokens=600, warmup_steps=1),
            r"decay_tokens: 600 and the 64 tokens .* training.train_tokens 640",
        ),
        (TokenWSDParams(decay_tokens=1, warmup_steps=10**15), "decay_tokens: 1 and the 704 tokens"),
        (TokenLinearParams(warmup_steps=10), "decay_tokens: 640 is not above the 640 tokens"),
    ],
)
def test_a_decay_that_does_not_fit_is_an_error(params, message):
    with pytest.raises(ConfigError, match=rf"^scheduler\.params\.{message}"):
        TokenRate(constant_length(10), params, 1.0)


def test_warmup_and_decay_may_fill_the_run():
    rate = TokenRate(constant_length(4), TokenWSDParams(decay_tokens=128, warmup_steps=2, decay_type="linear"), 1.0)
    assert rate(np.arange(1, 5)).tolist() == [0.5, 1, 0.5, 0]


@pytest.mark.parametrize("params", [TokenCosineParams(min_lr=2.0), TokenWSDParams(min_lr=2.0, decay_tokens=1)])
def test_a_minimum_above_the_maximum_is_an_error(params):
    with pytest.raises(ConfigError, match=r"min_lr: 2\.0 is above optimizer\.params\.lr 1\.0"):
        TokenRate(constant_length(10), params, 1.0)


def test_torch_scheduler_has_the_rate_of_the_step_to_come_in_force():
    torch = pytest.importorskip("torch")
    from seqlen_curriculum import TokenCosineLR, TokenLR

    rate = TokenCosine(Timeline(Root(8, 64, 8, 10), 4, 3_000), TokenCosineParams(warmup_steps=3), 0.5)
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.25}], lr=0.5)
    scheduler = TokenLR(optimizer, rate)
    assert isinstance(scheduler, TokenCosineLR)
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
