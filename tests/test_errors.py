"""Messages of errors, whose names of files and keys may hold any character."""

import pytest

from seqlen_curriculum.errors import CheckpointError, ConfigError, DataError, DivergenceError


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, DivergenceError])
def test_characters_that_a_terminal_obeys_are_escaped(kind):
    assert str(kind("a\x1b[31m\x00\x9b\u202e\udcff: é, \u00d7")) == r"a\x1b[31m\x00\x9b\u202e\udcff: é, ×"


def test_problems_stand_on_lines_of_their_own():
    error = ConfigError(["a\x07: x", "b: y"], "run\x1b.json")
    assert str(error) == "run\\x1b.json: 2 problems\n  - a\\x07: x\n  - b: y"
    assert error.problems == ["a\\x07: x", "b: y"]
