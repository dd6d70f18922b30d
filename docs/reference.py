"""Write the tables of keys in docs/configuration.md from the schema of a run's file, configs/run.schema.json.

Run:  python docs/reference.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqlen_curriculum.config import ModelConfig
from seqlen_curriculum.config.deepspeed_rules import RULES
from seqlen_curriculum.config.model import PRESETS

PAGE = Path(__file__).with_name("configuration.md")
SCHEMA = Path(__file__).parent.parent / "configs" / "run.schema.json"
SECTIONS = {
    "curriculum_learning": "CustomCurriculum",  # the keys of all schedule types; schedule_config has tables of its own
    "fixed_linear": "LinearSchedule",
    "fixed_root": "RootSchedule",
    "fixed_discrete": "DiscreteSchedule",
    "fixed_mixed": "MixedSchedule",
    "adaptive": "AdaptiveSchedule",
    "custom": "CustomSchedule",
    "TokenCosineLR": "TokenCosineParams",  # TokenLinearLR has the same keys
    "TokenWSDLR": "TokenWSDParams",
    "batch_size_warmup": "BatchSizeWarmup",
    "model": "ModelConfig",
    "model.rope": "RopeConfig",
    "model.rope.scaling": "RopeScaling",
    "data": "DataConfig",
    "training": "TrainingConfig",
}
"""The definition in the schema of each table on the page."""
ELSEWHERE = {"schedule_config", "schedule_type", "curriculum_type"}
"""Keys of ``curriculum_learning`` that the text of the page describes."""
_TABLE = re.compile(r"(<!-- table: (?P<name>[\w.]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_TYPES = {"number": "number", "string": "string", "boolean": "`true` or `false`", "object": "object"}

Schema = dict[str, Any]


def with_tables(page: str) -> str:
    """Return ``page`` with the lines after each ``<!-- table: NAME -->`` replaced by the table of that section."""
    definitions = json.loads(SCHEMA.read_text())["$defs"]

    def table(found: re.Match[str]) -> str:
        name = found["name"]
        lines = OTHERS[name]() if name in OTHERS else _keys(definitions[SECTIONS[name]])
        return "\n".join([found[1], *lines, "", found[3]])

    return _TABLE.sub(table, page)


def _keys(section: Schema) -> Iterator[str]:
    """Yield the lines of a section's table, the required keys first."""
    required = section.get("required", [])
    keys = [key for key in section["properties"] if key not in ELSEWHERE]
    yield "| key | meaning | values | default |"
    yield "| --- | --- | --- | --- |"
    for key in sorted(keys, key=lambda key: key not in required):
        value = section["properties"][key]
        default = f"`{json.dumps(value['default'])}`" if "default" in value else ""
        meaning = re.sub(r"\bNone\b", "`null`", value["description"]).replace("|", r"\|")
        yield f"| `{key}` | {meaning} | {_values(value)} | {'required' if key in required else default} |"


def _values(value: Schema) -> str:
    """Return the values that a key takes: ``integer``, ``"drop"`` or ``"recycle"``, ``list of string``."""
    if "$ref" in value:
        return "object"
    if "anyOf" in value:
        return " or ".join(_values(choice) for choice in value["anyOf"] if choice.get("type") != "null")
    if "enum" in value:
        choices = [f"`{json.dumps(choice)}`" for choice in value["enum"] if choice is not None]
        return " or ".join(choices) if len(choices) < 5 else "a name in the table below"
    kinds = [value["type"]] if isinstance(value["type"], str) else value["type"]
    (kind,) = (kind for kind in kinds if kind != "null")
    if "prefixItems" in value:
        return "[" + ", ".join(_values(item) for item in value["prefixItems"]) + "]"
    if kind == "array":
        return f"list of {_values(value['items'])}"
    return "integer" if value.get("multipleOf") == 1 else _TYPES[kind]


def _presets() -> Iterator[str]:
    yield "| preset | architecture | layers | hidden size | heads | positions | vocabulary | parameters |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, sizes in PRESETS.items():
        model = ModelConfig.model_validate({"preset": name})
        numbers = (f"{number:,}" for number in (*sizes.values(), model.parameter_count()))
        yield " | ".join([f"| `{name}`", model.model_type, *numbers]) + " |"


def _deepspeed() -> Iterator[str]:
    """Yield the lines of the table of DeepSpeed's keys that a run does not follow."""
    yield "| key | if it is on | reason |"
    yield "| --- | --- | --- |"
    for path, rule in sorted(RULES.items()):
        outcome = "warning" if rule.has_no_effect else "refused in every file" if rule.everywhere else "refused"
        yield f"| `{path}` | {outcome} | {rule.why} |"


OTHERS = {"presets": _presets, "deepspeed": _deepspeed}
"""The tables that don't come from the schema."""


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
