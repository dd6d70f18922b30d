"""Code that all commands share: errors printed once, as one line, and names of runs."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from seqlen_curriculum.errors import DIVERGED, ConfigError, DivergenceError, SeqlenCurriculumError, printable
from seqlen_curriculum.launchers import global_rank, launch

__all__ = ["grow_memory_segments", "run", "see", "short_names", "usage_error", "warn"]

_STARTED = time.time()
_PATIENCE = 10.0
"""Seconds that other ranks wait for rank 0 to print the same error."""
_PRINTED = "seqlen_curriculum/error_printed"
_MARKER = "seqlen-curriculum-error"
_PATH_ERRNOS = {
    errno.EACCES,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
}
"""Reasons of the system that a path can't be used."""
_MARKER_SECONDS = 60
"""The age in seconds at which all ranks of a launch have checked its marker."""


def run(main: Callable[[], int | None], ranked: bool = False) -> None:
    """Call ``main`` and exit with the status that it returns. A user-facing error is printed as ``error: ...``.

    Set ``ranked`` for commands that a launcher starts once per rank: only rank 0 prints, and the other ranks exit silently
    with the same status. The status after an error is DIVERGED if training diverged, 130 for an interrupt, 141 if the
    reader of the output has closed it, else 1. A full disk is a user-facing error too.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be no UTF-8
    try:
        try:
            status = _call(main, ranked)
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:  # as in `slw plan FILE | head`: exit silently, with the status for SIGPIPE
        if not _discard_output():
            raise
        status = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: the output can't be written ({error.strerror}); free space and rerun", file=sys.stderr)
        _discard_unwritten()
        status = 1
    if status:
        sys.exit(status)


def _call(main: Callable[[], int | None], ranked: bool) -> int:
    """Return the exit status of ``main`` or of its error, after printing the error."""
    if ranked:
        _remove_old_markers()
    try:
        status = main() or 0
        if status:
            _keep_status()
        distributed: Any = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_initialized():
            distributed.destroy_process_group()  # otherwise its threads may abort the process at exit
        return status
    except (OSError, RuntimeError, SeqlenCurriculumError) as caught:
        error = caught if isinstance(caught, SeqlenCurriculumError) else _of_a_path(caught)
        if error is None:
            raise
        if isinstance(error, DivergenceError):
            _keep_status()
        if ranked:
            _print_once(error)
        else:
            print(f"error: {error}", file=sys.stderr)
        return DIVERGED if isinstance(error, DivergenceError) else 1
    except KeyboardInterrupt:
        if not ranked or global_rank() == 0:
            print("interrupted", file=sys.stderr)
        return 130


def _of_a_path(error: OSError | RuntimeError) -> SeqlenCurriculumError | None:
    """Return the user-facing error for a path that the system refuses, None for any other error."""
    if isinstance(error, OSError) and error.errno in _PATH_ERRNOS and error.filename is not None:
        return ConfigError(f"{os.fsdecode(error.filename)[:300]}: {error.strerror}; check the path and its permissions")
    if isinstance(error, FileNotFoundError) and error.filename is None:  # of os.getcwd()
        return ConfigError("the current folder has been deleted; change to another one")
    loop = "Symlink loop from "  # pathlib's, for which Python 3.13 raises OSError
    return ConfigError(f"{error}; give another path") if str(error).startswith(loop) else None


def _discard_output() -> bool:
    """Redirect outputs that their readers have closed to /dev/null, and return whether there are any.

    Python flushes its outputs again at exit, and would print an error.
    """
    poll = select.poll()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):  # not a file, as in a notebook
            poll.register(stream.fileno(), 0)
    closed = [number for number, event in poll.poll(0) if event & select.POLLERR]
    for number in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(closed)


def _discard_unwritten() -> None:
    """Redirect stdout to /dev/null if what it holds can't be written; Python would print another error at exit."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage_error(message: str, command: str) -> NoReturn:
    """Print an error about the arguments as one line that refers to ``command``, and exit with status 2."""
    print(f"error: {see(message, command)}", file=sys.stderr)
    sys.exit(2)


def see(message: str, command: str) -> str:
    """Return ``message`` with a reference to ``command``, as a new sentence after a question."""
    return f"{message} See {command}" if message.endswith("?") else f"{message}; see {command}"


def _keep_status() -> None:
    """Let all ranks exit with the same status: when one exits, launchers send SIGTERM to the others."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _print_once(error: SeqlenCurriculumError) -> None:
    """Print ``error`` on rank 0, and on another rank only if rank 0 has not printed it within ``_PATIENCE``.

    Most errors occur on every rank, for example a mistake in the file. An error of one node, for example a corpus that is
    missing there, is printed by that node's first rank. A rank that exits ends the launch, so the others wait for rank 0.
    """
    found = launch()
    rank, local_rank = (found.rank, found.local_rank) if found else (0, 0)
    store, marker = _store(), _marker(str(error))
    # The ranks of a node without rank 0 wait for its first rank, which itself waits for rank 0.
    deadline = time.monotonic() + (_PATIENCE if rank == local_rank or local_rank == 0 else 2 * _PATIENCE)
    while rank > 0 and time.monotonic() < deadline:
        if _is_recent(marker) or (store is not None and _is_set(store)):
            return
        time.sleep(0.1)
    print(f"error: {error}" if rank == 0 else f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
    if found and found.ranks > 1 and local_rank == 0:
        with contextlib.suppress(OSError):
            marker.touch()
    if rank == 0 and store is not None:
        store.set(_PRINTED, "1")


def _marker(message: str) -> Path:
    """Return the empty file that marks ``message`` as printed by a process of the same launcher on this node."""
    key = hashlib.blake2b(f"{os.getuid()}/{os.getppid()}/{message}".encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"{_MARKER}-{key}"


def _remove_old_markers() -> None:
    """Remove this user's markers that are older than ``_MARKER_SECONDS``."""
    for marker in Path(tempfile.gettempdir()).glob(f"{_MARKER}-*"):
        with contextlib.suppress(OSError):  # another user's, or removed by another rank
            if marker.stat().st_mtime < time.time() - _MARKER_SECONDS:
                marker.unlink()


def _is_recent(marker: Path) -> bool:
    """Return whether ``marker`` is from this launch, whose ranks start within seconds of each other."""
    with contextlib.suppress(OSError):
        return marker.stat().st_mtime > _STARTED - 5
    return False


def _store() -> Any:
    """Return the key-value store of torch.distributed; None before it is initialized."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def _is_set(store: Any) -> bool:
    """Return whether rank 0 has printed the error; False if the store ended with rank 0's process."""
    with contextlib.suppress(RuntimeError):
        return bool(store.check([_PRINTED]))
    return False


def grow_memory_segments() -> None:
    """Enable expandable segments in CUDA's allocator, unless the user has configured it. Call it before importing torch."""
    # Each length needs blocks of different sizes. Fixed segments keep free pieces that are too small for later lengths.
    # Every version of torch that this package supports reads the second of the three names.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def warn(messages: Iterable[str]) -> None:
    """Print each message as ``warning: ...`` on stderr, on rank 0 only."""
    if global_rank() == 0:
        for message in messages:
            print(f"warning: {printable(message)}", file=sys.stderr)


def short_names(flag: str, paths: Sequence[str], parts: int = 1) -> dict[str, str]:
    """Return paths by the shortest ends that differ, of at least ``parts`` parts: ``a`` and ``b``, or ``1/a`` and ``2/a``.

    The names are relative, because event files are written to folders of these names. Raises ConfigError for a repeated
    path.
    """
    real = [Path(path).resolve() for path in paths]
    if len(set(real)) < len(real):
        raise ConfigError(f"{flag}: {max(real, key=real.count)} is given twice; name each once")
    for suffix in (".json", ""):  # two files x.json and x of one folder keep theirs
        for length in range(parts, max(len(path.parts) for path in real)):
            names = ["/".join(path.parts[1:][-length:]).removesuffix(suffix) for path in real]
            if len(set(names)) == len(names):
                return dict(zip(names, paths, strict=True))
    return dict(zip(map(str, paths), paths, strict=True))  # the root folder
