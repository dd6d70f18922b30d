"""The folder of DeepSpeed's C++ parts, and the locks in it that nobody holds."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from seqlen_curriculum.training import extensions

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open files are listed in /proc")


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock that no process holds, made just now, in a folder that only this node sees."""
    monkeypatch.setattr(extensions, "_patience", lambda *_: 0)
    path = tmp_path / "fused_adam" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def test_the_folder_is_inside_the_virtual_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extensions.extensions_folder() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert extensions.extensions_folder() == tmp_path / "torch_extensions"
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    assert extensions.extensions_folder() is None


def test_ninja_beside_python_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    extensions.set_up_extensions(is_first_of_node=True)
    assert os.environ["PATH"] == "/usr/bin"  # there is none
    (tmp_path / "ninja").touch()
    for _ in range(2):
        extensions.set_up_extensions(is_first_of_node=True)
        assert os.environ["PATH"] == f"{tmp_path}{os.pathsep}/usr/bin"


def test_a_stale_lock_is_named_and_removed(lock, capsys):
    extensions.clear_stale_locks(lock.parent.parent, remove=True)
    assert not lock.exists()
    assert f"removed {lock}: left by a killed compilation" in capsys.readouterr().err


def test_a_lock_that_a_process_holds_stays(lock):
    code = f"import time; held = open({str(lock)!r}); print(flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        extensions.clear_stale_locks(lock.parent.parent, remove=True)
        assert lock.exists()
        holder.kill()
    assert extensions.stale_locks(lock.parent.parent) == [lock]


def test_other_ranks_wait_until_the_first_of_the_node_has_removed_it(lock):
    waiting = threading.Thread(target=extensions.clear_stale_locks, args=(lock.parent.parent, False))
    waiting.start()
    time.sleep(1.2)
    assert waiting.is_alive()
    assert lock.exists()
    extensions.clear_stale_locks(lock.parent.parent, remove=True)
    waiting.join(timeout=30)
    assert not waiting.is_alive()


def test_a_young_lock_in_a_shared_folder_is_waited_for(lock, monkeypatch, capsys):
    """Another node may hold it, whose processes can't be seen here."""
    monkeypatch.setattr(extensions, "_patience", lambda *_: 600)
    threading.Timer(1.5, lock.unlink).start()  # the other node has compiled
    extensions.clear_stale_locks(lock.parent.parent, remove=True)
    assert f"waiting for {lock}: another node or container may be compiling" in capsys.readouterr().err
    lock.touch()
    os.utime(lock, (0, 0))
    extensions.clear_stale_locks(lock.parent.parent, remove=True)
    assert not lock.exists()


@pytest.mark.parametrize(
    ("kind", "namespace", "seconds"),
    [
        ("ext4", extensions._ALL_PROCESSES, 0),
        ("ext4", "pid:[4026532171]", 600),  # a container sees its own processes only
        ("overlay", "pid:[4026532171]", 0),
        ("nfs4", extensions._ALL_PROCESSES, 600),
        ("lustre", extensions._ALL_PROCESSES, 600),
    ],
)
def test_a_holder_may_be_out_of_sight(monkeypatch, tmp_path, kind, namespace, seconds):
    monkeypatch.setattr(extensions, "_file_system", lambda *_: kind)
    monkeypatch.setattr(os, "readlink", lambda *_: namespace)
    assert extensions._patience(tmp_path / "lock") == seconds


def test_the_type_of_a_file_system_is_that_of_the_deepest_mount():
    assert extensions._file_system(Path("/proc/self")) == "proc"
    assert extensions._file_system(Path("/")) not in ("", "proc")
