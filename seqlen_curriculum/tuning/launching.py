"""Start trainings in process groups of their own, marked by a lock, and stop them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from seqlen_curriculum.files import try_lock

__all__ = ["error_in", "group_of", "start_locked", "stop_groups"]


def start_locked(
    command: Sequence[str], output: Path, lock: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start ``command`` in a process group of its own, append its output to ``output``, and return the process.

    The file ``lock``, which must not be locked, is locked while a process of the group runs, and holds the group's id.
    """
    held = try_lock(lock)
    assert held is not None
    # A flock is held until every copy of its file descriptor is closed. The command and its ranks inherit one, so the lock
    # shows that they are alive, even after this process was killed.
    with output.open("ab") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(held,),
            env=environment,
        )
    os.ftruncate(held, 0)
    os.pwrite(held, str(process.pid).encode(), 0)
    os.close(held)
    return process


def group_of(lock: Path) -> int | None:
    """Return the id of the process group that ``start_locked`` wrote to ``lock``; None if it was killed before that."""
    text = lock.read_text(encoding="utf-8", errors="replace") if lock.exists() else ""
    return int(text) if text.isascii() and text.isdigit() else None


def stop_groups(groups: Iterable[int]) -> None:
    """Send SIGTERM to process groups, whose ranks then finish their step and save."""
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)


def error_in(output: Path, start: int) -> str:
    """Return the last ``error: `` line of a command's output from byte ``start`` on, else the last ten lines."""
    lines = output.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return "\n".join(errors[-1:] or lines[-10:])
