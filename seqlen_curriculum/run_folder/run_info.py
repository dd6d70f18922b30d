"""A run's ``run.json``: its configuration and launches, so that a report needs only the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, field_validator, model_validator

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.fields import CountOrZero
from seqlen_curriculum.files import replace_text
from seqlen_curriculum.run_folder import RUN_INFO
from seqlen_curriculum.run_folder.json_file import read_checked
from seqlen_curriculum.strict_json import shown

__all__ = ["Launch", "RunInfo", "read_run_info", "write_run_info"]


_MOST = 2**60
"""A larger number of cores or bytes is damage."""
# Keys written by another version of this package are accepted, and kept when a launch is added.
_OPEN = ConfigDict(extra="allow", frozen=True)


class Launch(BaseModel):
    """One start of the training script."""

    model_config = _OPEN

    started: str
    """UTC, in ISO format."""
    ranks: CountOrZero
    first_step: CountOrZero
    versions: dict[str, str]
    """Versions of Python and the packages, by name."""
    device: dict[str, Any]
    """Devices of rank 0's node: ``accelerator`` (None on a CPU), ``cpu``, ``cores``, ``memory_bytes``."""

    @field_validator("device")
    @classmethod
    def _countable(cls, device: dict[str, Any]) -> dict[str, Any]:
        for name in ("cores", "memory_bytes", "accelerator_memory_bytes"):
            value = device.get(name)
            if value is not None and (type(value) not in (int, float) or not 0 <= value <= _MOST):
                raise ValueError(f"{name}: {shown(value)} is not a count")
        return device


class RunInfo(BaseModel):
    """The content of ``run.json``."""

    model_config = _OPEN

    config: dict[str, Any]
    """The configuration of the newest launch, with defaults and overrides."""
    launches: list[Launch]
    """Oldest first."""

    @model_validator(mode="after")
    def _finite(self) -> RunInfo:
        json.dumps(self.model_dump(), allow_nan=False)
        return self


_SCHEMA = TypeAdapter(RunInfo)


def read_run_info(save: Path) -> RunInfo | None:
    """Return the content of ``SAVE/run.json``, None without the file. Raises CheckpointError if it is damaged."""
    return read_checked(save / RUN_INFO, _SCHEMA, "move it away to continue without it")


def write_run_info(save: Path, info: RunInfo) -> None:
    """Replace ``SAVE/run.json``. Raises CheckpointError."""
    path = save / RUN_INFO
    try:
        replace_text(path, json.dumps(info.model_dump(), indent=2, default=str))
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be written ({error.strerror}); free space or choose another --save"
        ) from error
