"""The folder in which DeepSpeed compiles its C++ extensions, and stale locks left there by killed compilations."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

__all__ = ["clear_stale_locks", "extensions_folder", "set_up_extensions", "stale_locks"]

FOREIGN_SECONDS = 600
"""The age at which a lock in a shared folder is stale. DeepSpeed's extensions compile in one or two minutes."""
_OF_ONE_CONTAINER = {"overlay", "ramfs", "tmpfs"}
_OF_ONE_NODE = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "xfs", "zfs"}
"""Linux's names of local file systems. Any other may be shared by several nodes."""
_ALL_PROCESSES = "pid:[4026531836]"
"""Linux's initial process namespace, which sees all processes of the node; a container has another."""


def extensions_folder() -> Path | None:
    """Return TORCH_EXTENSIONS_DIR, else a folder in the virtual environment, else None for torch's default.

    Compiled extensions fit one version of torch and of DeepSpeed, so each environment has its own.
    """
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    is_own = sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK)
    return Path(sys.prefix) / "torch_extensions" if is_own else None


def set_up_extensions(is_first_of_node: bool) -> None:
    """Prepare the compilation of DeepSpeed's extensions: set the folder, find ninja, remove stale locks."""
    folder = extensions_folder()
    if folder is not None:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        clear_stale_locks(folder, is_first_of_node)
    # Also if the environment isn't activated, because another version of ninja would recompile everything.
    beside_python, path = Path(sys.executable).parent, os.environ.get("PATH", os.defpath)
    if (beside_python / "ninja").exists() and path.split(os.pathsep)[0] != str(beside_python):
        os.environ["PATH"] = os.pathsep.join([str(beside_python), path])


def clear_stale_locks(folder: Path, remove: bool) -> None:
    """Remove and report the locks in ``folder`` that no process holds; with ``remove`` False, wait for their removal.

    torch locks by creating a file and waits silently, without a timeout, while the file exists. Call it on all ranks before
    they compile: a rank that waited for a stale lock would then load a library that was never compiled.
    """
    waits = False
    while locks := stale_locks(folder):
        time.sleep(1)  # a finished compilation closes its file shortly before it removes it
        for lock in [lock for lock in stale_locks(folder) if lock in locks]:
            if _age(lock) < _patience(lock):
                if remove and not waits:
                    _say(
                        f"waiting for {lock}: another node or container may be compiling; delete it if none is, else it is "
                        f"removed {_patience(lock)} seconds after it was made"
                    )
                waits = True
            elif remove:
                lock.unlink(missing_ok=True)
                _say(f"removed {lock}: left by a killed compilation of DeepSpeed's C++ parts")


def stale_locks(folder: Path) -> list[Path]:
    """Return this user's locks in ``folder`` that no process on this node holds."""
    own = [lock for lock in folder.glob("*/lock") if _owner(lock) == os.getuid()]
    if not own:
        return []
    # The process that compiles holds its lock open.
    held = {_target(link) for link in Path("/proc").glob("[0-9]*/fd/*")}
    return [lock for lock in own if os.path.realpath(lock) not in held and lock.exists()]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # the process has ended or belongs to another user
        return ""


def _owner(lock: Path) -> int:
    try:
        return lock.stat().st_uid
    except FileNotFoundError:
        return -1


def _age(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _patience(lock: Path) -> int:
    """Return the age in seconds at which a lock without a visible holder is stale; 0 if every holder is visible."""
    kind = _file_system(lock.parent)
    sees_all = kind in _OF_ONE_CONTAINER or (
        kind in _OF_ONE_NODE and os.readlink("/proc/self/ns/pid") == _ALL_PROCESSES
    )
    return 0 if sees_all else FOREIGN_SECONDS


def _file_system(path: Path) -> str:
    """Return Linux's name of the type of the file system of ``path``."""
    folders = {str(parent) for parent in (path.resolve(), *path.resolve().parents)}
    mounts: list[tuple[str, str]] = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted_at, kind, *_ = line.split()
        mounted_at = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mounted_at)  # \040 is a space
        if mounted_at in folders:
            mounts.append((mounted_at, kind))
    return max(reversed(mounts), key=lambda mount: len(mount[0]))[
        1
    ]  # the last mount of a folder hides the earlier ones
