"""A file is replaced whole or not at all, and a lock has one holder."""

import errno
import os

import pytest

from seqlen_curriculum import files


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "run.json"
    for text in ("one", "two – zwei"):
        files.replace_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_removed_once_it_is_old(tmp_path):
    old, young, other = (tmp_path / name for name in (".run.json.7.tmp", ".run.json.8.tmp", ".other.json.7.tmp"))
    for leftover in (old, young, other):
        leftover.touch()
    for leftover in (old, other):
        os.utime(leftover, (0, 0))
    files.replace_text(tmp_path / "run.json", "one")
    assert sorted(tmp_path.iterdir()) == sorted([young, other, tmp_path / "run.json"])


def test_what_fails_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    files.replace_text(path, "old")

    def write(unfinished):
        unfinished.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.replace(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_disk_before_its_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    path, order = tmp_path / "run.json", []

    def note(call, describe):
        real = getattr(os, call)

        def noted(*args):
            order.append(describe(*args))
            return real(*args)

        monkeypatch.setattr(files.os, call, noted)

    note("fsync", lambda file: "folder" if os.path.isdir(f"/proc/self/fd/{file}") else "content")
    note("replace", lambda *_: "rename")
    files.replace_text(path, "new")
    assert order == ["content", "rename", "folder"]


def test_a_folder_is_flushed_with_all_that_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "out" / "parts").mkdir(parents=True)
    for name in ("a", "parts/b"):
        (tmp_path / "out" / name).touch()
    flushed = []
    monkeypatch.setattr(files.os, "fsync", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}")))
    files.sync_tree(tmp_path / "out")
    assert sorted(flushed) == [str(tmp_path / name) for name in ("out", "out/a", "out/parts", "out/parts/b")]


def test_a_discarded_folder_is_whole_or_hidden(tmp_path, monkeypatch):
    folder = tmp_path / "global_step6"
    folder.mkdir()
    (folder / "states.pt").touch()

    def killed(path):
        raise KeyboardInterrupt(path)

    with monkeypatch.context() as kill:
        kill.setattr(files.shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or killed(path))
        with pytest.raises(KeyboardInterrupt):
            files.discard_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == [".global_step6.discarded.tmp"]
    folder.mkdir()
    files.discard_folder(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_librarys_file_gets_the_mode_of_any_other(tmp_path, umask, mode):
    path = tmp_path / "model.safetensors"
    path.touch(mode=0o600)
    before = os.umask(umask)
    try:
        files.follow_umask(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_has_one_holder(tmp_path):
    path = tmp_path / ".lock"
    held = files.try_lock(path)
    assert held is not None
    assert files.is_locked(path)
    assert files.try_lock(path) is None
    os.close(held)
    assert not files.is_locked(path)


def test_the_lock_of_a_file_deleted_meanwhile_is_none(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    real = files.fcntl.flock

    def flock(file, operation):
        real(file, operation)
        path.unlink()  # its holder has let go and cleaned up, between our open and our lock

    monkeypatch.setattr(files.fcntl, "flock", flock)
    assert files.try_lock(path) is None


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_once(tmp_path, monkeypatch, capsys, reason):
    def flock(file, operation):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    for _ in range(2):
        files.lock_folder(tmp_path, "--save", "training into it")
    assert not files.is_locked(files.lock_of(tmp_path))
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {tmp_path}: its file system has no locks ({os.strerror(reason)})")
    assert warning.count("\n") == 1


def test_another_failure_of_a_lock_is_an_error(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        files.try_lock(tmp_path / ".lock")
