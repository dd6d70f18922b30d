"""DeepSpeed's Muon: Adam for embeddings and the output head, whatever their names are, and no compilation on a CPU.

DeepSpeed leaves out parameters by name (``embed``, ``lm_head``). GPT-2's are ``wte`` and ``wpe``, so Muon would train the
tied embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from torch import nn

from seqlen_curriculum.config.muon import MuonGroups, trains_by_muon

__all__ = ["embeddings_by_adam", "groups_of", "looked_up_weights", "run_uncompiled"]


def looked_up_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of embeddings and of the output head, tied or not.

    The head is what Hugging Face's ``get_output_embeddings`` returns. In other models it is the last linear layer with as
    many outputs as the largest embedding has rows.
    """
    modules: list[Any] = list(model.modules())
    embeddings: list[Any] = [module for module in modules if isinstance(module, nn.Embedding)]
    heads = [module.get_output_embeddings() for module in modules if hasattr(module, "get_output_embeddings")]
    heads = [head for head in heads if head is not None]
    if not heads:
        vocab_size = max((module.num_embeddings for module in embeddings), default=0)
        linear = [module for module in modules if isinstance(module, nn.Linear)]
        heads = [module for module in linear if module.out_features == vocab_size][-1:]
    yield from (module.weight for module in (*embeddings, *heads))


def groups_of(model: nn.Module) -> MuonGroups:
    """Return how DeepSpeed's flags divide the parameters of ``model`` that are trained."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    # Under zero.Init a weight is a shard, and DeepSpeed keeps the shape of the whole.
    sizes = {name: getattr(weight, "ds_numel", weight.numel()) for name, weight in trained.items()}
    muon = sum(int(size) for name, size in sizes.items() if getattr(trained[name], "use_muon", False))
    left_out = [
        name.removeprefix("lm.")
        for name, weight in trained.items()
        if len(getattr(weight, "ds_shape", weight.shape)) >= 2 and not weight.use_muon  # type: ignore[attr-defined]
    ]
    return MuonGroups(muon, sum(sizes.values()) - muon, tuple(left_out))


@contextmanager
def embeddings_by_adam() -> Iterator[list[MuonGroups]]:
    """Correct the flags by which ``deepspeed.initialize`` divides parameters between Muon and Adam, inside the context.

    The yielded list gets the groups of a model that is divided.
    """
    set_flags, divided = deepspeed.set_optimizer_flags, list[MuonGroups]()

    def set_optimizer_flags(config_class: Any, model: nn.Module) -> None:
        set_flags(config_class, model)
        for weight in looked_up_weights(model):
            if getattr(weight, "use_muon", False):
                weight.use_muon = False  # type: ignore[attr-defined]
        if trains_by_muon(str(config_class.optimizer_name)):
            divided.append(groups_of(model))

    deepspeed.set_optimizer_flags = set_optimizer_flags
    try:
        yield divided
    finally:
        deepspeed.set_optimizer_flags = set_flags


def run_uncompiled() -> None:
    """Replace Muon's functions, which DeepSpeed compiles with torch, by the same functions uncompiled; for a CPU.

    torch needs a C++ compiler there, and minutes on each rank, since it compiles several kernels for each shape of matrix.
    A signal that ends a launch within that time also ended the compiler, so the ranks printed its error with a traceback.
    """
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    for module in (original_muon, muon_optimizer):
        for name, function in list(vars(module).items()):
            if hasattr(function, "_torchdynamo_orig_callable"):
                setattr(module, name, function._torchdynamo_orig_callable)
