"""Write run logs as TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.errors import ConfigError, DataError
from seqlen_curriculum.extras import missing_package
from seqlen_curriculum.files import writable_folder
from seqlen_curriculum.run_folder.run_log import MACHINE_KEYS

__all__ = ["check_event_folders", "write_event_files"]

_TAGS = {
    "Train": (
        *("loss", "lr", "seqlen", "grad_norm", "variance_norm", "variance_max", "momentum_norm", "momentum_max"),
        *MACHINE_KEYS,
    ),
    "Valid": ("valid_loss", "valid_ppl"),
}
"""The keys of a record by the prefix of their tags, with the names of training's own TensorBoard monitor."""


def check_event_folders(folder: Path, names: Sequence[str]) -> None:
    """Raise ConfigError if a run already has event files in ``folder``, or if a package is missing."""
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"--tensorboard: {missing_package('tensorboard')}") from error
    for name in names:
        # TensorBoard shows all event files of a folder as one run: a second one would mix two sets of curves.
        if any((folder / name).glob("*tfevents*")):
            raise ConfigError(
                f"--tensorboard {folder}: {folder / name} holds event files already; delete it or choose another folder"
            )
    writable_folder("--tensorboard", folder)


def write_event_files(runs: Sequence[Run], folder: Path) -> None:
    """Write one event file per run to ``folder``/<its name>, with its values by step.

    A record's wall time is the start of the run's first launch plus ``seconds`` of all records up to it, without the gaps
    between launches. Without a start in ``run.json`` it is 1970. Values are float32, as TensorBoard stores them.
    Raises DataError if a file can't be written.
    """
    for run in runs:
        try:
            _write(run, folder / run.name)
        except OSError as error:
            raise DataError(f"{folder / run.name}: event files can't be written ({error.strerror})") from error


def _write(run: Run, folder: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    launches = run.info.get("launches")
    start = datetime.fromisoformat(launches[0]["started"]).timestamp() if launches else 0.0
    writer = EventFileWriter(str(folder))
    try:
        for record, hours in zip(run.records, run.ends[2].tolist(), strict=True):
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(record).items()]
            if not record.get("skipped"):  # as in the monitor of a training run
                writer.add_event(
                    Event(wall_time=start + 3600 * hours, step=record["step"], summary=Summary(value=values))
                )
    finally:
        writer.close()


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a record by tag, without the ``seconds`` of an evaluation, which are not the time of a step."""
    group = "Valid" if "valid_loss" in record else "Train"
    return {f"{group}/{key}": record[key] for key in _TAGS[group] if record.get(key) is not None}
