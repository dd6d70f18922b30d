"""Write the tables of docs/configuration.md from the classes that check a run's file: their types, defaults and docstrings.

Run:  python docs/reference.py
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from seqlen_curriculum.config import DataConfig, ModelConfig, TrainingConfig
from seqlen_curriculum.config.model import PRESETS
from seqlen_curriculum.fields import Section
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeWarmup
from seqlen_curriculum.schedule.curriculum_config import CustomCurriculum
from seqlen_curriculum.schedule.schedule_config import (
    AdaptiveSchedule,
    CustomSchedule,
    DiscreteSchedule,
    LinearSchedule,
    MixedSchedule,
    RootSchedule,
)
from seqlen_curriculum.schedule.token_lr import TokenCosineParams

PAGE = Path(__file__).with_name("configuration.md")
SECTIONS: dict[str, type[Section]] = {
    "curriculum_learning": CustomCurriculum,  # the keys of all schedule types; schedule_config has tables of its own
    "fixed_linear": LinearSchedule,
    "fixed_root": RootSchedule,
    "fixed_discrete": DiscreteSchedule,
    "fixed_mixed": MixedSchedule,
    "adaptive": AdaptiveSchedule,
    "custom": CustomSchedule,
    "scheduler.params": TokenCosineParams,
    "batch_size_warmup": BatchSizeWarmup,
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
}
_TABLE = re.compile(r"(<!-- table: (?P<name>[\w.]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_TYPES = {"integer": "integer", "number": "number", "string": "string", "boolean": "`true` or `false`"}
_ABOVE_THE_TABLES = {"enabled", "schedule_config", "schedule_type", "curriculum_type"}
"""Keys of ``curriculum_learning`` that the page describes in its text."""


def with_tables(page: str) -> str:
    """Return ``page`` with the lines after each ``<!-- table: NAME -->`` replaced by the table of that section."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{_table(found['name'])}\n\n{found[3]}", page)


def _table(name: str) -> str:
    return "\n".join(_presets() if name == "presets" else _keys(SECTIONS[name]))


def _keys(section: type[Section]) -> Iterable[str]:
    """Yield the lines of a section's table, the keys that have to be given first."""
    schema, meanings = section.model_json_schema(), _docstrings(section)
    keys = [key for key in schema["properties"] if key not in _ABOVE_THE_TABLES]
    required = set(schema.get("required", [])) - _filled_in(section)
    yield "| key | values | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key in sorted(keys, key=lambda key: key not in required):
        value = schema["properties"][key]
        default = "required" if key in required else _default(value)
        yield f"| `{key}` | {_values(value)} | {default} | {_plain(value.get('description') or meanings[key])} |"


def _filled_in(section: type[Section]) -> set[str]:
    """Return the keys that another key of the section sets: the sizes of a model, by ``preset`` or ``hf_checkpoint``."""
    return set(next(iter(PRESETS.values()))) if section is ModelConfig else set()


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    return "" if default is None else f"`{json.dumps(default)}`"


def _values(value: dict[str, Any]) -> str:
    """Return the values a key takes, in words: ``integer``, ``"drop"`` or ``"recycle"``, ``list of string``."""
    if "anyOf" in value:
        return " or ".join(_values(choice) for choice in value["anyOf"] if choice.get("type") != "null")
    if "enum" in value:
        return " or ".join(f"`{json.dumps(choice)}`" for choice in value["enum"])
    if value["type"] == "array" and "prefixItems" in value:
        return "[" + ", ".join(_values(item) for item in value["prefixItems"]) + "]"
    if value["type"] == "array":
        return f"list of {_values(value['items'])}"
    return _TYPES[value["type"]]


def _plain(docstring: str) -> str:
    """Return a docstring as the cell of a Markdown table."""
    line = " ".join(docstring.split()).replace("``", "`").replace("|", r"\|")
    return re.sub(r"\bNone\b", "`null`", line)


def _docstrings(section: type[Section]) -> dict[str, str]:
    """Return the docstring below each field of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if not issubclass(base, Section) or base is Section:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = ast.literal_eval(text.value)
    return found


def _presets() -> Iterable[str]:
    yield "| preset | layers | hidden size | heads | positions | vocabulary | parameters |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, sizes in PRESETS.items():
        count = ModelConfig.model_validate({"preset": name}).parameter_count()
        yield " | ".join([f"| `{name}`", *(f"{size:,}" for size in sizes.values()), f"{count:,} |"])


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
