"""A JSON file of a run folder, checked against its schema."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.run_folder.own_files import check_own

__all__ = ["first_problem", "read_checked"]

T = TypeVar("T")


def read_checked(path: Path, schema: TypeAdapter[T], fix: str) -> T | None:
    """Return the content of the JSON file ``path``, None if it doesn't exist.

    Raises CheckpointError, ending with ``fix``, if it can't be read or doesn't match ``schema``.
    """
    try:
        check_own(path)
        return schema.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_problem(error)
        raise CheckpointError(f"{path}: can't be read ({reason}); {fix}") from error


def first_problem(error: ValidationError) -> str:
    """Return the key and the message of the first problem."""
    first = error.errors()[0]
    # ("launches", 0, "ranks") is launches.0.ranks; () is the whole file; (..., NAME, "[key]") has a wrong name.
    path = first["loc"][:-2] if first["loc"][-1:] == ("[key]",) else first["loc"]
    message = first["msg"].removeprefix("Value error, ")
    key = ".".join(map(str, path))[:80]
    return f"{key}: {message}" if key else message
