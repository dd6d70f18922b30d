"""The runs of a study on disk: ordinary run folders, each with its configuration, output and lock beside it.

::

    FOLDER/
    ├── study.json                        the resolved study, by which its folder is recognized
    ├── runs/CASE.VARIANT/lr0.003-seed1/  a run folder
    │                     lr0.003-seed1.json, .log, .launch, .diverged (the error of a run that diverged)
    ├── report/                           report.html, report.json and plots
    └── tuned.json                        the configuration of the best case
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqlen_curriculum.analysis.read_run import read_run
from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.errors import DIVERGED, CheckpointError, ConfigError
from seqlen_curriculum.fields import flat
from seqlen_curriculum.files import is_locked, lock_folder, read_json, replace_text
from seqlen_curriculum.strict_json import shown
from seqlen_curriculum.study.plan import PlannedRun, StudyPlan
from seqlen_curriculum.tuning.launching import error_in, group_of, start_locked

__all__ = ["StudyRun", "check_unchanged", "open_folder"]

TRAIN = (sys.executable, "-m", "seqlen_curriculum.train")
"""The command that trains a run."""
_STUDY = "study.json"
_MADE_BY = "seqlen-curriculum study"
"""The mark of the file that ``slw study`` writes, which a user's file of the same name lacks."""
_MOST_LISTED = 5


@dataclass(frozen=True)
class StudyRun:
    """A run of the study in ``folder``."""

    folder: Path
    planned: PlannedRun

    @property
    def save(self) -> Path:
        """The run folder."""
        return self.folder / "runs" / self.planned.name

    def beside(self, kind: str) -> Path:
        """Return the path of the run's file of that kind: ``json``, ``log``, ``launch`` or ``diverged``."""
        return self.save.with_name(f"{self.save.name}.{kind}")

    @property
    def is_running(self) -> bool:
        """True if a process trains it, perhaps one that survived a killed study."""
        return is_locked(self.beside("launch"))

    @property
    def group(self) -> int | None:
        """The process group that trains it; None if unknown."""
        return group_of(self.beside("launch"))

    @property
    def output_bytes(self) -> int:
        """The size of the output so far."""
        output = self.beside("log")
        return output.stat().st_size if output.exists() else 0

    @property
    def has_ended(self) -> bool:
        """True if it has finished or diverged, so that it needs no more training."""
        return self.save.is_dir() and (self.beside("diverged").exists() or self.read().finished)

    def read(self, name: str = "") -> Run:
        """Return its contents. Raises DataError if it has no folder or a damaged one."""
        return read_run(self.save, name)

    def start(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start or resume its training on one rank, with variables of ``environment`` in addition to this process's."""
        self.save.parent.mkdir(parents=True, exist_ok=True)
        config = self.beside("json")
        replace_text(config, json.dumps(self.planned.raw, indent=2) + "\n")
        self.beside("diverged").unlink(missing_ok=True)  # of a folder that was moved away
        command = [*TRAIN, str(config), "--save", str(self.save)]
        # What a launcher sets for a single rank. A launcher would load DeepSpeed once more for each run.
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        variables = {**os.environ, **rank, "MASTER_PORT": str(_free_port()), **environment}
        return start_locked(command, self.beside("log"), self.beside("launch"), variables)

    def close(self, status: int | None, output_start: int) -> bool:
        """Return whether the run has ended, after its process exited with ``status``; None if that is unknown.

        Raises CheckpointError with the error in its output, which starts at byte ``output_start``, if it failed.
        """
        if self.has_ended:
            return True
        if status is None:
            return False
        output = self.beside("log")
        error = error_in(output, output_start)
        if status == DIVERGED:
            replace_text(self.beside("diverged"), error + "\n")
            return True
        raise CheckpointError(
            f"{output}: the run ended with status {status} before its last step; fix the error below, then rerun the same "
            f"command:\n{error}"
        )


def open_folder(folder: Path, plan: StudyPlan) -> None:
    """Lock the folder of a study. Raises ConfigError if it contains other files, CheckpointError if it is locked."""
    study = folder / _STUDY
    if study.exists() and read_json(study, comments=True).get("made_by") != _MADE_BY:
        raise ConfigError(f"--save {folder}: its {_STUDY} was not written by slw study; give a new folder")
    if folder.exists() and not study.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise ConfigError(
            f"--save {folder}: contains other files and no {_STUDY}; give a new folder, or that of a study"
        )
    lock_folder(folder, "--save", "running a study in it")
    contents = {
        "made_by": _MADE_BY,
        "cases": {arm.name: arm.raw for arm in plan.arms},
        "rates": plan.rates,
        "tuning_seeds": plan.tuning_seeds,
        "seeds": plan.seeds,
        "reference": plan.reference,
    }
    replace_text(study, json.dumps(contents, indent=2) + "\n")


def check_unchanged(runs: Sequence[StudyRun]) -> None:
    """Raise ConfigError if a run was started with other settings than the study now gives it."""
    problems = []
    for run in runs:
        if run.save.exists() and (changes := _changes(read_json(run.beside("json")), run.planned.raw)):
            problems.append(f"{run.save}: was trained with {', '.join(changes[:_MOST_LISTED])}")
    if problems:
        more = [f"and {len(problems) - _MOST_LISTED:,} other runs"] if len(problems) > _MOST_LISTED else []
        raise ConfigError(
            [*problems[:_MOST_LISTED], *more, "move these folders away to train them again, or give another --save"]
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ, each with both values."""
    saved, given = dict(flat(before)), dict(flat(now))
    keys = [key for key in {**saved, **given} if not key.startswith("_") and saved.get(key) != given.get(key)]
    return [f"{key} {shown(saved.get(key))}, the study has {shown(given.get(key))}" for key in keys]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
