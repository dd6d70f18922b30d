"""Any causal language model as pipeline stages, which share the modules and parameters of an ``AnyCausalLM``.

A stage is the architecture's own backbone with a part of its layers. Its forward therefore computes rotary positions once,
and gives each type of layer what it needs, as in the whole model.

Shapes: ``B`` rows, ``S`` seqlen, ``H`` hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.causal_lm import AnyCausalLM

__all__ = ["CausalLMStage", "Words", "stages_of", "without_words"]


class Words(nn.Module):
    """The word embedding of a model: the first layer of a pipeline and, by ``without_words``, the last one if it is tied."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (B, S, H) of ``tokens`` (B, S)."""
        words: Tensor = self.embedding(tokens)
        return words


def without_words(_words: Words, hidden: Tensor) -> Tensor:
    """Return ``hidden`` (B, S, H). The loss multiplies it by the tied weight, so the last stage never holds the logits."""
    return hidden


class CausalLMStage(nn.Module):
    """The layers of ``model`` whose numbers are in ``own``, without the word embedding and the head."""

    head: nn.ParameterList
    """The weights of the head that aren't the embedding's, in the last stage."""

    def __init__(self, model: AnyCausalLM, own: range) -> None:
        super().__init__()
        self.backbone = _backbone_with(model, own)
        self._positions = model.positions

    def forward(self, hidden: Tensor) -> Tensor:
        """Return hidden states (B, S, H) for those of the previous stage, or for word embeddings, (B, S, H)."""
        outputs = self.backbone(inputs_embeds=hidden, use_cache=False, **self._positions(hidden, 0))
        last: Tensor = outputs.last_hidden_state
        return last


def stages_of(model: AnyCausalLM, stages: int) -> list[CausalLMStage]:
    """Return the ``stages`` of ``model``, with equally many layers if they divide, else with one more in the first ones.

    Raises ConfigError for an architecture that can't be cut.
    """
    setting = f"pipeline.stages: {stages}"
    model.require("loss", setting)
    model.require("windows", setting)  # of positions that every stage computes
    # 5 layers in 2 stages: ceil(0 / 2), ceil(5 / 2), ceil(10 / 2) are the bounds 0, 3, 5.
    bounds = [-(-len(model.blocks) * stage // stages) for stage in range(stages + 1)]
    if model.abilities.routes:
        problem = "whose auxiliary loss needs the routers of all layers"
    elif not _plan(model):
        problem = "for which transformers has no plan (base_model_pp_plan)"
    else:
        parts = [CausalLMStage(model, range(*bounds[stage : stage + 2])) for stage in range(stages)]
        if _are_whole(model, parts):
            return parts
        problem = "because its stages together differ from the whole model"
    raise ConfigError(
        f"pipeline.stages: {stages} doesn't work with a {model.lm.config.model_type}, {problem}; set it to 1 (ZeRO divides "
        "the weights too)"
    )


def _plan(model: AnyCausalLM) -> list[str]:
    """Return the names of the backbone's modules in the order of its forward; nothing if transformers has no plan."""
    plan = getattr(model.lm.config, "base_model_pp_plan", None) or {}
    modules = [getattr(model.backbone, name, None) for name in plan]
    return list(plan) if model.blocks in modules and model.lm.get_input_embeddings() in modules else []


def _backbone_with(model: AnyCausalLM, own: range) -> Any:
    """Return the backbone with the layers ``own``, what is before the first layer, and what is after the last one."""
    backbone, names = copy.copy(model.backbone), _plan(model)
    backbone._modules = dict(backbone._modules)
    (layers,) = (number for number, name in enumerate(names) if getattr(backbone, name) is model.blocks)
    blocks = [block if number in own else _skipped(block) for number, block in enumerate(model.blocks)]
    setattr(backbone, names[layers], nn.ModuleList(blocks))
    words = [name for name in names if getattr(backbone, name) is model.lm.get_input_embeddings()]
    before = names[:layers] if own.start > 0 else words
    after = names[layers + 1 :] if own.stop < len(blocks) else []
    for name in before + after:
        setattr(backbone, name, nn.Identity())
    return backbone


def _skipped(block: nn.Module) -> nn.Module:
    """Return a layer without weights that has the attributes of ``block`` and returns the hidden states that it gets."""
    skipped = copy.copy(block)
    skipped._modules, skipped._parameters, skipped._buffers = {}, {}, {}
    skipped.gradient_checkpointing = False  # type: ignore[assignment]
    skipped.forward = lambda hidden_states, *_, **__: hidden_states
    return skipped


@torch.no_grad()
def _are_whole(model: AnyCausalLM, parts: Sequence[CausalLMStage]) -> bool:
    """Return whether all ``parts`` together have each weight once and compute what the whole model does."""
    words, was_training = model.lm.get_input_embeddings(), model.training
    weights = [id(weight) for part in (words, *parts) for weight in part.parameters()]
    if sorted(weights) != sorted(map(id, model.backbone.parameters())):
        return False
    model.eval()
    tokens = torch.arange(4).remainder(words.num_embeddings).unsqueeze(0)  # (1, S): 0 1 2 3
    hidden = words(tokens)  # (1, S, H)
    try:
        for part in parts:
            hidden = part.eval()(hidden)
    except Exception:  # layers that exchange more than hidden states raise almost anything
        return False
    whole = model.backbone(tokens, use_cache=False).last_hidden_state
    for module in (model, *parts):
        module.train(was_training)
    return hidden.shape == whole.shape and torch.allclose(
        hidden, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max())
    )
