"""A probe: a run of the real training script up to some step, judged by its log.

A probe is an ordinary run folder. If its first steps have the same schedule as those of an earlier probe, it inherits their
log and checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from seqlen_curriculum.config.equivalence import count_identical_steps
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.errors import DIVERGED, CheckpointError, SeqlenCurriculumError
from seqlen_curriculum.files import is_locked, lock_of, move, replace_text, sync_tree
from seqlen_curriculum.run_folder import RUN_LOG
from seqlen_curriculum.run_folder.checkpoint_manifest import Checkpoint, checkpoint_folders, read_checkpoint
from seqlen_curriculum.run_folder.ratios import perplexity_ratios
from seqlen_curriculum.run_folder.run_info import read_run_info
from seqlen_curriculum.run_folder.run_log import RunLog, read_run_log
from seqlen_curriculum.tuning.launching import error_in, start_locked, stop_groups

__all__ = ["ProbeRun", "Trial", "inherit"]

_POLL_SECONDS = 0.5

Watch = Callable[["Trial"], None]


class Trial(NamedTuple):
    """The verdict on a probe."""

    stable: bool
    step: int
    """The last trained step."""
    ratio: float | None
    """The largest perplexity over the best before it; None if training diverged, or was evaluated only once."""


@dataclass(frozen=True)
class ProbeRun:
    """The run of one schedule in the folder ``save``."""

    save: Path
    raw: dict[str, Any]
    """Its configuration."""
    max_ratio: float
    """A perplexity above this multiple of the best before it is a fluctuation."""

    @property
    def config(self) -> RunConfig:
        """The parsed configuration."""
        return RunConfig.from_dict(self.raw)

    @property
    def launch_lock(self) -> Path:
        """Lock file of the launcher and its ranks. The ranks lock the run's folder only later, after their start."""
        return self.save.with_suffix(".launch")

    def records(self) -> list[dict[str, Any]]:
        """Return the records of its log, empty before it has started."""
        return list(read_run_log(self.save / RUN_LOG)) if (self.save / RUN_LOG).exists() else []

    def last_step(self) -> int:
        """Return the last step in its log, 0 before it has started."""
        return max((record["step"] for record in self.records()), default=0)

    def inherited_steps(self) -> int:
        """Return the steps inherited from another probe."""
        info = read_run_info(self.save)
        if info is None:
            return self.last_step()  # inherited, and not yet launched
        return info.launches[0].first_step - 1

    def judge(self, until_step: int) -> Trial:
        """Return the verdict on the logged steps up to ``until_step``."""
        records = [record for record in self.records() if record["step"] <= until_step]
        step = records[-1]["step"] if records else 0
        losses = [record["valid_loss"] for record in records if "valid_loss" in record]
        if len(losses) < 2:
            return Trial(True, step, None)
        # Losses of 3.0, 2.0 and 2.2 are perplexities of 20.1, 7.4 and 9.0. The largest ratio to the best before is that of
        # the third, 9.0 / 7.4 = 1.22.
        ratios = perplexity_ratios(losses)[1:]
        largest = float(ratios.max())
        return Trial(largest <= self.max_ratio, step, largest)

    def train(self, until_step: int, launcher: Sequence[str], script: Path, watch: Watch) -> Trial:
        """Train up to ``until_step``, resuming an earlier call; call ``watch`` with the current verdict twice per second.

        Raises CheckpointError with the end of the script's output if it fails for a reason other than a fluctuation.
        """
        self._wait_for_unlock(until_step, watch)
        trial = self.judge(until_step)
        if not trial.stable or self.is_saved_at(until_step):
            return trial
        output = self.save.with_suffix(".log")
        before = output.stat().st_size if output.exists() else 0
        process = self._start([*launcher, str(script)], until_step, output)
        try:
            status = self._wait(process, until_step, watch)
        except BaseException:  # Ctrl-C or the end of the budget: the run saves, and the same command resumes it
            stop_groups([process.pid])
            process.wait()
            self._wait_for_unlock(until_step, lambda _: None)
            raise
        trial = self.judge(until_step)
        if not trial.stable:
            return trial
        if status == DIVERGED:
            return Trial(False, trial.step, None)
        if status or not self.is_saved_at(until_step):
            raise CheckpointError(
                f"{output}: the probe ended with status {status} before step {until_step} was saved; fix the error below, "
                f"then rerun the same command:\n{error_in(output, before)}"
            )
        return trial

    def is_saved_at(self, until_step: int) -> bool:
        """Return whether there is a checkpoint of ``until_step``, whose evaluation is then in the log."""
        try:
            return read_checkpoint(self.save / f"global_step{until_step}").step == until_step
        except CheckpointError:
            return False

    def _start(self, command: Sequence[str], until_step: int, output: Path) -> subprocess.Popen[bytes]:
        path = self.save.with_suffix(".json")
        replace_text(path, json.dumps(self.raw, indent=2) + "\n")
        flags = ["--config", str(path), "--save", str(self.save), "--until-step", str(until_step)]
        return start_locked([*command, *flags], output, self.launch_lock)

    def _wait(self, process: subprocess.Popen[bytes], until_step: int, watch: Watch) -> int:
        while process.poll() is None:
            watch(self.judge(until_step))
            time.sleep(_POLL_SECONDS)
        self._wait_for_unlock(until_step, watch)  # the launcher may end before its ranks
        return int(process.returncode)

    def _wait_for_unlock(self, until_step: int, watch: Watch) -> None:
        """Wait for processes of an earlier launch, which survive a killed command and train the same run."""
        while is_locked(self.launch_lock) or is_locked(lock_of(self.save)):
            watch(self.judge(until_step))
            time.sleep(_POLL_SECONDS)


def inherit(run: ProbeRun, donors: Sequence[ProbeRun], until_step: int) -> int:
    """Copy the most steps that a new run has in common with one of ``donors``, and return their number.

    A folder is created completely or not at all. Checkpoint files are hard linked instead of copied where possible.
    """
    if run.save.exists():
        return run.inherited_steps()
    shared = [(checkpoint.step, donor, checkpoint) for donor, checkpoint in _shared(run, donors, until_step)]
    if not shared:
        return 0
    step, donor, checkpoint = max(shared, key=lambda candidate: candidate[0])
    unfinished = run.save.with_name(f".{run.save.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint.folder, unfinished / checkpoint.folder.name, copy_function=_link)
    # The donor's log continues after the checkpoint: a run that inherits step 6 keeps 6 of 15 logged steps.
    shutil.copy(donor.save / RUN_LOG, unfinished / RUN_LOG)
    RunLog.rewind(unfinished / RUN_LOG, step)
    sync_tree(unfinished)
    move(unfinished, run.save)
    return step


def _shared(run: ProbeRun, donors: Sequence[ProbeRun], until_step: int) -> Iterator[tuple[ProbeRun, Checkpoint]]:
    """Yield the donors' checkpoints up to which ``run`` has the same schedule."""
    for donor in donors:
        identical_steps = count_identical_steps(run.config, donor.config, until_step)
        for folder in checkpoint_folders(donor.save):
            try:
                checkpoint = read_checkpoint(folder)
            except SeqlenCurriculumError:  # incomplete
                continue
            if checkpoint.step <= identical_steps:
                yield donor, checkpoint


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
