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

__all__ = ["embeddings_by_adam", "looked_up_weights", "run_uncompiled"]


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


@contextmanager
def embeddings_by_adam() -> Iterator[None]:
    """Correct the flags by which ``deepspeed.initialize`` divides parameters between Muon and Adam, inside the context."""
    set_flags = deepspeed.set_optimizer_flags

    def set_optimizer_flags(config_class: Any, model: nn.Module) -> None:
        set_flags(config_class, model)
        for weight in looked_up_weights(model):
            if getattr(weight, "use_muon", False):
                weight.use_muon = False  # type: ignore[attr-defined]

    deepspeed.set_optimizer_flags = set_optimizer_flags
    try:
        yield
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
