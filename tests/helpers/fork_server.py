"""Ranks forked from a process that has already imported torch, DeepSpeed and transformers.

Importing them takes about 10 CPU seconds per rank, and the launcher 5 more, which is longer than most runs of the tests.
``ForkServer`` is used by the tests, ``serve`` is the process that forks. As under a launcher, the ranks get RANK,
LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and if one of them fails the others are killed.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ForkedLaunch:
    """The ranks of one launch with the interface of ``subprocess.Popen``: a leader in its own session, and its ranks."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid, self.returncode, self._server = pid, None, server

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = float("inf")) -> int:
        """Return the exit status. Raises TimeoutExpired after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired([f"forked launch {self.pid}"], timeout)
            time.sleep(0.01)
        return status


class ForkServer:
    """A connection to the process that runs ``serve``. xdist's workers share that process, which the first one starts."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        name = f"seqlen-tests-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
        self._connection = _connect(name)
        if self._connection is None:
            command = [sys.executable, "-m", "helpers.fork_server", name]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
            while (connection := _connect(name)) is None:
                if process.poll():
                    raise RuntimeError(f"the fork server ended with status {process.returncode}")
                time.sleep(0.01)
            self._connection, self._process = connection, process
        self._file = self._connection.makefile("rw")
        self._one_at_a_time = threading.Lock()

    def ask(self, request: dict[str, Any]) -> Any:
        with self._one_at_a_time:
            print(json.dumps(request), file=self._file, flush=True)
            return json.loads(self._file.readline())

    def start(
        self,
        script: str,
        arguments: Sequence[str],
        ranks: int,
        log: Path,
        cwd: Path,
        environment: Mapping[str, str],
        limits: Mapping[int, int],
    ) -> ForkedLaunch:
        """Start ``ranks`` ranks of ``script``; ``limits`` are (soft, hard) resource limits by number."""
        launch = {"script": script, "arguments": arguments, "ranks": ranks, "log": str(log), "cwd": str(cwd)}
        return ForkedLaunch(
            self, self.ask({**launch, "environment": dict(environment), "limits": list(limits.items())})
        )


def _connect(name: str) -> socket.socket | None:
    """Return a connection to the server of this name, None if there is none."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"\0{name}")  # outside the file system
    except ConnectionRefusedError:
        connection.close()
        return None
    return connection


def serve(name: str) -> None:
    """Answer requests, one JSON line each, until all connections are closed.

    The answer to ``start``'s is a pid, to a poll the status of a launch. If there is a server of this name, return.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(f"\0{name}")
    except OSError:
        return
    listener.listen()
    _import_all()
    files: dict[socket.socket, Any] = {}
    while ready := select.select([listener, *files], [], [], None if files else 60)[0]:
        for one in ready:
            if one is listener:
                connection, _ = listener.accept()
                files[connection] = connection.makefile("rw")
            elif line := files[one].readline():
                print(json.dumps(_answer(json.loads(line), [listener, *files])), file=files[one], flush=True)
            else:
                files.pop(one).close()
                one.close()
                if not files:
                    return


def _import_all() -> None:
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 - imported by ZeRO, with torch's compiler
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    from deepspeed.utils import numa

    import seqlen_curriculum.training.pretrain  # noqa: F401

    # On a CPU, ZeRO-3 asks for the cores at each reduction of gradients, and each time starts numactl.
    cores = numa.get_numa_cores()
    numa.get_numa_cores = lambda: cores
    # Ranks then neither examine the million objects of these modules at each collection, nor copy their memory for it.
    gc.collect()
    gc.freeze()


def _answer(request: dict[str, Any], sockets: Sequence[socket.socket]) -> int | None:
    if "poll" in request:
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None
    if pid := os.fork():
        return pid
    for one in sockets:
        os.close(one.detach())
    _lead(**request)


def _lead(
    script: str,
    arguments: list[str],
    ranks: int,
    log: str,
    cwd: str,
    environment: dict[str, str],
    limits: list[tuple[int, int]],
) -> None:
    """Act as the launcher: fork the ranks, wait for them, and exit with the first status that is not 0.

    With 0 ranks this process is the script.
    """
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for number, limit in limits:
        resource.setrlimit(number, (limit, limit))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not ranks:
        _be_rank(script, arguments)
    running = set()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            _be_rank(script, arguments)
        running.add(pid)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if failed := os.waitstatus_to_exitcode(status):
            for other in running:
                os.kill(other, signal.SIGKILL)
            os._exit(failed if failed > 0 else 128 - failed)
    os._exit(0)


def _be_rank(script: str, arguments: list[str]) -> None:
    """Run ``script`` as the main program of this process, and exit like Python."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    status: object = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as at the end of a program
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else status is not None)


if __name__ == "__main__":
    serve(sys.argv[1])
