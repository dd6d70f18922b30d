"""A probe: the real training script, run under the launcher up to a step, and judged by its log.

A probe is a run folder like any other. What it has in common with an earlier one it takes over: the log and the checkpoint
up to where their schedules part.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqlen_curriculum.analysis.stability import ratios_to_best
from seqlen_curriculum.config.equivalence import count_identical_steps
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.errors import DIVERGED, CheckpointError, SeqlenCurriculumError
from seqlen_curriculum.files import is_locked, lock_of, move, replace_text, try_lock
from seqlen_curriculum.run_folder.checkpoint_manifest import Checkpoint, checkpoint_folders, read_checkpoint
from seqlen_curriculum.run_folder.run_log import RunLog, read_run_log

__all__ = ["ProbeRun", "Trial", "inherit"]

_LOG = "runlog.jsonl"
_POLL_SECONDS = 0.5

Watch = Callable[["Trial"], None]


class Trial(NamedTuple):
    """How a probe came out."""

    stable: bool
    step: int
    """The last one trained."""
    ratio: float | None
    """The largest perplexity over the best before it; None where training diverged, or was evaluated once."""


@dataclass(frozen=True)
class ProbeRun:
    """The run of one schedule in the folder ``save``."""

    save: Path
    raw: dict[str, Any]
    """Its file."""
    most: float
    """The perplexity over the best before it that is still no fluctuation."""

    @property
    def config(self) -> RunConfig:
        """Its file, checked."""
        return RunConfig.from_dict(self.raw)

    @property
    def _launch(self) -> Path:
        """Locked by the launcher, whose ranks lock the folder only after they have started."""
        return self.save.with_suffix(".launch")

    def records(self) -> list[dict[str, Any]]:
        """Of its log, none before it has begun."""
        return list(read_run_log(self.save / _LOG)) if (self.save / _LOG).exists() else []

    def last_step(self) -> int:
        """The last one in its log; 0 before it has begun."""
        return max((record["step"] for record in self.records()), default=0)

    def inherited_steps(self) -> int:
        """Steps taken over from another probe."""
        try:
            launches = json.loads((self.save / "run.json").read_text(encoding="utf-8"))["launches"]
        except FileNotFoundError:
            return self.last_step()  # taken over, and not yet launched
        return int(launches[0]["first_step"]) - 1

    def judged(self, until_step: int) -> Trial:
        """What the log tells of the steps up to ``until_step``, of all there are."""
        records = [record for record in self.records() if record["step"] <= until_step]
        losses = [record["valid_loss"] for record in records if "valid_loss" in record]
        return _trial(records[-1]["step"] if records else 0, losses, self.most)

    def train(self, until_step: int, launcher: Sequence[str], script: Path, watch: Watch) -> Trial:
        """Train up to ``until_step``, or on from where an earlier call stopped; ``watch`` is told how it stands.

        Raises CheckpointError where the script fails for another reason than a fluctuation, with the end of its output.
        """
        self._wait_for_earlier(until_step, watch)
        trial = self.judged(until_step)
        if not trial.stable or self._is_through(until_step):
            return trial
        output = self.save.with_suffix(".log")
        before = output.stat().st_size if output.exists() else 0
        process = self._start([*launcher, str(script)], until_step, output)
        try:
            status = self._wait(process, until_step, watch)
        except BaseException:  # Ctrl-C, or the end of the budget: the run saves and the same command goes on
            _terminate(process)
            self._wait_for_earlier(until_step, lambda _: None)
            raise
        trial = self.judged(until_step)
        if not trial.stable:
            return trial
        if status == DIVERGED:
            return Trial(False, trial.step, None)
        if status or not self._is_through(until_step):
            told = f"{output}: the probe ended with status {status} and is not at step {until_step}, saved"
            raise CheckpointError(f"{told}; mend what it tells, then give the same command:\n{_tail(output, before)}")
        return trial

    def _is_through(self, until_step: int) -> bool:
        """Whether it is saved after ``until_step``, so that this step's evaluation is in the log."""
        try:
            return read_checkpoint(self.save / f"global_step{until_step}").step == until_step
        except CheckpointError:
            return False

    def _start(self, command: Sequence[str], until_step: int, output: Path) -> subprocess.Popen[bytes]:
        path = self.save.with_suffix(".json")
        replace_text(path, json.dumps(self.raw, indent=2) + "\n")
        flags = ["--config", str(path), "--save", str(self.save), "--until-step", str(until_step)]
        lock = try_lock(self._launch)
        assert lock is not None
        with output.open("ab") as out:
            options: dict[str, Any] = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = subprocess.Popen([*command, *flags], **options, pass_fds=(lock,))  # it holds the lock from now on
        os.close(lock)
        return process

    def _wait(self, process: subprocess.Popen[bytes], until_step: int, watch: Watch) -> int:
        while process.poll() is None:
            watch(self.judged(until_step))
            time.sleep(_POLL_SECONDS)
        self._wait_for_earlier(until_step, watch)  # the launcher may end before its ranks
        return int(process.returncode)

    def _wait_for_earlier(self, until_step: int, watch: Watch) -> None:
        """A launch outlives the command that began it, if that is killed; it trains what is wanted."""
        while is_locked(self._launch) or is_locked(lock_of(self.save)):
            watch(self.judged(until_step))
            time.sleep(_POLL_SECONDS)


def _trial(step: int, losses: Sequence[float], most: float) -> Trial:
    if len(losses) < 2:
        return Trial(True, step, None)
    ratios = ratios_to_best(np.exp(np.minimum(losses, 700)))[1:]
    largest = float(ratios.max())
    return Trial(largest <= most, step, largest)


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the launcher and all ranks on this node, which finish their step and save."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    process.wait()


def _tail(output: Path, start: int) -> str:
    """The error that the script told of, else its last lines, of what it wrote from the byte ``start`` on."""
    lines = output.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return "\n".join(errors[-1:] or lines[-10:])


def inherit(run: ProbeRun, donors: Sequence[ProbeRun], until_step: int) -> int:
    """Let a run that has not begun start with what it has in common with one of ``donors``; returns these steps.

    A folder appears whole or not at all; the files of checkpoints are linked, not copied, where the disk can.
    """
    if run.save.exists():
        return run.inherited_steps()
    shared = [(checkpoint.step, donor, checkpoint) for donor, checkpoint in _usable(run, donors, until_step)]
    if not shared:
        return 0
    step, donor, checkpoint = max(shared, key=lambda one: one[0])
    unfinished = run.save.with_name(f".{run.save.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint.folder, unfinished / checkpoint.folder.name, copy_function=_link)
    shutil.copy(donor.save / _LOG, unfinished / _LOG)
    RunLog.rewind(unfinished / _LOG, step)
    move(unfinished, run.save)
    return step


def _usable(run: ProbeRun, donors: Sequence[ProbeRun], until_step: int) -> Iterator[tuple[ProbeRun, Checkpoint]]:
    for donor in donors:
        alike = count_identical_steps(run.config, donor.config, until_step)
        for folder in checkpoint_folders(donor.save):
            try:
                checkpoint = read_checkpoint(folder)
            except SeqlenCurriculumError:
                continue
            if checkpoint.step <= alike:
                yield donor, checkpoint


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
