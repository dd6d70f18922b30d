"""Watchdog that ends a hung rank and prints the stacks of all its threads, so that a hang costs minutes.

Each rank runs its own watchdog in a thread, because the main thread of a hung rank is blocked in a collective, or in a read
from a file system that is unavailable, and runs no Python code.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch._dynamo.callback
from deepspeed import comm as dist

from seqlen_curriculum.errors import HUNG

__all__ = ["Watchdog", "hang_limit"]

_LEAST_SECONDS = 600.0
_FIRST_SECONDS = 3600.0
"""Limit before any step has ended: the first step opens connections between all ranks and reads from cold disks."""
_TIMES_MEDIAN = 50


def hang_limit(ended: Sequence[tuple[int, float]], tokens: int) -> float:
    """Return the seconds after which a step of ``tokens`` tokens counts as hung, given (tokens, seconds) of recent steps."""
    if not ended:
        return _FIRST_SECONDS
    # After steps of 8 x 512 tokens in 2 s, a step of 1024 x 512 tokens has 128 times the tokens: 256 s, limit 50 x 256 s.
    # After steps of 60 s, a shorter step is assumed to take up to 60 s: limit 50 x 60 s.
    median = statistics.median(seconds for _, seconds in ended)
    by_tokens = statistics.median(seconds / each for each, seconds in ended) * tokens
    return max(_LEAST_SECONDS, _TIMES_MEDIAN * max(median, by_tokens))


class Watchdog:
    """Watchdog for the steps of this rank, but not for the time between them and for ``torch.compile``."""

    def __init__(
        self, hang_seconds: float | None, consumed_tokens: Callable[[int], int], compiles: bool = False
    ) -> None:
        """Start the thread. ``hang_seconds`` is as in ``training``; ``consumed_tokens(step)`` is as in a timeline."""
        self._hang_seconds, self._consumed_tokens = hang_seconds, consumed_tokens
        self._ended: deque[tuple[int, float]] = deque(maxlen=101)
        """Recent steps and their seconds."""
        self._running: int | None = None
        self._compiling = False
        self._compilations = torch._dynamo.callback.callback_handler if compiles else None
        self._closed = threading.Event()
        if self._compilations is not None:
            self._compilations.register_start_callback(self._compile_begins)
            self._compilations.register_end_callback(self._compile_ends)
        if hang_seconds != 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def step(self, step: int, is_skipped: bool = False) -> Iterator[None]:
        """Watch ``step`` while the block runs. The time of a skipped step is not used for later limits."""
        started = time.perf_counter()
        self._running = step
        try:
            yield
        finally:
            self._running = None
        if not is_skipped:
            self._ended.append((step, time.perf_counter() - started))

    def close(self) -> None:
        """Stop the watchdog."""
        self._closed.set()
        if self._compilations is not None:
            self._compilations.remove_start_callback(self._compile_begins)
            self._compilations.remove_end_callback(self._compile_ends)

    def limit(self, step: int) -> float:
        """Return the seconds after which ``step`` counts as hung."""
        if self._hang_seconds is not None:
            return self._hang_seconds
        return hang_limit([(self._tokens(one), seconds) for one, seconds in list(self._ended)], self._tokens(step))

    def _tokens(self, step: int) -> int:
        return self._consumed_tokens(step) - self._consumed_tokens(step - 1)

    def _compile_begins(self, _: object) -> None:
        self._compiling = True

    def _compile_ends(self, _: object) -> None:
        self._compiling = False

    def _watch(self) -> None:
        least = _LEAST_SECONDS if self._hang_seconds is None else self._hang_seconds
        tick = min(1.0, least / 10)
        seen, waited = self._running, 0.0
        # Counted in ticks of this thread, not by a clock, because a process that is suspended by a batch system for an
        # hour, or that gets no core, has not hung for an hour.
        while not self._closed.wait(tick):
            step = self._running
            waited = waited + tick if step is not None and step == seen and not self._compiling else 0.0
            seen = step
            if step is not None and waited > least and waited > (limit := self.limit(step)):
                _end_process(step, limit)


def _end_process(step: int, limit: float) -> None:
    rank = dist.get_rank()
    lines = [
        f"step {step} has not ended within {limit:g} s (training.hang_seconds; 0 switches this off): some rank hangs, "
        "and the others wait for it. The stacks of this rank's threads:",
        *_stacks(),
    ]
    with suppress(OSError):
        os.write(sys.stderr.fileno(), "".join(f"rank {rank}: {line}\n" for line in lines).encode())
    # Delayed, because a launcher kills all ranks when one exits, and the others must print their stacks first.
    time.sleep(min(30.0, max(5.0, limit / 10)))
    os._exit(HUNG)  # sys.exit would end this thread only


def _stacks() -> list[str]:
    """Return the stacks of all threads, in lines."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace").splitlines()
