"""DeepSpeed's ``curriculum_learning`` block: what is accepted, and the message for what is refused."""

import pytest
from helpers.settings import block
from helpers.wrong_files import WRONG_BLOCKS

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


@pytest.mark.parametrize(("bad", "message"), WRONG_BLOCKS.values(), ids=WRONG_BLOCKS)
def test_malformed_blocks_are_refused_by_name(bad, message):
    with pytest.raises(ConfigError, match=message):
        parse_curriculum(bad)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_curriculum(block({"difficulty_steps": 8}, min_difficulty=0, colour="red"))
    assert len(caught.value.problems) == 4
    assert "4 problems" in str(caught.value)
