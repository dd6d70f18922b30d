"""Check at the start of a run what its model's architecture can do, as found when the model was built."""

from __future__ import annotations

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.causal_lm import AnyCausalLM
from seqlen_curriculum.models.gpt2 import CausalLM
from seqlen_curriculum.models.masked_lm import MaskedLM
from seqlen_curriculum.models.probe import Ability
from seqlen_curriculum.schedule.shortening import Method
from seqlen_curriculum.training.telemetry import log_rank0

__all__ = ["check_abilities"]

WITHOUT: dict[Ability, str] = {
    "loss": "the logits of a whole micro-batch are kept in memory",
    "attention": "attention is transformers' own",
    "windows": 'method "window" and data.attention "document" aren\'t available',
}
"""Consequences for a run, by missing ability."""


def check_abilities(
    model: CausalLM | AnyCausalLM | MaskedLM, method: Method, compiled: bool | None, stops_at_documents: bool = False
) -> None:
    """Log what the architecture lacks. Raise ConfigError if the run needs it; ``compiled`` is ``training.compile``."""
    if isinstance(model, CausalLM):
        return
    if isinstance(model, MaskedLM):
        _check_encoder(model, method)
        return
    for ability, reason in model.abilities.refused.items():
        log_rank0(f"{type(model.lm).__name__}: {WITHOUT[ability]}, because {reason}")
    if method == "window":
        model.require("windows", 'curriculum_learning.method: "window"')
    if stops_at_documents:
        model.require("windows", 'data.attention: "document"')
    if compiled:
        model.require("attention", "training.compile: true")
        if model.abilities.routes:
            raise ConfigError(
                f"training.compile: true doesn't work with a {model.lm.config.model_type} whose config.json has "
                "output_router_logits: the routers' outputs are recorded inside each block, which breaks it into several "
                "graphs; set compile to false"
            )


def _check_encoder(model: MaskedLM, method: Method) -> None:
    if not model.sparse:
        reason = "the loss of masked positions alone differs from transformers' own"
        log_rank0(f"{type(model.lm).__name__}: {WITHOUT['loss']}, because {reason}")
    if method == "window":
        raise ConfigError(
            f'method "window" doesn\'t work with the encoder {type(model.lm).__name__}; use another method'
        )
