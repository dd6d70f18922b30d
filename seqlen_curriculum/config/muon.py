"""How DeepSpeed's Muon divides a model: matrices are trained by Muon, all other parameters by Adam. Needs no torch."""

from __future__ import annotations

import math
from typing import NamedTuple

from seqlen_curriculum.config.architectures import FAMILIES
from seqlen_curriculum.config.model import ModelConfig

__all__ = ["MuonGroups", "planned_groups", "trains_by_muon"]


class MuonGroups(NamedTuple):
    """Numbers of parameters by optimizer. ``left_out`` names the matrices that are left to Adam, embeddings and heads."""

    muon: int
    adam: int
    left_out: tuple[str, ...]

    def describe(self) -> str:
        """Return the groups in words."""
        return f"{self.muon:,} parameters by Muon, {self.adam:,} by Adam ({', '.join(self.left_out)}; vectors)"


def trains_by_muon(optimizer_type: str) -> bool:
    """Return whether ``optimizer.type`` is Muon, which DeepSpeed spells in any case."""
    return optimizer_type.lower() == "muon"


def planned_groups(model: ModelConfig) -> MuonGroups | None:
    """Return the groups of a model that isn't built. None if the shapes of its weights are unknown."""
    if model.is_gpt2:
        width, inner = model.hidden_size, model.inner_size
        # qkv 3w^2, projection w^2, MLP w*i and i*w: 12w^2 with i = 4w, 7.1M in each of GPT-2 117M's 12 blocks.
        muon = model.num_layers * (4 * width**2 + 2 * width * inner)
        return MuonGroups(muon, model.parameter_count() - muon, ("transformer.wte.weight", "transformer.wpe.weight"))
    if model.initial is None:
        counts = model.counts
        if counts is None or counts.matrices is None or model.architecture is None:
            return None
        defaults = FAMILIES[model.model_type].defaults
        tied = model.architecture.get("tie_word_embeddings", defaults.get("tie_word_embeddings"))
        embeddings = ("word embedding",) if tied else ("word embedding", "output head")
        return MuonGroups(counts.matrices, counts.parameters - counts.matrices, embeddings)
    matrices = {name: shape for name, shape in model.initial.weights.items() if len(shape) >= 2}
    left_out = tuple(name for name, shape in matrices.items() if _is_looked_up(name, shape[0], model.vocab_size))
    muon = sum(math.prod(shape) for name, shape in matrices.items() if name not in left_out)
    return MuonGroups(muon, model.parameter_count() - muon, left_out)


def _is_looked_up(name: str, rows: int, vocab_size: int) -> bool:
    """Return whether a matrix is an embedding or a head: by DeepSpeed's names, GPT-2's name of positions, or its rows."""
    return any(part in name.lower() for part in ("embed", "lm_head", "wpe.")) or rows == vocab_size
