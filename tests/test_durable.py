"""A checkpoint survives what machines do: power cuts, bad disks, full disks, kills at any moment; in the background too."""

import json
import os
import random
import resource
import shutil
import stat
import time
from pathlib import Path

import pytest
from helpers.launching import forked, running
from helpers.parts import Part, do_parts, launch_parts
from helpers.runs import TRAIN, assert_same_run, do_run, has_reached, records

BOTH = ("plain", "background")
BACKGROUND = "training.async_checkpoints=true"
SHARDS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")
RANK_1S = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, tiny_run):
    path = tmp_path_factory.mktemp("durable-config") / "run.json"
    path.write_text(json.dumps({**tiny_run, "zero_optimization": {"stage": 1}}))
    return path


@pytest.fixture(scope="module")
def durable(tmp_path_factory, run_file):
    """Runs of two ranks, in one launch: what each left in its folder, by its name."""
    folder = tmp_path_factory.mktemp("durable")

    def part(name, *sets, after=None, **more):
        arguments = {"config": str(run_file), "sets": list(sets), "save": str(folder / name), "resume": "auto"}
        return Part(name, arguments | more, after=after)

    def copy(name, *sets, **more):
        return part(name, *sets, after="plain", copy_of=str(folder / "plain"), **more)

    named = str(folder / "named" / "global_step46")
    parts = [
        part("plain", records_calls=True, umask=0o022),
        part("background", BACKGROUND, umask=0o077),
        copy("flipped", flipped={"global_step46": RANK_1S}),
        copy("all-flipped", flipped={"global_step46": SHARDS[0], "global_step42": "model.safetensors"}, fails=True),
        copy("named", flipped={"global_step46": RANK_1S}, fails=True, resume=named),
        copy("other", "training.seed=7", flipped={"global_step46": RANK_1S}, fails=True),
        part("full", file_bytes_of_rank_1=20_000, fails=True),
        part("full-background", BACKGROUND, file_bytes_of_rank_1=20_000, fails=True),
    ]
    return folder, launch_parts(folder, __file__, parts, ranks=2)


def do_durable(save, umask=0o022, records_calls=False, copy_of=None, flipped=None, file_bytes_of_rank_1=None, **run):
    """``do_run`` in a copy with ``flipped`` files, by checkpoint, or with a largest size of the files of the second rank."""
    rank, calls, umask_before = int(os.environ["RANK"]), [], os.umask(umask)
    fsync, replace = os.fsync, os.replace
    if copy_of and rank == 0:
        shutil.copytree(copy_of, save, dirs_exist_ok=True)
        for checkpoint, name in flipped.items():
            flip(Path(save) / checkpoint / name)
    if records_calls:
        os.fsync = lambda file: (calls.append([time.monotonic(), "fsync", path_of(file), ""]), fsync(file))
        os.replace = lambda a, b: (calls.append([time.monotonic(), "replace", str(a), str(b)]), replace(a, b))
    if file_bytes_of_rank_1 and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes_of_rank_1, resource.RLIM_INFINITY))
    try:
        do_run(save=save, **run)
    finally:
        os.fsync, os.replace = fsync, replace
        os.umask(umask_before)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if records_calls:
        (Path(save) / f"calls.rank{rank}.json").write_text(json.dumps(calls))


def path_of(file):
    return os.readlink(f"/proc/self/fd/{file}")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_all_is_on_disk_before_a_checkpoint_gets_its_name(durable):
    folder, results = durable
    _ = results["plain"]
    save = folder / "plain"
    calls = [call for rank in (0, 1) for call in json.loads((save / f"calls.rank{rank}.json").read_text())]
    final, unfinished = save / "global_step6", save / ".global_step6.tmp"
    [named] = [at for at, _, source, target in calls if (source, target) == (str(unfinished), str(final))]
    flushed = {
        Path(path).name: at for at, call, path, _ in calls if call == "fsync" and Path(path).parent == unfinished
    }
    files = json.loads((save / "global_step42" / "complete.json").read_text())["files"]
    assert {*files} >= {*SHARDS, RANK_1S, "model.safetensors", "config.json"}
    assert {*files} <= {*flushed}
    [sealed] = [at for at, _, _, target in calls if target == str(unfinished / "complete.json")]
    assert max(flushed[name] for name in files) < sealed < named
    temporary = str(unfinished / ".complete.json.")
    assert any(at < sealed for at, call, path, _ in calls if call == "fsync" and path.startswith(temporary))
    assert any(sealed < at < named for at, call, path, _ in calls if call == "fsync" and path == str(unfinished))
    after = min(at for at, call, path, _ in calls if call == "fsync" and path == str(save) and at > named)
    [pointed_at] = [at for at, _, _, target in calls if target == str(save / "latest")][:1]
    assert named < after < pointed_at
    assert any(at < named for at, call, path, _ in calls if call == "fsync" and path == str(save / "runlog.jsonl"))


@pytest.mark.parametrize(("run", "mode"), [("plain", 0o644), ("background", 0o600)])
def test_files_follow_the_umask(durable, run, mode):
    folder, results = durable
    _ = results[run]
    paths = [path for path in (folder / run / "global_step42").rglob("*") if path.is_file()]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths} == dict.fromkeys(
        (path.name for path in paths), mode
    )


def test_a_checkpoint_written_in_the_background_has_the_same_bytes(durable):
    folder, results = durable
    _ = results["plain"], results["background"]
    assert_same_run(folder / "background", folder / "plain")
    for name in ("global_step42", "global_step46"):
        ours, theirs = ({path.name: path.read_bytes() for path in (folder / run / name).iterdir()} for run in BOTH)
        assert ours.keys() == theirs.keys()
        assert [file for file in ours if ours[file] != theirs[file]] == []
    assert not list((folder / "background").glob(".global_step*"))


def test_a_flipped_bit_is_noticed_on_all_ranks_and_the_checkpoint_before_is_taken(durable, run_file):
    folder, results = durable
    _ = results["flipped"]
    save = folder / "flipped"
    warning = f"warning: skipping an unusable checkpoint: {save}/global_step46: {RANK_1S} has other bytes"
    assert results.output.count(warning) == 1
    assert "kept as global_step46.damaged" in results.output
    assert sorted(path.name for path in save.glob("global_step4*")) == [
        "global_step42",
        "global_step46",
        "global_step46.damaged",
    ]
    assert_same_run(save, folder / "plain")


def test_all_checkpoints_damaged_is_an_error(durable):
    folder, results = durable
    _ = results["all-flipped"]
    error = (folder / "all-flipped" / "error").read_text()
    assert f"{folder}/all-flipped: all of its 2 checkpoints are damaged" in error
    names = sorted(path.name for path in (folder / "all-flipped").glob("global_step*"))
    assert names == ["global_step42.damaged", "global_step46.damaged"]


def test_a_damaged_checkpoint_that_is_named_is_an_error(durable):
    folder, results = durable
    _ = results["named"]
    error = (folder / "named" / "error").read_text()
    assert f"{folder}/named/global_step46: {RANK_1S} has other bytes than were written" in error
    assert "give another checkpoint" in error
    assert (folder / "named" / "global_step46" / RANK_1S).exists()


def test_another_runs_settings_stay_an_error_whatever_the_bytes(durable):
    folder, results = durable
    _ = results["other"]
    assert "made by another run" in (folder / "other" / "error").read_text()
    assert (folder / "other" / "global_step46").exists()


@pytest.mark.parametrize("run", ["full", "full-background"])
def test_a_rank_that_cannot_write_is_an_error_on_all_ranks(durable, run):
    folder, results = durable
    _ = results[run]
    save = folder / run
    error = (save / "error").read_text()
    assert f"{save}/global_step6: can't be written (rank 1: [Errno 27] File too large)" in error
    assert "there is no earlier checkpoint" in error
    assert not list(save.glob("*global_step*"))
    last = records(save)[0][-1]["step"]
    assert last == 6 if run == "full" else 6 <= last <= 12  # the next checkpoint would be at 12


class Soak:
    """One uninterrupted run on one rank, and how long its start takes."""

    def __init__(self, folder, tiny_run):
        training = {**tiny_run["training"], "train_tokens": 30_000, "save_interval": 4}
        self.config, self.reference = folder / "run.json", folder / "reference"
        self.config.write_text(json.dumps({**tiny_run, "training": training}))
        began = time.monotonic()
        with running(self.command(self.reference), folder / "log") as process:
            while process.poll() is None and not has_reached(self.reference, 1):
                time.sleep(0.002)
            self.start_seconds = time.monotonic() - began
            while process.poll() is None:
                time.sleep(0.02)
        assert process.returncode == 0, (folder / "log").read_text()
        self.steps = len(records(self.reference)[0])

    def command(self, save, *sets):
        sets = [word for one in sets for word in ("--set", one)]
        return forked(TRAIN, "--config", self.config, "--save", save, *sets)


@pytest.fixture(scope="module")
def soak(tmp_path_factory, tiny_run):
    return Soak(tmp_path_factory.mktemp("soak"), tiny_run)


def is_due(save, kind, step):
    """Return whether to kill the run: at ``step``, or where the next checkpoint but one is begun at the latest."""
    if kind != "while writing" or not has_reached(save, step):
        return has_reached(save, step)
    return any(save.glob(".global_step*.tmp")) or has_reached(save, step + 8)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("mode", ["at-once", "background"])
def test_killed_at_ten_random_moments(soak, mode, number, tmp_path):
    save, draw = tmp_path / "run", random.Random(f"{mode}{number}")
    command = soak.command(save, *([BACKGROUND] if mode == "background" else []))
    kinds = ["in a step"] * 4 + ["while writing"] * 4 + ["at the start"] * 2
    draw.shuffle(kinds)
    unfinished = 0
    for count, (kind, step) in enumerate(zip(kinds, sorted(draw.sample(range(1, soak.steps - 20), 10)), strict=True)):
        with running(command, tmp_path / f"log{count}") as process:
            latest = time.monotonic() + (draw.uniform(0, soak.start_seconds) if kind == "at the start" else 1e9)
            while not is_due(save, kind, step) and time.monotonic() < latest:
                assert process.poll() is None, (tmp_path / f"log{count}").read_text()
            time.sleep(draw.uniform(0, 0.01))
            assert process.poll() is None
        unfinished += any(save.glob(".global_step*.tmp"))
    assert unfinished > 0  # checkpoints were being written at some of these moments
    with running(command, tmp_path / "log") as process:
        while process.poll() is None:
            time.sleep(0.02)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert_same_run(save, soak.reference)
    assert not [*save.glob("*.damaged*"), *save.glob(".global_step*")]


if __name__ == "__main__":
    import deepspeed
    import torch

    deepspeed.init_distributed()
    do_parts(do_durable)
    torch.distributed.destroy_process_group()
