"""The strict base of every configuration section, its number types, and how its problems are told.

Sections forbid unknown keys, never coerce a string to a number, and reject NaN and infinity. Counts may be written
as whole floats, so that ``"train_tokens": 157e9`` and ``--set training.train_tokens=2e9`` mean what they say.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

__all__ = ["Count", "CountOrZero", "Section", "Seqlen", "nearest", "problems"]


def _whole(value: object) -> object:
    """``2e9`` to ``2000000000``; anything else unchanged for pydantic to judge."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=10**15)]
Seqlen = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=2**24)]
CountOrZero = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=10**15)]


class Section(BaseModel):
    """Base of a configuration section: strict types, unknown keys forbidden, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def nearest(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest valid names, else the list of valid names."""
    names = sorted(valid)
    close = [other for other in names if name and name in other] or difflib.get_close_matches(name, names, n=1)
    if close:
        return "; did you mean " + " or ".join(f"'{other}'" for other in close) + "?"
    return f"; valid names: {', '.join(names)}"


def problems(error: ValidationError, section: type[BaseModel], where: str) -> list[str]:
    """One line for each problem of ``error``: the key in full, the value found, what is expected."""
    return [_line(detail, section, where) for detail in error.errors(include_url=False)]


def _line(detail: Any, section: type[BaseModel], where: str) -> str:
    key = ".".join([*filter(None, [where]), *map(str, detail["loc"])])
    if detail["type"] == "extra_forbidden":
        parent = _section_at(section, detail["loc"][:-1])
        return f"{key}: unknown key" + nearest(str(detail["loc"][-1]), parent.model_fields if parent else ())
    if detail["type"] == "missing":
        return f"{key}: required, but not given"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key}: {message}"
    if detail["type"] in ("model_type", "dict_type"):
        return f"{key}: {detail['input']!r} is not an object; write {{...}}"
    return f"{key}: {detail['input']!r} is not valid: {message[0].lower()}{message[1:]}"


def _section_at(section: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The section class that holds the key at ``path`` below ``section``."""
    for name in path:
        field = section.model_fields.get(str(name))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section
