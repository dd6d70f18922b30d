"""The ``model.rope`` section: another base or scaling of rotary positions, to continue a model at longer sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from seqlen_curriculum.fields import Section, Seqlen

__all__ = ["RopeConfig", "RopeScaling", "older_rope_keys", "with_more_positions"]

_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "longrope": ({"short_factor", "long_factor"}, {"original_max_position_embeddings", "attention_factor", "factor"}),
}
"""The keys that each ``rope_type`` needs, and those that it may have."""

Positive = Annotated[float, Field(gt=0, le=1e12)]


class RopeScaling(Section):
    """``model.rope.scaling``: transformers' ``rope_scaling``, or its ``rope_parameters`` without ``rope_theta``."""

    rope_type: Literal["default", "linear", "yarn", "llama3", "longrope"]
    """The method; ``default`` removes a scaling that the model has. transformers' older key ``type`` is read too."""
    factor: Annotated[float, Field(ge=1, le=1e6)] | None = None
    """How many times longer the sequences become (linear, yarn, llama3)."""
    original_max_position_embeddings: Seqlen | None = None
    """Positions before the scaling (yarn, llama3, longrope); default: the model's own."""
    attention_factor: Positive | None = None
    """Factor of the attention's logits (yarn, longrope); default: transformers' own formula."""
    beta_fast: Positive | None = None
    """Rotations above which a dimension isn't scaled (yarn)."""
    beta_slow: Positive | None = None
    """Rotations below which a dimension is scaled entirely (yarn)."""
    mscale: Positive | None = None
    """Numerator of the attention factor (yarn)."""
    mscale_all_dim: Positive | None = None
    """Denominator of the attention factor (yarn)."""
    truncate: bool | None = None
    """Round the bounds of the scaled dimensions to whole numbers (yarn)."""
    low_freq_factor: Positive | None = None
    """Original positions / this are the wavelength above which a dimension is scaled entirely (llama3)."""
    high_freq_factor: Positive | None = None
    """Original positions / this are the wavelength below which a dimension isn't scaled (llama3)."""
    short_factor: list[Positive] | None = None
    """Factor of each pair of dimensions up to the original positions (longrope)."""
    long_factor: list[Positive] | None = None
    """Factor of each pair of dimensions beyond the original positions (longrope)."""

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "type" in data and "rope_type" not in data:
            return {("rope_type" if key == "type" else key): value for key, value in data.items()}
        return data

    @model_validator(mode="after")
    def _keys_of_its_type(self) -> RopeScaling:
        needed, optional = _KEYS[self.rope_type]
        given = self.parameters().keys() - {"rope_type"}
        if missing := sorted(needed - given):
            raise ValueError(f"{missing[0]} is required by rope_type {self.rope_type}, but not given")
        if unused := sorted(given - needed - optional):
            raise ValueError(f"{unused[0]} isn't used by rope_type {self.rope_type}; remove it")
        return self

    def parameters(self) -> dict[str, Any]:
        """Return the keys that are given, as transformers names them."""
        return self.model_dump(exclude_none=True)


class RopeConfig(Section):
    """The ``model.rope`` section. A missing key keeps the value in the ``config.json`` of ``hf_checkpoint``."""

    theta: Annotated[float, Field(ge=1, le=1e12)] | None = None
    """Base of the rotary positions (``rope_theta``). A higher one rotates slower: 5e5 in Llama 3 for 8,192 tokens."""
    scaling: RopeScaling | None = None
    """Scaling of the frequencies, with transformers' keys."""

    @model_validator(mode="before")
    @classmethod
    def _theta_of_parameters(cls, data: Any) -> Any:
        """Read transformers' ``rope_parameters``, which has the base among its keys."""
        scaling = data.get("scaling") if isinstance(data, Mapping) else None
        if not isinstance(scaling, Mapping) or "rope_theta" not in scaling:
            return data
        theta = scaling["rope_theta"]
        if data.get("theta", theta) != theta:
            raise ValueError(f"theta {data['theta']} and scaling.rope_theta {theta} differ; keep one")
        return {"theta": theta, "scaling": {key: value for key, value in scaling.items() if key != "rope_theta"}}

    @model_validator(mode="after")
    def _changes_something(self) -> RopeConfig:
        if self.theta is None and self.scaling is None:
            raise ValueError("has neither theta nor scaling; give one, or remove the section")
        return self


def with_more_positions(section: Mapping[str, Any], sizes: dict[str, int]) -> dict[str, int]:
    """Return the ``sizes`` of a folder with the higher number of positions that a ``model`` section with ``rope`` gives."""
    given, own = section.get("max_position_embeddings"), sizes.get("max_position_embeddings", 0)
    if section.get("rope") is None or not isinstance(given, int | float) or given <= own:
        return sizes
    return {**sizes, "max_position_embeddings": int(given)}


def older_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a ``config.json`` by which transformers 4 reads the RoPE that ``rope_parameters`` describes.

    transformers 4 doesn't know ``rope_parameters`` and would use its default base. transformers 5 reads both.
    """
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping) or "rope_theta" not in parameters:  # one RoPE for each type of layer
        return {}
    base, share = "rope_theta", "partial_rotary_factor"
    names = {base: "rotary_emb_base", share: "rotary_pct"} if config.get("model_type") == "gpt_neox" else {}
    keys = {names.get(key, key): parameters[key] for key in (base, share) if key in parameters}
    if parameters.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {key: value for key, value in parameters.items() if key not in (base, share)}
    return keys
