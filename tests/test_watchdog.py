"""A rank that hangs ends with its stacks; this file is also the script of the two ranks of which one hangs."""

import json
import re
import sys
import threading
from pathlib import Path

import pytest

from seqlen_curriculum.errors import HUNG

HANGS_AT = 3


def test_the_limit_by_hand():
    from seqlen_curriculum.training.watchdog import hang_limit

    assert hang_limit([], 512) == 3600
    assert hang_limit([(512, 300.0)], 512) == 50 * 300
    assert hang_limit([(512, 2.0)] * 5, 512) == 600  # 50 x 2 s are less
    assert hang_limit([(512, 900.0), (512, 20.0), (512, 20.0)], 512) == 50 * 20  # the first one compiled
    assert hang_limit([(8 * 512, 2.0)] * 5, 1024 * 512) == 50 * 2 * 128
    assert hang_limit([(1024 * 512, 60.0)] * 5, 8 * 512) == 50 * 60


@pytest.fixture
def ended(monkeypatch):
    """What a watchdog would have ended: (step, limit) each; its process goes on."""
    from seqlen_curriculum.training import watchdog

    calls = []
    monkeypatch.setattr(watchdog, "_end_process", lambda *call: calls.append(call))
    return calls


def watched(**options):
    from seqlen_curriculum.training.watchdog import Watchdog

    options = {"hang_seconds": 0.2, "consumed_tokens": lambda step: 100 * step, **options}
    return Watchdog(**options)


def wait(seconds):
    threading.Event().wait(seconds)


def test_a_step_that_does_not_end_is_found(ended):
    dog = watched()
    with dog.step(1):
        pass
    wait(0.5)  # an evaluation or a checkpoint
    assert ended == []
    with dog.step(2):
        wait(1.0)
    dog.close()
    assert ended[0] == (2, 0.2)


def test_skipped_steps_say_nothing_about_the_time_of_others():
    dog = watched(hang_seconds=None)
    with dog.step(1, is_skipped=True):
        pass
    assert dog.limit(2) == 3600  # as of a first step
    with dog.step(2):
        pass
    dog.close()
    assert dog.limit(3) == 600


def test_compilation_does_not_count(ended):
    import torch

    dog = watched(compiles=True)
    handler = torch._dynamo.callback.callback_handler
    with dog.step(1):
        with handler.install_callbacks(torch._dynamo.callback.CallbackTrigger.DYNAMO, "0"):
            wait(0.6)
        assert ended == []
        wait(0.6)
    assert ended
    dog.close()
    assert dog._compile_begins not in handler.start_callbacks


def test_zero_switches_it_off(ended):
    before = threading.active_count()
    dog = watched(hang_seconds=0)
    assert threading.active_count() == before
    with dog.step(1):
        pass
    dog.close()


def test_the_default_limit_follows_the_steps_so_far():
    dog = watched(hang_seconds=None, consumed_tokens=lambda step: 100 * step**2)
    assert dog.limit(1) == 3600
    dog._ended.extend([(1, 20.0), (2, 60.0)])  # 100 and 300 tokens: 0.2 s a token; step 4 has 700
    assert dog.limit(4) == pytest.approx(50 * 0.2 * 700)
    dog.close()


def test_all_ranks_show_where_they_hang(tiny_run, tmp_path):
    from helpers.launching import forked, launch, limit

    run = {**tiny_run, "training": {**tiny_run["training"], "hang_seconds": limit(3), "preflight": False}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    status, output = launch(tmp_path / "log", __file__, tmp_path, ranks=2, launcher=forked)
    assert status == HUNG, output
    for rank in (0, 1):
        assert f"rank {rank}: step {HANGS_AT} has not ended within {limit(3):g} s (training.hang_seconds; 0" in output
    assert re.search(r"rank 1: +File .* in hangs\n", output)
    assert re.search(r"rank 0: +File .* in all_reduce\n", output)
    assert len((tmp_path / "save" / "runlog.jsonl").read_text().splitlines()) == HANGS_AT - 1


def main(folder):
    import deepspeed

    from seqlen_curriculum import RunConfig
    from seqlen_curriculum.data.from_config import open_run_data
    from seqlen_curriculum.training.executor import DataParallel
    from seqlen_curriculum.training.pretrain import pretrain

    train = DataParallel.train

    def hangs(self, *arguments):
        if self.data_rank == 1 and self.engine.global_steps == HANGS_AT - 1:
            threading.Event().wait()
        return train(self, *arguments)

    DataParallel.train = hangs
    deepspeed.init_distributed()
    config = RunConfig.load(folder / "run.json")
    pretrain(config, *open_run_data(config), folder / "save")


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
