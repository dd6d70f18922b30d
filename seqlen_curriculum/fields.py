"""The strict base of every configuration section, its types of values, and how its problems are told.

Sections forbid unknown keys, never coerce a string to a number, and reject NaN and infinity. Counts may be written
as whole floats, so that ``"train_tokens": 157e9`` and ``--set training.train_tokens=2e9`` mean what they say.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

__all__ = [
    "Count",
    "CountOrZero",
    "ImportPath",
    "Section",
    "Seqlen",
    "flat",
    "load_function",
    "misspelt_sections",
    "nearest",
    "parse_section",
    "problems",
]


def _whole(value: object) -> object:
    """``2e9`` to ``2000000000``; anything else unchanged for pydantic to judge."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=10**15)]
Seqlen = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=2**24)]
CountOrZero = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=10**15)]


def load_function(path: str) -> Callable[[int], float]:
    """The function that ``package.module:function`` names; ValueError says which part is wrong."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"{path!r} is not an import path; write 'package.module:function'")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # importing runs the user's module, which may raise anything
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path!r} can't be imported ({told}); is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise ValueError(f"{path!r} is a {type(function).__name__}, not a function")
    return cast("Callable[[int], float]", function)


def _import_path(path: str) -> str:
    load_function(path)
    return path


ImportPath = Annotated[str, AfterValidator(_import_path)]


class Section(BaseModel):
    """Base of a configuration section: strict types, unknown keys forbidden, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def parse_section(section: type[S], value: object, name: str, found: list[str]) -> S | None:
    """``value`` as a checked ``section``; None, and its problems added to ``found``, where it has any."""
    try:
        return section.model_validate(value)
    except ValidationError as error:
        found += problems(error, section, name)
        return None


def misspelt_sections(raw: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """DeepSpeed ignores top-level keys it doesn't know, so a misspelt section would be lost in silence."""
    names = set(known)
    others = [str(name) for name in raw if name not in names and not str(name).startswith("_")]  # _data is a comment
    close = {name: difflib.get_close_matches(name, names, n=1, cutoff=0.8) for name in others}
    return [f"{name}: unknown section; did you mean '{match[0]}'?" for name, match in close.items() if match]


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings: ``("model.num_layers", 12), ...``."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


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
