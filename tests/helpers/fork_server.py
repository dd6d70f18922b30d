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
import signal
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
    """The process that runs ``serve``. It exits when this process closes its end of the pipe."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "helpers.fork_server"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True
        )
        atexit.register(self._process.kill)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(request)}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

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


def serve() -> None:
    """Answer requests, one JSON line each, until the other end closes: ``start``'s with a pid, a poll with the status."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 - imported by ZeRO, with torch's compiler
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401

    import seqlen_curriculum.training.pretrain  # noqa: F401

    # Ranks then neither examine the million objects of these modules at each collection, nor copy their memory for it.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _lead(**request)
        print(json.dumps(answer), file=answers, flush=True)


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
    serve()
