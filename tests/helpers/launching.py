"""Launches by the real DeepSpeed launcher, or forked. A launch that takes too long is killed with all its processes."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from helpers.capabilities import require, require_launches
from helpers.fork_server import ForkedLaunch, ForkServer
from seqlen_curriculum.training.extensions import clear_stale_locks

ROOT = Path(__file__).parent.parent.parent
TESTS = ROOT / "tests"
SLOWNESS = "SEQLEN_TEST_SLOWNESS"
"""The environment variable that passes ``slowness`` to xdist's workers."""
QUIET_SECONDS = 0.25
"""Seconds of the loop in ``slowness`` on an idle core of 2024."""


def slowness() -> float:
    """Return the slowdown of this machine relative to an idle core, at least 1, measured once."""
    if SLOWNESS not in os.environ:
        begin = time.perf_counter()
        total = 0
        for number in range(4_000_000):
            total += number
        os.environ[SLOWNESS] = str(max(1.0, (time.perf_counter() - begin) / QUIET_SECONDS))
    return float(os.environ[SLOWNESS])


def limit(seconds: float) -> float:
    """Return a timeout for an operation that takes less than ``seconds`` on an idle machine."""
    return seconds * slowness()


class Ranks(NamedTuple):
    """A script to start on this number of ranks without the launcher, forked from a process that has imported torch.

    With 0 ranks it is one process without a launcher's variables, other than those that ``start`` is given.
    """

    script: str
    arguments: list[str]
    ranks: int


Process = subprocess.Popen[bytes] | ForkedLaunch


def launch_command(script: str | Path, *args: object, ranks: int = 1) -> list[str]:
    """Return the command line of the real DeepSpeed launcher."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", free_port(), str(ROOT / script), *map(str, args)]


def forked(script: str | Path, *args: object, ranks: int = 1) -> Ranks:
    """Return a forked launch of the same ranks as ``launch_command``, which saves 20 CPU seconds for two ranks."""
    return Ranks(str(ROOT / script), list(map(str, args)), ranks)


def start(
    command: list[str] | Ranks,
    log: Path,
    cwd: Path = ROOT,
    limits: Mapping[int, int] | None = None,
    env: Mapping[str, str] | None = None,
) -> Process:
    """Start a command in its own session, with its output in the file ``log``; call ``stop`` at the end.

    limits: resource limits by their number in ``resource``. env: its environment, None for that of this process.
    """
    limits = limits or {}
    if isinstance(command, Ranks):
        log.touch()
        environment = _environment(env)
        if command.ranks:
            environment |= {"WORLD_SIZE": str(command.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        return fork_server().start(command.script, command.arguments, command.ranks, log, cwd, environment, limits)

    def prepare() -> None:
        # If the tests run in the background of a shell, SIGINT is ignored, also by all their child processes.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for number, limit in limits.items():
            resource.setrlimit(number, (limit, limit))

    with open(log, "w") as out:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=_environment(env),
            start_new_session=True,
            cwd=cwd,
            preexec_fn=prepare,
        )


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    env = os.environ if env is None else env
    path = [str(TESTS), *filter(None, [env.get("PYTHONPATH")])]
    return {**env, "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(path)}


@functools.cache
def fork_server() -> ForkServer:
    """Return the server of this process, started by the first call."""
    return ForkServer(_environment())


def stop(process: Process) -> None:
    """Kill the remaining processes of a started command, wait for their end, and remove their compilation locks."""
    left = _left_of(process.pid)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    wait_until(lambda: not _left_of(process.pid), f"processes of {process.pid} are still alive")
    if left:
        remove_stale_locks()


def remove_stale_locks() -> None:
    """Remove the locks of killed compilations in TORCH_EXTENSIONS_DIR."""
    clear_stale_locks(Path(os.environ["TORCH_EXTENSIONS_DIR"]), remove=True)


@contextlib.contextmanager
def running(
    command: list[str] | Ranks,
    log: Path,
    cwd: Path = ROOT,
    limits: Mapping[int, int] | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Process]:
    """Start a command and stop it at the end of the ``with`` block."""
    process = start(command, log, cwd, limits, env)
    try:
        yield process
    finally:
        stop(process)


def wait_until(due: Callable[[], bool], problem: str, seconds: float = 120) -> None:
    """Wait until ``due()``; fail with ``problem`` after ``seconds``, as on an idle machine."""
    deadline = time.monotonic() + limit(seconds)
    while not due():
        if time.monotonic() > deadline:
            pytest.fail(problem)
        time.sleep(0.02)


def wait_for_all(process: Process, seconds: float = 120) -> None:
    """Wait for a command and all its child processes; after a signal the launcher ends before its ranks."""
    process.wait(timeout=limit(seconds))
    wait_until(lambda: not _left_of(process.pid), f"processes of {process.pid} are still alive", seconds)


def _left_of(session: int) -> list[psutil.Process]:
    """Return the running processes of a command and its descendants, also those in other process groups, such as ninja's."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    return left


def launch(
    log: Path,
    script: str | Path,
    *args: object,
    ranks: int = 1,
    launcher: Callable[..., list[str] | Ranks] = launch_command,
    seconds: float = 300,
    cwd: Path = ROOT,
    limits: Mapping[int, int] | None = None,
) -> tuple[int, str]:
    """Run a script to its end, under the real launcher or ``forked``; return (exit status, output)."""
    require_launches()
    if ranks > 2:
        require("memory")
    with running(launcher(script, *args, ranks=ranks), log, cwd, limits) as process:
        wait_until(lambda: process.poll() is not None, f"{script} hung", seconds)
    assert process.returncode is not None
    return process.returncode, Path(log).read_text()
