"""Change the rotary positions in transformers' configuration of a model that is continued at longer sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seqlen_curriculum.config.rope import RopeConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.pretrained import quiet

__all__ = ["change_rope"]

_SCALES_FROM_ORIGINAL = ("yarn", "llama3", "longrope")
"""The types that need the number of positions before the scaling."""


def change_rope(lm_config: Any, rope: RopeConfig, positions: int) -> None:
    """Set base, scaling and ``positions`` in ``lm_config``, which may be read from files of transformers 4 or 5.

    Raises ConfigError if the architecture has no RoPE, or has one for each type of layer.
    """
    own = getattr(lm_config, "rope_parameters", None)
    if not own or any(isinstance(value, Mapping) for value in own.values()):
        problem = "has a RoPE for each type of its layers" if own else "has no RoPE"
        raise ConfigError(
            f"model.rope: the {lm_config.model_type} of model.hf_checkpoint {problem}, so it can't be changed; remove rope, "
            "or take another model"
        )
    trained = own.get("original_max_position_embeddings", lm_config.max_position_embeddings)
    changed = dict(own)
    if rope.scaling is not None:
        kept = {key: own[key] for key in ("rope_theta", "partial_rotary_factor") if key in own}
        changed = {**kept, **rope.scaling.parameters()}
    if rope.theta is not None:
        changed["rope_theta"] = rope.theta
    if changed["rope_type"] in _SCALES_FROM_ORIGINAL:
        changed.setdefault("original_max_position_embeddings", trained)
    _check_factors(lm_config, changed)
    lm_config.rope_parameters, lm_config.max_position_embeddings = changed, positions
    with quiet():
        lm_config.standardize_rope_params()
        lm_config.validate_rope()


def _check_factors(lm_config: Any, parameters: Mapping[str, Any]) -> None:
    """Raise ConfigError unless longrope has a factor for each pair of rotated dimensions."""
    head_size = getattr(lm_config, "head_dim", None) or lm_config.hidden_size // lm_config.num_attention_heads
    pairs = int(head_size * parameters.get("partial_rotary_factor", 1.0)) // 2
    for key in ("short_factor", "long_factor"):
        factors = parameters.get(key)
        if factors is not None and len(factors) != pairs:
            raise ConfigError(
                f"model.rope.scaling.{key}: has {len(factors)} factors, but each head of the model has {pairs} pairs of "
                f"rotated dimensions; give {pairs}"
            )
