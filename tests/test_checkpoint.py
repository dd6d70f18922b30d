"""What is a complete checkpoint and what isn't, and who may write into a run's folder."""

import errno
import json
import os
import subprocess
import sys

import pytest

from seqlen_curriculum.errors import CheckpointError

GOOD = {
    "step": 6,
    "data_ranks": 2,
    "zero_stage": 1,
    "zero": {"stage": 1},
    "run": {"training.seed": 1},
    "files": {"states.pt": 3},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "states.pt").write_bytes(b"abc")
    (tmp_path / "complete.json").write_text(json.dumps(GOOD))
    return tmp_path


def test_a_complete_checkpoint_is_read(folder):
    from seqlen_curriculum.run_folder.checkpoint_manifest import read_checkpoint

    checkpoint = read_checkpoint(folder)
    assert (checkpoint.step, checkpoint.data_ranks, checkpoint.zero_stage) == (6, 2, 1)
    assert checkpoint.run == {"training.seed": 1}


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"\xff\xfe", json.dumps({**GOOD, "files": ["states.pt"]}).encode()]
)
def test_without_a_readable_list_of_files_it_is_none(folder, text):
    from seqlen_curriculum.run_folder.checkpoint_manifest import read_checkpoint

    (folder / "complete.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"no readable complete\.json"):
        read_checkpoint(folder)


def test_with_a_missing_or_cut_file_it_is_none(folder):
    from seqlen_curriculum.run_folder.checkpoint_manifest import read_checkpoint

    (folder / "states.pt").write_bytes(b"ab")
    with pytest.raises(CheckpointError, match=r"states\.pt has 2 bytes, 3 bytes were saved"):
        read_checkpoint(folder)
    (folder / "states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"states\.pt is missing"):
        read_checkpoint(folder)
    with pytest.raises(CheckpointError, match="there is no such checkpoint folder"):
        read_checkpoint(folder / "nothing")


def sealed(folder, name="states.pt"):
    """A checkpoint of one file with the content b"abc", whose CRC-32 is a standard check value."""
    from seqlen_curriculum.run_folder.checkpoint_manifest import Manifest, read_checkpoint, seal

    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"123456789")
    seal(folder, Manifest(**{**GOOD, "files": {}}), {})
    return read_checkpoint(folder)


def test_a_sealed_folder_has_sizes_and_crcs_of_all_files(tmp_path):
    from seqlen_curriculum.run_folder.checkpoint_manifest import damage

    checkpoint = sealed(tmp_path / "global_step6", "offloaded/states.pt")
    assert checkpoint.files == {"offloaded/states.pt": 9}
    assert checkpoint.crc32 == {"offloaded/states.pt": 0xCBF43926}
    assert damage(checkpoint) == ""


def test_a_flipped_bit_is_damage_of_the_part_that_reads_the_file(tmp_path):
    from seqlen_curriculum.run_folder.checkpoint_manifest import damage

    checkpoint = sealed(tmp_path)
    (tmp_path / "states.pt").write_bytes(b"123456788")
    assert "states.pt has other bytes than were written" in damage(checkpoint)
    assert "states.pt has other bytes" in damage(checkpoint, part=0, parts=2)
    assert damage(checkpoint, part=1, parts=2) == ""


def test_a_bad_disk_is_damage_and_a_lost_mount_an_error(tmp_path, monkeypatch):
    from seqlen_curriculum.run_folder import checkpoint_manifest
    from seqlen_curriculum.run_folder.checkpoint_manifest import damage

    checkpoint = sealed(tmp_path)

    def failing(number):
        def crc32(path):
            raise OSError(number, os.strerror(number))

        return crc32

    monkeypatch.setattr(checkpoint_manifest, "crc32", failing(errno.EIO))
    assert damage(checkpoint) == f"{tmp_path}: states.pt can't be read (Input/output error)"
    monkeypatch.setattr(checkpoint_manifest, "crc32", failing(errno.ESTALE))
    with pytest.raises(OSError, match="Stale file handle"):
        damage(checkpoint)


def test_a_changed_digit_in_the_manifest_is_noticed(tmp_path):
    from seqlen_curriculum.run_folder.checkpoint_manifest import read_checkpoint

    sealed(tmp_path)
    text = (tmp_path / "complete.json").read_text()
    (tmp_path / "complete.json").write_text(text.replace('"training.seed": 1', '"training.seed": 3'))
    with pytest.raises(CheckpointError, match=r"no readable complete\.json"):
        read_checkpoint(tmp_path)


def test_only_numbers_are_steps(tmp_path):
    from seqlen_curriculum.files import set_aside
    from seqlen_curriculum.run_folder.checkpoint_manifest import checkpoint_folders

    for name in ("global_step10", "global_step9", "global_step8", ".global_step7.tmp"):
        (tmp_path / name).mkdir()
    assert set_aside(tmp_path / "global_step8").name == "global_step8.damaged"
    (tmp_path / "global_step8").mkdir()
    assert set_aside(tmp_path / "global_step8").name == "global_step8.damaged2"
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["global_step9", "global_step10"]


def test_differences_are_named():
    from seqlen_curriculum.run_folder.checkpoint_manifest import differences

    saved, ours = {"model.dropout": 0.1, "training.seed": 1}, {"training.seed": 1, "bf16.enabled": True}
    assert differences(saved, ours) == {
        "bf16.enabled": "None in the checkpoint, True now",
        "model.dropout": "0.1 in the checkpoint, None now",
    }


def test_a_folder_belongs_to_one_living_process(tmp_path):
    from seqlen_curriculum.files import is_locked, lock_folder, lock_of

    assert not is_locked(lock_of(tmp_path))
    holder = "import sys; from pathlib import Path; from seqlen_curriculum.files import lock_folder\n"
    holder += "lock_folder(Path(sys.argv[1]), '--save', 'busy'); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert any(line == "held\n" for line in process.stdout)
        assert is_locked(lock_of(tmp_path))
        with pytest.raises(CheckpointError, match=r"--save .*: another process is training into it; stop that one"):
            lock_folder(tmp_path, "--save", "training into it")
        process.kill()
    assert not is_locked(lock_of(tmp_path))  # the system freed it
    lock_folder(tmp_path, "--save", "training into it")
    assert is_locked(lock_of(tmp_path))


@pytest.mark.parametrize(
    ("resume", "start", "log_begins", "refused"),
    [
        ("auto", None, None, False),  # an empty folder
        ("auto", None, 1, False),  # killed before its first checkpoint
        ("auto", None, 7, True),  # began elsewhere: only its own --resume says where
        ("none", None, 1, True),
        ("elsewhere", 6, 7, False),  # the same command again
        ("elsewhere", 6, 1, True),  # another run's log
        ("elsewhere", 6, None, False),
    ],
)
def test_no_run_writes_over_anothers_log(tmp_path, resume, start, log_begins, refused):
    from seqlen_curriculum.run_folder.checkpoint_manifest import Checkpoint
    from seqlen_curriculum.training.pretrain import refuse_other_run

    if log_begins is not None:
        (tmp_path / "runlog.jsonl").write_text(json.dumps({"step": log_begins}) + "\n")
    checkpoint = (
        None
        if start is None
        else Checkpoint(
            folder=tmp_path.parent / "elsewhere", step=start, data_ranks=1, zero_stage=0, zero={}, run={}, files={}
        )
    )
    if refused:
        with pytest.raises(CheckpointError, match=f"started at step {log_begins}"):
            refuse_other_run(tmp_path, resume, checkpoint)
    else:
        refuse_other_run(tmp_path, resume, checkpoint)


def test_nothing_of_a_left_over_ledger_is_skipped_by_a_run_that_begins_anew(tmp_path):
    from seqlen_curriculum.training.pretrain import refuse_other_run

    (tmp_path / "rollbacks.json").write_text("[]")
    refuse_other_run(tmp_path, "auto", None)  # planned, perhaps
    with pytest.raises(CheckpointError, match=r"rollbacks\.json: .*--resume none.*delete this file"):
        refuse_other_run(tmp_path, "none", None)


def test_a_folder_with_unusable_checkpoints_only_is_not_begun_anew(tmp_path):
    from seqlen_curriculum.training.pretrain import refuse_other_run

    (tmp_path / "runlog.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "global_step6").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint to resume it"):
        refuse_other_run(tmp_path, "auto", None)


def test_damaged_weights_are_read_by_no_command(tmp_path, capsys):
    from seqlen_curriculum.run_folder.checkpoint_manifest import damage, read_checkpoint
    from seqlen_curriculum.run_folder.model_folder import model_folder

    older, newer = tmp_path / "global_step6", tmp_path / "global_step9"
    for folder in (older, newer):
        folder.mkdir()
        (folder / "states.pt").write_bytes(b"shards, which training alone reads")
        sealed(folder, "model.safetensors")
    (newer / "states.pt").write_bytes(b"shards, which training only reads.")
    assert model_folder(tmp_path) == newer
    assert "states.pt" in damage(read_checkpoint(newer))
    (newer / "model.safetensors").write_bytes(b"123456788")
    assert model_folder(tmp_path) == older
    assert f"{newer}: model.safetensors has other bytes" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"model\.safetensors has other bytes .*another checkpoint"):
        model_folder(newer)


def test_a_digit_that_is_no_number_is_no_step(tmp_path):
    from seqlen_curriculum.run_folder.checkpoint_manifest import checkpoint_folders

    for name in ("global_step\u00b2", "global_step\u0663", "global_step\udcff", "global_step4"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["global_step4"]


@pytest.fixture
def one_process(monkeypatch):
    """The module of checkpoints in one process, without torch's process group."""
    from seqlen_curriculum.training import checkpoint

    monkeypatch.setattr(checkpoint, "on_rank_0", lambda function: function())
    monkeypatch.setattr(checkpoint, "log_rank0", print)
    return checkpoint


def test_only_the_link_to_a_checkpoint_on_another_disk_is_deleted(tmp_path, one_process, capsys):
    save, disk = tmp_path / "run", tmp_path / "disk"
    for step in (6, 7):
        (save / f"global_step{step}").mkdir(parents=True)
        sealed(save / f"global_step{step}")
        (save / f"global_step{step}" / "complete.json").write_text(json.dumps({**GOOD, "step": step, "files": {}}))
    (save / "global_step6").rename(disk)
    (save / "global_step6").symlink_to(disk)
    one_process.Checkpoints(save, keep_last=1, run={}).drop_old()
    assert [path.name for path in save.iterdir()] == ["global_step7"]
    assert sorted(path.name for path in disk.iterdir()) == ["complete.json", "states.pt"]
    assert f"deleting the link {save}/global_step6, but not the checkpoint in {disk}" in capsys.readouterr().out


def test_what_has_the_name_of_an_unfinished_checkpoint_is_deleted(tmp_path, one_process):
    save, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (save / ".global_step1.tmp").mkdir(parents=True)
    (save / ".global_step2.tmp").touch()
    (save / ".global_step3.tmp").symlink_to(outside)
    (save / ".global_step4.tmp").symlink_to(save / "nothing")
    one_process.Checkpoints(save, keep_last=1, run={})._delete_hidden()
    assert list(save.iterdir()) == []
    assert (outside / "kept").exists()
