"""Bounds on the CPU time and memory of a call, for inputs that are made at random."""

import contextlib
import re
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from helpers.launching import limit

SECONDS, MEGABYTES = 2.0, 500
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_NO_MEMORY = re.compile(r"MemoryError|can't allocate|bad_alloc|out of memory|Cannot allocate", re.IGNORECASE)


class TooSlowError(BaseException):
    """A call that took too long. It is no Exception, so that the tested code can't handle it."""


@dataclass
class Bounds:
    """Ends a call after ``SECONDS`` of CPU time, and limits what it allocates to ``MEGABYTES``; keeps the longest time."""

    slowest: float = 0.0

    @contextlib.contextmanager
    def applied(self):
        memory, started = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
        handler = signal.signal(signal.SIGPROF, _stop)
        resource.setrlimit(resource.RLIMIT_AS, (_mapped_bytes() + MEGABYTES * 10**6, memory[1]))
        signal.setitimer(signal.ITIMER_PROF, limit(SECONDS))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, memory)
            signal.signal(signal.SIGPROF, handler)
            self.slowest = max(self.slowest, time.process_time() - started)

    def report(self, outcomes):
        """Print what the calls did; pytest shows it with ``-s``."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"\n{dict(outcomes)}, slowest {self.slowest:.3f} s, {peak / 1e6:.0f} MB at most in this process")


def check_message(message):
    """Check that a terminal can print an error's message, that another library didn't write it, and that memory sufficed."""
    message.encode()
    assert message
    assert len(message) < 40_000
    assert not _CONTROL.search(message), message
    assert not re.search(r"Traceback|pydantic|^\w+Error\b", message), message
    assert not _NO_MEMORY.search(message), message


def _stop(*_):
    raise TooSlowError


def _mapped_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
