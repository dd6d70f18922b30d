"""DeepSpeed's ``curriculum_learning`` block: what is accepted, and the message for what is refused."""

import pytest
from helpers.settings import LINEAR, block

from seqlen_curriculum import ConfigError
from seqlen_curriculum.schedule.curriculum_config import parse_curriculum
from seqlen_curriculum.schedule.shortening import Shortening


def test_the_method_in_the_block():
    assert parse_curriculum(block()).shortening() == Shortening("truncate", 1024)
    assert parse_curriculum(block(method="segment")).shortening(2048) == Shortening("segment", 2048)
    assert parse_curriculum(block(method="window", restart_positions=True)).restart_positions
    with pytest.raises(ConfigError, match=r"curriculum_learning.method: 'windows' is not valid: .*'truncate'"):
        parse_curriculum(block(method="windows"))
    with pytest.raises(ConfigError, match=r'restart_positions: true .*"window"'):
        parse_curriculum(block(method="segment", restart_positions=True))


BAD = {
    "length 0": (block(min_difficulty=0), "min_difficulty: 0 is not valid"),
    "negative length": (block(min_difficulty=-3), "min_difficulty: -3 is not valid"),
    "empty ramp": (block({"total_curriculum_step": 0, "difficulty_step": 8}), "total_curriculum_step: 0 is not valid"),
    "no rung": (block({"total_curriculum_step": 9, "difficulty_step": 0}), "difficulty_step: 0 is not valid"),
    "min above max": (block(min_difficulty=2048), "min_difficulty 2048 is above max_difficulty 1024"),
    "rung above max": (
        block({"total_curriculum_step": 9, "difficulty_step": 2000}),
        "difficulty_step 2000 .*min_difficulty 8 .*max_difficulty 1024",
    ),
    "negative root": (
        block({**LINEAR["schedule_config"], "root_degree": -1}, schedule_type="fixed_root"),
        "root_degree: -1 is not valid",
    ),
    "root missing": (block(schedule_type="fixed_root"), "root_degree: required"),
    "typo": (
        block({"total_curriculum_steps": 9, "difficulty_step": 8}),
        "unknown key; did you mean 'total_curriculum_step'?",
    ),
    "unknown type": (block(schedule_type="linear"), "did you mean 'fixed_linear'?"),
    "no type": ({"min_difficulty": 8}, "schedule_type: required"),
    "other metric": (block(curriculum_type="vocab"), "curriculum_type: 'vocab' is not valid"),
    "string number": (block(min_difficulty="8"), "min_difficulty: '8' is not valid"),
    "boolean number": (block(min_difficulty=True), "min_difficulty: True is not valid"),
    "half a token": (block(min_difficulty=8.5), "min_difficulty: 8.5 is not valid"),
    "two durations": (
        block({"total_curriculum_step": 9, "curriculum_fraction": 0.3, "difficulty_step": 8}),
        "total_curriculum_step and curriculum_fraction are given; give exactly one",
    ),
    "no duration": (block({"difficulty_step": 8}), "give exactly one of total_curriculum_step"),
    "fraction above 1": (
        block({"curriculum_fraction": 1.5, "difficulty_step": 8}),
        "curriculum_fraction: 1.5 is not valid",
    ),
    "stages don't match": (
        block({"difficulty": [8, 16], "max_step": [5, 10]}, schedule_type="fixed_discrete"),
        "difficulty has 2 entries and max_step 2",
    ),
    "stages go back": (
        block({"difficulty": [8, 16, 32], "max_step": [10, 10]}, schedule_type="fixed_discrete"),
        "does not increase",
    ),
    "stage outside": (
        block({"difficulty": [8, 4096], "max_step": [10]}, schedule_type="fixed_discrete"),
        r"\[4096\] are outside min_difficulty 8 to max_difficulty 1024",
    ),
    "turns don't match": (
        block({"difficulty": [8, 16], "steps": [5]}, schedule_type="fixed_mixed"),
        "difficulty has 2 entries and steps 1; give each length its steps",
    ),
    "turn outside": (
        block({"difficulty": [4, 16], "steps": [5, 5]}, schedule_type="fixed_mixed"),
        r"\[4\] are outside min_difficulty 8 to max_difficulty 1024",
    ),
    "turn of no steps": (
        block({"difficulty": [8, 16], "steps": [5, 0]}, schedule_type="fixed_mixed"),
        "steps.1: 0 is not valid",
    ),
    "empty turns": (block({"difficulty": [], "steps": []}, schedule_type="fixed_mixed"), "difficulty: "),
    "empty stages": (block({"difficulty": [], "max_step": []}, schedule_type="fixed_discrete"), "difficulty: "),
    "no such function": (block({"function": "math:nothing"}, schedule_type="custom"), "can't be imported"),
    "not a function": (block({"function": "math:pi"}, schedule_type="custom"), "is a float, not a function"),
    "not a path": (block({"function": "math"}, schedule_type="custom"), "write 'package.module:function'"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_malformed_blocks_are_refused_by_name(bad, message):
    with pytest.raises(ConfigError, match=message):
        parse_curriculum(bad)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_curriculum(block({"difficulty_steps": 8}, min_difficulty=0, colour="red"))
    assert len(caught.value.problems) == 4
    assert "4 problems" in str(caught.value)
