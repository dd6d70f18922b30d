"""A JSON file of a run folder, checked against its schema."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from seqlen_curriculum.errors import CheckpointError

__all__ = ["read_checked"]

T = TypeVar("T")


def read_checked(path: Path, schema: TypeAdapter[T], fix: str) -> T | None:
    """Return the content of the JSON file ``path``, None if it doesn't exist.

    Raises CheckpointError, ending with ``fix``, if it can't be read or doesn't match ``schema``.
    """
    try:
        return schema.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else _first_problem(error)
        raise CheckpointError(f"{path}: can't be read ({reason}); {fix}") from error


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))  # ("launches", 0, "ranks") is launches.0.ranks; () is the whole file
    return f"{key}: {first['msg']}" if key else str(first["msg"])
