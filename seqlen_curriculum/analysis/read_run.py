"""A run's folder read, and refused in words where a file of it is damaged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes Python's own from 3.12 on

from seqlen_curriculum.analysis.run import Run
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.run_folder.run_log import read_run_log

__all__ = ["LOGS", "load_run", "read_run"]

LOGS = ("runlog.jsonl", "run.json", "rollbacks.json")
"""The files of a run folder that a report is made of."""
_OF_A_STEP = ("step", "seqlen", "rows", "consumed_tokens")
_NUMBERS = {
    "loss": (*_OF_A_STEP, "loss", "lr", "seconds"),
    "valid_loss": ("step", "consumed_tokens", "valid_loss", "valid_ppl", "seconds"),
    "skipped": _OF_A_STEP,
}
"""What a record must hold, by the key that tells its kind."""


class _Launch(TypedDict):
    started: str
    ranks: int
    first_step: int
    versions: dict[str, str]
    device: dict[str, Any]


class _Info(TypedDict):
    config: dict[str, Any]
    launches: list[_Launch]


class _Rollback(TypedDict):
    step: int
    loss: float | None
    ratio: float | None
    returned_to: int
    skipped: Annotated[list[int], Field(min_length=2, max_length=2)]
    seconds: NotRequired[float]


def load_run(save: Path, name: str = "") -> Run:
    """The run in the folder ``save``. Raises DataError where there is no run, or none that has made a step."""
    run = read_run(save, name)
    if not run.steps:
        path = save / "runlog.jsonl"
        raise DataError(f"{path}: no training step here yet; give the --save folder of a run that has started")
    return run


def read_run(save: Path, name: str = "") -> Run:
    """``load_run`` of a run that may still be about to make its first step."""
    path = save / "runlog.jsonl"
    if not save.is_dir():
        raise DataError(f"{save}: there is no such folder; give the --save folder of a run")
    records = list(read_run_log(path)) if path.exists() else []
    for record in records:
        _check(record, path)
    info, rollbacks = _object(save / "run.json", _Info), _object(save / "rollbacks.json", list[_Rollback])
    return Run(name or save.resolve().name, records, info or {}, rollbacks)


def _check(record: dict[str, Any], path: Path) -> None:
    kind = next((key for key in _NUMBERS if key in record), "skipped")
    bad = [key for key in _NUMBERS[kind] if not _is_number(record.get(key))]
    if bad:
        raise DataError(
            f"{path}: the record of step {record['step']!r} has {bad[0]} {record.get(bad[0])!r}, which is no finite number; "
            "the file is damaged"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _object(path: Path, kind: Any) -> Any:
    """What a JSON file of ``kind`` holds, None where there is no file. Raises DataError."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        told = f"{where}: {first['msg']}" if where else first["msg"]
        raise DataError(f"{path}: can't be read ({told}); move it away to do without") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); move it away to do without") from error
