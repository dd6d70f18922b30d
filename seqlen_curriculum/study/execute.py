"""Train the runs of a study, several at a time."""

from __future__ import annotations

import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from seqlen_curriculum.study.run_folders import StudyRun
from seqlen_curriculum.tuning.launching import stop_groups

__all__ = ["Slot", "train_all"]

_POLL_SECONDS = 0.3

Slot = Mapping[str, str]
"""The environment variables of a run that trains beside others, such as the device it may use."""


@dataclass
class _Job:
    """A run that trains in a slot."""

    run: StudyRun
    slot: Slot | None
    process: subprocess.Popen[bytes] | None
    """Both are None if an earlier command, which was killed, has started it."""
    output_start: int

    @classmethod
    def begin(cls, run: StudyRun, slot: Slot) -> _Job:
        """Start or resume ``run``."""
        output_start = run.output_bytes
        return cls(run, slot, run.start(slot), output_start)

    @property
    def is_running(self) -> bool:
        # The process is the run's first one: another may hold the lock for a moment longer.
        return (self.process is not None and self.process.poll() is None) or self.run.is_running

    @property
    def status(self) -> int | None:
        """The exit status; None if it is unknown."""
        return None if self.process is None else int(self.process.returncode)

    def wait(self) -> None:
        """Wait until no process trains the run."""
        while self.is_running:
            time.sleep(_POLL_SECONDS)


def train_all(runs: Sequence[StudyRun], slots: Sequence[Slot], on_end: Callable[[StudyRun], None]) -> None:
    """Train ``runs``, one per slot at a time, and call ``on_end`` with each as it ends.

    Raises CheckpointError if one fails for a reason other than divergence. On any exception, also Ctrl-C, the runs that
    train are saved and stopped.
    """
    # Nothing is started beside runs that survived a killed command, because their slots are unknown.
    survivors = [run for run in runs if run.is_running]
    waiting = deque(run for run in runs if run not in survivors)
    free, jobs = deque(slots), [_Job(run, None, None, run.output_bytes) for run in survivors]
    try:
        while waiting or jobs:
            while waiting and free and not any(job.slot is None for job in jobs):
                jobs.append(_Job.begin(waiting.popleft(), free.popleft()))
            for job in [job for job in jobs if not job.is_running]:
                jobs.remove(job)
                if job.slot is not None:
                    free.append(job.slot)
                if job.run.close(job.status, job.output_start):
                    on_end(job.run)
                else:
                    waiting.appendleft(job.run)
            if jobs:
                time.sleep(_POLL_SECONDS)
    except BaseException:
        groups = (job.process.pid if job.process else job.run.group for job in jobs)
        stop_groups(group for group in groups if group is not None)
        for job in jobs:
            job.wait()
        raise
