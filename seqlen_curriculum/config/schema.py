"""Generate the JSON schema (draft 2020-12) of a run's file from the sections and their docstrings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from seqlen_curriculum.config.data import DataConfig
from seqlen_curriculum.config.deepspeed import DeepSpeedKeys, OtherScheduler
from seqlen_curriculum.config.model import PRESETS, ModelConfig
from seqlen_curriculum.config.run_file import SCHEMA_KEY
from seqlen_curriculum.config.training import TrainingConfig
from seqlen_curriculum.run_folder.model_folder import SIZES
from seqlen_curriculum.schedule.batch_size_warmup import BatchSizeWarmup
from seqlen_curriculum.schedule.curriculum_config import CurriculumConfig
from seqlen_curriculum.schedule.token_lr import SCHEDULES, TokenLRConfig

__all__ = ["run_schema"]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SHORTEST_GUARDED = 6
"""Shorter names, such as ``fp16``, resemble too many others to detect a misspelling."""


_LIMITS = {"ge": "minimum", "le": "maximum"}
"""JSON schema's names of limits for which pydantic writes its own names after a custom validator."""


class _RunFile(DeepSpeedKeys):
    """A run's file: a DeepSpeed configuration plus the sections of seqlen-curriculum. Other keys are passed to DeepSpeed."""

    curriculum_learning: Annotated[CurriculumConfig, Field(discriminator="schedule_type")] | None = None
    """The schedule of the sequence length. Without it, or with ``enabled`` false, all steps have full length."""
    scheduler: TokenLRConfig | OtherScheduler | None = None  # type: ignore[assignment]
    """The learning rate schedule: token-wise, or one of DeepSpeed's own."""
    model: ModelConfig | None = None
    """The model: a preset, five sizes, a configuration of any architecture, or a pretrained model."""
    data: DataConfig | None = None
    """The corpora and the full length of a sample."""
    training: TrainingConfig | None = None
    """The token budget, evaluation, checkpoints and measurements."""
    batch_size_warmup: BatchSizeWarmup | None = None
    """GPT-3's batch size warmup, the baseline of the paper."""


class _Generator(GenerateJsonSchema):
    def int_schema(self, schema: core_schema.IntSchema) -> JsonSchemaValue:
        # The standard accepts 1.5e9 as an "integer", but VS Code rejects a number with a decimal point.
        return {**super().int_schema(schema), "type": "number", "multipleOf": 1}

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        """Write ``{"type": ["number", "null"], ...}`` where possible, which is easier to read than ``anyOf``."""
        inner = self.generate_inner(schema["schema"])
        if isinstance(inner.get("type"), str) and "enum" not in inner:
            return {**inner, "type": [inner["type"], "null"]}
        return self.get_union_of_schemas([inner, {"type": "null"}])


def run_schema() -> dict[str, Any]:
    """Return the schema of a run's file. It checks each key's name, type and range, but not relations between keys."""
    schema = _readable(_RunFile.model_json_schema(schema_generator=_Generator))
    properties, definitions = schema["properties"], schema["$defs"]
    _require_enabled(properties, definitions)
    _require_a_model(definitions["ModelConfig"])
    # A misspelt "TokenCosineLR" is an error, not one of DeepSpeed's schedulers.
    slips = "|".join(map(_misspelt, SCHEDULES))
    definitions["OtherScheduler"]["properties"]["type"]["not"] = {"pattern": f"^[Tt][Oo][Kk][Ee][Nn]|{slips}"}
    for section in (schema, *definitions.values()):
        if section.get("additionalProperties") is True:
            section["patternProperties"] = {_misspelt(name): False for name in _guarded(section["properties"])}
    schema["properties"] = {
        SCHEMA_KEY: {
            "type": "string",
            "description": "The path or URL of this schema, for editors. It is not a setting.",
        },
        **properties,
    }
    return {"$schema": _DIALECT, "title": "A run of seqlen-curriculum", **schema}


def _readable(value: Any) -> Any:
    """Return the schema without pydantic's titles and OpenAPI's discriminators, with docstrings as plain text."""
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if key in ("title", "discriminator") or (key == "default" and item is None):
            continue
        is_text = key == "description" and isinstance(item, str)
        kept[_LIMITS.get(key, key)] = " ".join(item.replace("``", "`").split()) if is_text else _readable(item)
    return kept


def _require_enabled(properties: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Require ``enabled`` in the block. Accept any keys in a disabled block, as the checks of the file do."""
    block = properties["curriculum_learning"]
    (kinds,) = (option["oneOf"] for option in block.pop("anyOf") if "oneOf" in option)
    for kind in kinds:
        section = definitions[kind["$ref"].rpartition("/")[2]]
        section["required"] = ["enabled", *section["required"]]
    off = {
        "type": "object",
        "description": "No curriculum: all steps have full length.",
        "properties": {"enabled": {"const": False}},
        "required": ["enabled"],
    }
    block["anyOf"] = [*kinds, off, {"type": "null"}]


def _require_a_model(section: dict[str, Any]) -> None:
    """Require a preset, a folder (which a flag may give if RoPE is changed), a configuration, or all five sizes."""
    section["properties"]["preset"]["enum"] = [*PRESETS, None]
    section["required"] = []
    ways = [["preset"], ["hf_checkpoint"], ["hf_config"], ["rope"], [*SIZES]]
    section["anyOf"] = [{"required": keys} for keys in ways]


def _guarded(names: Iterable[str]) -> list[str]:
    return [name for name in names if len(name) >= _SHORTEST_GUARDED]


def _misspelt(name: str) -> str:
    """Return a pattern that matches misspellings of ``name``: a letter missing, added or wrong, or two swapped."""
    # For "model": ^(?!model$)(?:.{0,3}del|m.{0,3}el|mo.{0,3}l|mod.{0,3})$
    slips = "|".join(f"{name[:at]}.{{0,3}}{name[at + 2 :]}" for at in range(len(name) - 1))
    return f"^(?!{name}$)(?:{slips})$"
