"""What only DeepSpeed can refuse is one line, with its cause; other errors pass unchanged."""

import deepspeed
import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from seqlen_curriculum import ConfigError
from seqlen_curriculum.training.refusals import initialize_deepspeed


def out_of_memory(**_):
    raise RuntimeError("can't allocate memory")


def read_only(config):
    return (DeepSpeedConfig(config),)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"elasticity": {}}, "DeepSpeedConfigError: Elastic training has been removed"),
        ({"train_batch_size": 1, "communication_data_type": "fp8"}, "ValueError: Invalid communication_data_type"),
        (
            {"train_batch_size": 1, "zero_optimization": {"stage": 4}},
            "zero_optimization.stage: 4 is not valid in DeepSpeed",
        ),
        ({"train_batch_size": 1, "fp16": {"enabled": "x"}}, "fp16.enabled: 'x' is not valid in DeepSpeed"),
        (
            {"train_batch_size": 1, "checkpoint": {"tag_validation": "x"}},
            "DeepSpeedConfigError: Checkpoint config contains",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else list(value)[-1],
)
def test_a_refusal_of_deepspeeds_is_one_line(monkeypatch, config, cause):
    monkeypatch.setattr(deepspeed, "initialize", read_only)
    with pytest.raises(ConfigError) as caught:
        initialize_deepspeed(config=config)
    (problem,) = caught.value.problems
    assert cause in problem
    assert "\n" not in problem


def test_other_errors_pass_unchanged(monkeypatch):
    monkeypatch.setattr(deepspeed, "initialize", out_of_memory)
    with pytest.raises(RuntimeError, match="allocate"):
        initialize_deepspeed(config={})
    assert deepspeed.set_optimizer_flags.__module__ == "deepspeed"
