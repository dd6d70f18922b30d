"""Strict base classes of configuration sections and flags, types of their values, and error messages.

Sections forbid unknown keys, never coerce a string to a number, and reject NaN and infinity. Counts may be written
as whole floats, so that ``"train_tokens": 157e9`` and ``--set training.train_tokens=2e9`` are accepted.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.strict_json import shown

__all__ = [
    "Count",
    "CountOrZero",
    "Flags",
    "ImportPath",
    "Section",
    "Seqlen",
    "describe_errors",
    "flag",
    "flat",
    "load_function",
    "misspelt_sections",
    "nearest",
    "parse_section",
    "suggest",
]


_MOST_PROBLEMS = 100
"""Problems that are listed. More of them have one cause."""


def _whole(value: object) -> object:
    """Return ``2e9`` as ``2000000000``, and anything else unchanged for pydantic to check."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Upper limits make a mistake such as 1e30 an error here instead of a 64-bit overflow later.
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=10**15)]
Seqlen = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=2**24)]
CountOrZero = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=10**15)]


def load_function(path: str) -> Callable[[int], float]:
    """Import the function ``package.module:function``. Raises ValueError if it can't be imported."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"{path!r} is not an import path; write 'package.module:function'")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # importing runs the user's module, which may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path!r} can't be imported ({reason}); is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise ValueError(f"{path!r} is a {type(function).__name__}, not a function")
    return cast("Callable[[int], float]", function)


def _importable(path: str) -> str:
    load_function(path)
    return path


ImportPath = Annotated[str, AfterValidator(_importable), Field(json_schema_extra={"pattern": "^[^:]+:[^:]+$"})]
"""Path of a function. It is imported when the configuration is checked: a wrong path is an error before the run starts."""


class Section(BaseModel):
    """Base of a configuration section: strict types, unknown keys forbidden, immutable.

    The docstring below a field is its description in the JSON schema and in the documentation.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Flags(Section):
    """Base of a group of command-line flags: the field ``top_p`` is checked as the flag ``--top-p``.

    Limits are set on the fields, as in ``top_p: float = Field(default=1.0, gt=0, le=1)``. A validator of several
    fields raises ValueError with a message that names the flags. The constructor raises one ConfigError that lists all
    problems.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(describe_errors(error, type(self))) from None


def flag(field: str) -> str:
    """Return the command-line flag of a field: ``--top-p`` for ``top_p``."""
    return "--" + field.replace("_", "-")


S = TypeVar("S", bound=Section)


def parse_section(section: type[S], value: object, name: str, problems: list[str]) -> S | None:
    """Return ``value`` as a checked ``section``, or None after adding its problems to ``problems``."""
    try:
        return section.model_validate(value)
    except ValidationError as error:
        problems += describe_errors(error, section, name)
        return None


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings: ``("model.num_layers", 12), ...``."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def suggest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the valid name most similar to ``name``, or None if all similarities are below ``cutoff`` (0 to 1)."""
    close = [other for other in valid if _may_be_similar(name, other, cutoff)]
    matches = difflib.get_close_matches(name, close, n=1, cutoff=cutoff) if close else []
    return matches[0] if matches else None


_letters = lru_cache(maxsize=2**12)(frozenset[str])


def _may_be_similar(name: str, other: str, cutoff: float) -> bool:
    """Return False only for names that difflib finds less similar than ``cutoff``, a hundred times as fast as it does."""
    # The similarity is 2 m / (len(name) + len(other)) with m equal letters. A letter that the other name lacks isn't equal:
    # "key_17" has 5 that "model" lacks, so m is at most 1.
    least = cutoff * (len(name) + len(other)) / 2
    if min(len(name), len(other)) < least:
        return False
    one, two = _letters(name), _letters(other)
    return len(name) - len(one - two) >= least and len(other) - len(two - one) >= least


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the valid names that contain or resemble ``name``, else list them all."""
    names = sorted(valid)
    # Names that contain ``name`` are more likely than similar ones: "117m" is gpt2-117m, "linear" is fixed_linear.
    close = [other for other in names if len(name) > 2 and name in other]  # x is in 'max_difficulty'
    if not close and (meant := suggest(name, names)):
        close = [meant]
    if close:
        return "; did you mean " + " or ".join(f"'{other}'" for other in close) + "?"
    return f"; valid names: {', '.join(names)}"


def misspelt_sections(raw: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Return one problem for each top-level key that looks like a misspelt section.

    DeepSpeed ignores unknown top-level keys, so a misspelt section would be silently ignored. Keys that resemble no section
    are left to DeepSpeed. Keys with a leading underscore (``_data``) are comments.
    """
    names = set(known)
    problems = []
    for key in map(str, raw):
        meant = None if key in names or key.startswith("_") else suggest(key, names, cutoff=0.8)
        if meant:
            problems.append(f"{shown(key)[1:-1]}: unknown key; did you mean '{meant}'?")
        if len(problems) == _MOST_PROBLEMS:
            break
    return problems


def describe_errors(error: ValidationError, section: type[BaseModel], where: str = "") -> list[str]:
    """Return one line for each of the first problems of ``error``: the key or flag, the value, and what is expected."""
    details = error.errors(include_url=False)
    lines = [_describe(detail, section, where) for detail in details[:_MOST_PROBLEMS]]
    more = len(details) - len(lines)
    return [*lines, f"{where or 'the file'}: {more:,} more problems"] if more else lines


def _describe(detail: Any, section: type[BaseModel], where: str) -> str:
    # pydantic marks the key of a mapping by a further part, "[key]".
    path = tuple(part for part in detail["loc"] if part != "[key]")
    value, message = detail["input"], detail["msg"].removeprefix("Value error, ")
    key = ".".join([*filter(None, [where]), *(shown(str(part))[1:-1] for part in path)])
    if issubclass(section, Flags):  # the rest of the path is an index into the flag's list
        key = flag(str(path[0])) if path else ""
    if detail["type"] == "extra_forbidden":
        parent = _section_at(section, path[:-1])
        return f"{key}: unknown key" + nearest(str(path[-1]), parent.model_fields if parent else ())
    if detail["type"] == "missing":
        return f"{key}: required, but not given"
    if detail["type"] == "value_error":  # a custom message, which states the value and the fix
        return f"{key}: {message}" if key else message
    if detail["type"] in ("model_type", "dict_type"):
        return f"{key}: {shown(value)} is not an object; write {{...}}"
    return f"{key}: {shown(value)} is not valid: {message[0].lower()}{message[1:]}"


def _section_at(section: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    """Return the section class that holds the key at ``path`` below ``section``."""
    for name in path:
        field = section.model_fields.get(str(name))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section
