"""Whose error it is when ``deepspeed.initialize`` fails: the configuration's, or that of the code it calls back."""

import deepspeed
import pytest

from seqlen_curriculum import ConfigError
from seqlen_curriculum.training.engine import build_engine


@pytest.mark.parametrize("error", [TypeError("lr"), KeyError("lr"), AssertionError("lr"), ValueError("lr")])
def test_what_deepspeed_and_its_optimizers_refuse_is_the_configurations_error(monkeypatch, error):
    def refuse(**_):
        raise error

    for module in ("deepspeed.runtime.config", "torch.optim.adam", "pydantic.main"):
        refusing = type(refuse)(refuse.__code__, {"__name__": module}, closure=refuse.__closure__)
        monkeypatch.setattr(deepspeed, "initialize", refusing)
        with pytest.raises(ConfigError, match=rf"DeepSpeed refuses .*: {type(error).__name__}: .*lr"):
            build_engine({}, None)


def test_what_the_standard_library_refuses_for_deepspeed_is_the_configurations_error(monkeypatch):
    from deepspeed.runtime.config import DtypeEnum  # an enum: the frame that raises is the standard library's

    def look_up(**_):
        return DtypeEnum("foo")

    in_deepspeed = type(look_up)(
        look_up.__code__, {"__name__": "deepspeed.runtime.engine", "DtypeEnum": DtypeEnum}, closure=look_up.__closure__
    )
    monkeypatch.setattr(deepspeed, "initialize", in_deepspeed)
    with pytest.raises(ConfigError, match=r"DeepSpeed refuses .*foo"):
        build_engine({}, None)


@pytest.mark.parametrize("error", [TypeError("ours"), ValueError("ours"), ConfigError("scheduler.params.min_lr: 2")])
def test_an_error_of_code_that_deepspeed_calls_back_passes_unchanged(monkeypatch, error):
    def rate(max_lr):
        raise error

    class Optimizer:
        param_groups = ({"lr": 1.0},)

    monkeypatch.setattr(deepspeed, "initialize", lambda lr_scheduler, **_: lr_scheduler(Optimizer()))
    with pytest.raises(type(error)) as raised:
        build_engine({}, None, rate)
    assert raised.value is error


def test_a_monitor_without_its_key_is_named(monkeypatch):
    class UsageError(Exception):
        __module__ = "wandb.errors"

    def connect(**_):
        raise UsageError("No API key configured")

    monkeypatch.setattr(deepspeed, "initialize", connect)
    with pytest.raises(ConfigError, match=r"wandb: No API key configured; .* wandb\.enabled"):
        build_engine({}, None)
