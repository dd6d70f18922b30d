"""The function of a custom schedule is called once for each step in a whole command."""

import gc
import json
import pickle
from collections import Counter

import numpy as np
import pytest
from helpers.command import slw
from helpers.settings import block

from seqlen_curriculum import RunConfig
from seqlen_curriculum.config.equivalence import trains_identically
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.schedule import custom_pacing
from seqlen_curriculum.schedule.custom_pacing import Custom

MODULE = """
asked = []
def lengths(step):
    asked.append(step)
    return 8 * step
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The module of the function ``lengths``, which lists the steps it was ``asked`` for."""
    (tmp_path / "counted_lengths.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "counted_lengths", raising=False)
    import counted_lengths

    return counted_lengths


@pytest.fixture
def run(tmp_path, mine):
    with CorpusWriter(tmp_path / "corpus", 257) as writer:
        writer.add_document(np.arange(200))
    schedule = {"function": "counted_lengths:lengths", "difficulty_step": 8}
    return {
        "train_batch_size": 4,
        "curriculum_learning": block(schedule, schedule_type="custom", max_difficulty=64),
        "data": {"train": [str(tmp_path / "corpus")], "seq_length": 64, "split": "1"},
        "training": {"train_tokens": 4_000},
    }


def test_all_timelines_of_a_file_share_the_lengths(run, mine):
    config = RunConfig.from_dict(run)
    steps = config.plan.steps
    for ranks in (1, 2, 4):
        on_ranks = config.for_ranks(ranks)
        assert on_ranks.plan.timeline.consumed_tokens(8) == 4 * 8 * 36
        assert on_ranks.plan.steps == steps
        assert on_ranks.plan.scheduler.get_difficulty(3) == 24
    assert mine.asked == list(range(1, steps + 1))
    again = pickle.loads(pickle.dumps(config.plan.timeline))
    assert again.seqlen(3) == 24
    assert RunConfig.from_dict(run).plan.steps == steps  # a file that is read again, as by a check before a resume
    assert len(mine.asked) == steps
    del config, on_ranks
    gc.collect()
    assert RunConfig.from_dict(run).plan.steps == steps
    assert len(mine.asked) == 2 * steps


@pytest.mark.parametrize(
    "command",
    [
        ["plan"],
        ["plan", "--set", "training.seqlen_bucket=16"],
        ["plan", "--ranks", "2"],
        ["inspect"],
        ["inspect", "--step", "3", "--ranks", "2"],
    ],
)
def test_a_command_asks_once_for_each_step(run, mine, tmp_path, command):
    (tmp_path / "run.json").write_text(json.dumps(run))
    name, *flags = command
    result = slw(name, tmp_path / "run.json", *flags)
    assert result.returncode == 0, result.stderr
    assert set(Counter(mine.asked).values()) == {1}
    assert 3 in mine.asked


def test_two_runs_of_one_function_are_compared_by_asking_once(run, mine):
    config = RunConfig.from_dict(run)
    one = config.settings()
    assert trains_identically(one, {**one, "training.train_tokens": 8_000}, 10)
    assert set(Counter(mine.asked).values()) == {1}


def test_steps_after_the_kept_ones_are_asked_again(monkeypatch):
    asked = []
    custom = Custom(8, 64, 8, function=lambda step: asked.append(step) or 8 * step)
    monkeypatch.setattr(custom_pacing, "MOST_ASKED", 5)
    steps = np.arange(8)
    assert custom(steps).tolist() == [8, 8, 16, 24, 32, 40, 48, 56]
    assert custom(steps).tolist() == [custom(step) for step in range(8)]
    assert Counter(asked) == {**dict.fromkeys(range(6), 1), 6: 3, 7: 3}
