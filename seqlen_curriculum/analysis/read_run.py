"""Read a run folder. A damaged file raises DataError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.errors import CheckpointError, DataError
from seqlen_curriculum.run_folder import ROLLBACKS, RUN_INFO, RUN_LOG
from seqlen_curriculum.run_folder.rollbacks import Rollback, read_rollbacks
from seqlen_curriculum.run_folder.run_info import read_run_info
from seqlen_curriculum.run_folder.run_log import MACHINE_KEYS, read_run_log
from seqlen_curriculum.strict_json import shown

__all__ = ["LOGS", "load_run", "read_run"]

LOGS = (RUN_LOG, RUN_INFO, ROLLBACKS)
"""The files of a run folder that a report reads."""
_MOST = 1e300
"""Sums and products of larger numbers may overflow."""
_OF_A_STEP = ("step", "seqlen", "rows", "consumed_tokens")
_NUMBERS = {
    "loss": (*_OF_A_STEP, "loss", "lr", "seconds"),
    "valid_loss": ("step", "consumed_tokens", "valid_loss", "valid_ppl", "seconds"),
    "skipped": _OF_A_STEP,
}
"""The keys that a record must have, by the key that identifies its kind."""
_PLOTTED = ("grad_norm", "variance_norm", "variance_max", "momentum_norm", "momentum_max")
"""Keys that a record may have."""


def load_run(save: Path, name: str = "") -> Run:
    """Return the run in the folder ``save``. Raises DataError if there is no run, or if it has not made a step yet."""
    run = read_run(save, name)
    if not run.steps:
        path = save / RUN_LOG
        raise DataError(f"{path}: no training step here yet; give the --save folder of a run that has started")
    return run


def read_run(save: Path, name: str = "") -> Run:
    """Return the run in ``save``, which may not have made its first step yet. Raises DataError if there is no folder."""
    path = save / RUN_LOG
    if not save.is_dir():
        raise DataError(f"{save}: there is no such folder; give the --save folder of a run")
    records = list(read_run_log(path)) if path.exists() else []
    for record in records:
        _check(record, path)
    try:
        info, rollbacks = read_run_info(save), read_rollbacks(save)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    return Run(
        (name or save.resolve().name).encode(errors="replace").decode(),  # a folder's name may be no UTF-8
        records,
        info.model_dump() if info else {},
        None if rollbacks is None else [_as_reported(rollback) for rollback in rollbacks],
    )


def _as_reported(rollback: Rollback) -> dict[str, Any]:
    """Return the fields of a rollback that a report contains, with ``seconds`` if the file has them."""
    reported = {"step", "loss", "ratio", "returned_to", "skipped", "seconds"}
    return rollback.model_dump(mode="json", include=reported, exclude_unset=True)


def _check(record: dict[str, Any], path: Path) -> None:
    kind = next((key for key in _NUMBERS if key in record), "skipped")
    needed = [*_NUMBERS[kind], *(key for key in MACHINE_KEYS if record.get(key) is not None)]
    plotted = [key for key in _PLOTTED if record.get(key) is not None]
    bad = [key for key in (*needed, *plotted) if not _is_number(record.get(key))]
    bad += [key for key in (*_OF_A_STEP, *MACHINE_KEYS) if not bad and (record.get(key) or 0) < 0]
    if bad:
        raise DataError(
            f"{path}: the record of step {record['step']!r} has {bad[0]} {shown(record.get(bad[0]))}, which is not a finite "
            "number of its range; the file is damaged"
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _MOST  # False for NaN; isfinite(10**400) is an OverflowError
