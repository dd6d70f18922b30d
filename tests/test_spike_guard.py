"""What is a spike, which steps a rollback passes over, which checkpoints it leaves: by hand, without an engine."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqlen_curriculum.config.run import TrainingConfig
from seqlen_curriculum.errors import CheckpointError, DivergenceError
from seqlen_curriculum.run_folder.ratios import ratios_to_best
from seqlen_curriculum.run_folder.rollbacks import (
    Rollback,
    begun_by,
    is_skipped,
    read_rollbacks,
    skip_same_steps,
    skipped_window,
    steps_to_keep,
    write_rollbacks,
)
from seqlen_curriculum.training.spike_guard import LossesSoFar, RollbackRequested, SpikeGuard


def rollback(first, last, **changes):
    values = {"step": last, "loss": 6.5, "ratio": 2.25, "seqlen": 32, "lr": 1e-3, "returned_to": first - 1}
    return Rollback(**{**values, "skipped": (first, last), **changes})


def guard(on_spike, losses=(), rollbacks=(), at=(7, 32, 0.001)):
    """A guard with a threshold of 1.5 after some losses, at a (step, seqlen, lr)."""
    settings = TrainingConfig(train_tokens=1000, on_spike=on_spike, spike_ratio=1.5)
    one = SpikeGuard(settings, rollbacks, LossesSoFar.of(losses, 1.5))
    one.begin(*at)
    return one


def test_spikes_by_hand():
    # minima before: -, 4, 4, 2, 2; the ratios 1.25, 0.5, 1.2 (not above), 1.5
    so_far, spiking = LossesSoFar(), []
    for loss in (4, 5, 2, 2.4, 3):
        so_far = so_far.then(loss, 1.2)
        spiking.append(so_far.spiking)
    assert spiking == [False, True, False, False, True]
    assert so_far == LossesSoFar.of((4, 5, 2, 2.4, 3), 1.2) == LossesSoFar(2, spiking=True)
    assert so_far.ratio(3) == 1.5


def test_the_first_loss_has_no_ratio():
    assert LossesSoFar().ratio(5.0) is None
    assert LossesSoFar().then(5.0, 1.2) == LossesSoFar(5.0, spiking=False)
    assert LossesSoFar(5.0).ratio(math.nan) is None
    assert LossesSoFar(0.0).ratio(1.0) is None
    assert LossesSoFar(0.0).then(1.0, 1.2).spiking


@given(st.lists(st.floats(0.01, 100), min_size=2))
def test_ratios_are_those_of_the_report(losses):
    ours = [LossesSoFar.of(losses[:number], 1.2).ratio(losses[number]) for number in range(1, len(losses))]
    assert np.array_equal(ours, ratios_to_best(losses)[1:])


@pytest.mark.parametrize(
    ("step", "count", "window"),
    [(25, 4, (22, 25)), (25, 1, (25, 25)), (10, 10, (1, 10)), (3, 10, (1, 3)), (1, 10, (1, 1))],
)
def test_the_steps_passed_over_end_with_the_spike(step, count, window):
    assert skipped_window(step, count) == window


def test_skipped_steps_of_ranges_that_overlap_and_touch():
    rollbacks = [rollback(5, 8), rollback(7, 10), rollback(11, 12)]
    assert [step for step in range(1, 20) if is_skipped(rollbacks, step)] == [5, 6, 7, 8, 9, 10, 11, 12]
    assert not is_skipped([], 1)
    assert [len(begun_by(rollbacks, step)) for step in (4, 5, 6, 7, 10, 11, 99)] == [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("steps", "keep_last", "skip_steps", "kept"),
    [
        ([0, 25], 1, 4, {0, 25}),  # a spike at 26 skips 23 to 26
        ([0, 22, 25], 1, 4, {22, 25}),  # 22 = 25 + 1 - 4
        ([0, 23, 25], 1, 4, {0, 25}),
        ([0, 25], 1, 1, {25}),  # 26 alone is skipped
        ([0, 3], 1, 9000, {0, 3}),  # the run's first steps
        ([15, 17], 1, 10, {15, 17}),  # for a spike at 25 or later, once 17 is not the newest
        ([15, 17, 20], 1, 10, {15, 20}),
        ([0, 6, 12, 18, 24], 3, 13, {12, 18, 24}),
        ([0, 6, 12, 18, 24], 3, 14, {6, 12, 18, 24}),
        ([0, 6, 12, 18, 24], 3, 0, {12, 18, 24}),  # no rollbacks
        ([7], 3, 10, {7}),
    ],
)
def test_which_checkpoints_stay_by_hand(steps, keep_last, skip_steps, kept):
    assert steps_to_keep(steps, keep_last, skip_steps) == kept


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 4), st.integers(1, 30), st.integers(1, 12))
def test_there_is_always_a_checkpoint_to_go_back_to(gaps, keep_last, skip_steps, spikes_after):
    """From step 0 on, saves at any intervals, as signals make them, and spikes that drop what they go back past."""
    steps, spike = [0], 0
    for number, gap in enumerate(gaps):
        steps = sorted(steps_to_keep([*steps, steps[-1] + gap], keep_last, skip_steps))
        assert len(steps) <= keep_last + 1
        if number % spikes_after == 0 and steps[-1] >= spike:  # the steps up to the last spike are the same as before
            spike = steps[-1] + 1
            first, _ = skipped_window(spike, skip_steps)
            assert steps[0] < first
            steps = [step for step in steps if step < first]


def test_a_spike_is_reported_once(tmp_path):
    one = guard("log", [4.0, 3.0])
    assert one.judge(4.5) is None  # 1.5 times the least, not above
    message = one.judge(4.8)
    ratio = "1.600 times the lowest before it, 3.0000 (training.spike_ratio 1.5)"
    assert message == f"step 7: the loss 4.8000 is {ratio}, at seqlen 32 and lr 0.001"
    assert one.judge(9.0) is None  # the same episode
    assert one.judge(3.0) is None
    assert one.judge(9.0) is not None


def test_an_episode_continues_after_a_resume():
    assert guard("log", [3.0, 9.0]).judge(9.0) is None
    assert guard("log", [3.0, 9.0, 3.0]).judge(9.0) is not None


def test_stop_names_what_happened_and_what_to_do():
    one = guard("stop", [3.0])
    assert one.judge(4.5) is None
    with pytest.raises(DivergenceError) as stopped:
        one.judge(6.0)
    for part in ("step 7", "the loss 6.0000 is 2.000 times", "1.5", "seqlen 32", "lr 0.001", "checkpoint is intact"):
        assert part in str(stopped.value)
    assert '"log"' in str(stopped.value)


@pytest.mark.parametrize("on_spike", ["log", "stop"])
@pytest.mark.parametrize(
    ("loss", "broken", "message"),
    [(math.nan, None, "the loss is nan"), (3.0, "the gradient norm is inf", "norm is inf")],
)
def test_what_is_not_finite_stops_the_run(on_spike, loss, broken, message):
    with pytest.raises(DivergenceError, match=f"step 7: .*{message}, at seqlen 32") as stopped:
        guard(on_spike, [3.0]).judge(loss, broken)
    assert '"log"' not in str(stopped.value)  # would stop as well


def test_a_rollback_is_requested_with_its_record():
    with pytest.raises(RollbackRequested) as raised:
        guard("rollback", [3.0]).judge(6.0)
    assert raised.value.spike[:5] == (7, 32, 0.001, 6.0, 2.0)
    assert raised.value.spike.to_rollback(2, (4, 7)) == rollback(4, 7, loss=6.0, ratio=2.0, returned_to=2)
    with pytest.raises(RollbackRequested) as raised:
        guard("rollback", [3.0]).judge(math.inf)
    assert raised.value.spike.to_rollback(2, (4, 7)) == rollback(4, 7, loss=None, ratio=None, returned_to=2)
    with pytest.raises(RollbackRequested, match="step 7: the gradient norm is nan"):
        guard("rollback").judge(3.0, "the gradient norm is nan")
    with pytest.raises(RollbackRequested, match="step 7: the validation loss is nan"):
        guard("rollback").stop_or_roll_back("the validation loss is nan")


def test_the_guard_knows_the_skipped_steps():
    one = guard("log", rollbacks=[rollback(5, 8)])
    assert [one.begin(step, 32, 0.001) for step in (4, 5, 8, 9)] == [True, False, False, True]


def test_runs_are_alike_that_skip_the_same_steps():
    assert skip_same_steps([rollback(22, 25)], [rollback(22, 25, loss=None, returned_to=3, seconds=7.5)])
    assert not skip_same_steps([rollback(22, 25)], [rollback(21, 25)])
    assert not skip_same_steps([rollback(22, 25)], [])


def test_the_ledger_comes_back(tmp_path):
    assert read_rollbacks(tmp_path) is None
    rollbacks = [rollback(22, 25), rollback(1, 3, loss=None, ratio=None, returned_to=0, lr=1 / 3, seconds=0.1)]
    write_rollbacks(tmp_path, rollbacks)
    assert read_rollbacks(tmp_path) == rollbacks
    assert json.loads((tmp_path / "rollbacks.json").read_text())[0] == {
        "step": 25,
        "loss": 6.5,
        "ratio": 2.25,
        "seqlen": 32,
        "lr": 0.001,
        "returned_to": 21,
        "skipped": [22, 25],
        "seconds": 0.0,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["rollbacks.json"]


def test_a_ledger_without_seconds_is_read(tmp_path):
    old = rollback(22, 25).model_dump(mode="json", exclude={"seconds"})
    (tmp_path / "rollbacks.json").write_text(json.dumps([old]))
    assert read_rollbacks(tmp_path) == [rollback(22, 25, seconds=0.0)]


def test_the_seconds_of_abandoned_steps_by_hand(tmp_path):
    from seqlen_curriculum.training.rollback import seconds_after

    seconds = [
        (18, "loss", 9.0),
        (18, "valid_loss", 9.0),
        (19, "loss", 0.5),
        (24, "loss", 1.0),
        (24, "valid_loss", 0.25),
    ]
    records = [{"step": step, kind: 3.0, "seconds": took} for step, kind, took in seconds]
    records.append({"step": 20, "skipped": True})
    (tmp_path / "runlog.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert seconds_after(tmp_path / "runlog.jsonl", 18) == 1.75
    assert seconds_after(tmp_path / "runlog.jsonl", 24) == 0


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"step": 3}]'])
def test_a_damaged_ledger_is_named(tmp_path, text):
    (tmp_path / "rollbacks.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"rollbacks\.json: can't be read"):
        read_rollbacks(tmp_path)


def test_skipped_steps_stand_in_their_order():
    with pytest.raises(ValueError, match="the first step 9 is after the last 8"):
        rollback(9, 8)


def test_an_unwritable_ledger_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match=r"rollbacks\.json: can't be written"):
        write_rollbacks(tmp_path / "nowhere", [])


def checkpoint(save, step, rollbacks):
    folder = save / f"global_step{step}"
    folder.mkdir()
    seen = [one.model_dump(mode="json") for one in rollbacks]
    manifest = {"step": step, "data_ranks": 1, "zero_stage": 0, "zero": {}, "run": {}, "files": {}}
    (folder / "complete.json").write_text(json.dumps({**manifest, "rollbacks": seen} if seen else manifest))


def test_checkpoints_of_an_abandoned_course_do_not_count(tmp_path):
    from seqlen_curriculum.training.checkpoint import Checkpoints

    first, second = rollback(22, 25), rollback(40, 43)
    for step, seen in {18: [], 21: [], 22: [], 24: [first], 39: [first], 40: [first], 45: [first, second]}.items():
        checkpoint(tmp_path, step, seen)
    checkpoints = Checkpoints(tmp_path, 3, {})
    assert [one.step for one in checkpoints.complete()] == [18, 21, 22, 24, 39, 40, 45]  # nothing is known yet
    checkpoints.rollbacks = [first, second]
    assert [one.step for one in checkpoints.complete()] == [18, 21, 24, 39, 45]
    checkpoints.rollbacks = [first]
    assert [one.step for one in checkpoints.complete()] == [18, 21, 24, 39, 40]
    checkpoints.rollbacks = []
    assert [one.step for one in checkpoints.complete()] == [18, 21, 22]


def test_a_signals_checkpoint_leaves_one_to_go_back_to(tmp_path):
    from seqlen_curriculum.training.checkpoint import Checkpoints

    def left_of(*steps, skip_steps):
        for step in steps:
            checkpoint(tmp_path, step, [])
        Checkpoints(tmp_path, 1, {}, skip_steps).drop_old()
        return sorted(int(path.name.removeprefix("global_step")) for path in tmp_path.iterdir())

    assert left_of(0, 25, skip_steps=10) == [0, 25]
    assert left_of(34, skip_steps=10) == [25, 34]  # a spike at 35 skips 26 to 35
    assert left_of(skip_steps=0) == [34]
