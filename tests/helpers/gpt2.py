"""A tiny GPT-2, Hugging Face's GPT-2 with the same weights, and comparisons of the two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.models.gpt2 import CausalLM, build_gpt2

TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 200,
}


def tiny(seed: int = 0, **keys: Any) -> CausalLM:
    torch.manual_seed(seed)
    return build_gpt2(ModelConfig.model_validate(TINY | keys))


def batch(rows: int = 3, seqlen: int = 37) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 200, (rows, seqlen + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("lm."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def reference(model: CausalLM) -> Any:
    """Return Hugging Face's GPT-2 with the weights of ``model``: eager attention, gelu_new, untouched head."""
    c = model.lm.config
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.n_positions,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        )
    )
    hf.load_state_dict(model.lm.state_dict())
    return hf


class Squares(TorchDispatchMode):
    """Return the names of operators that created a tensor whose last two sizes are both ``seqlen``."""

    def __init__(self, seqlen: int) -> None:
        super().__init__()
        self.seqlen, self.found = seqlen, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if any(isinstance(x, Tensor) and x.shape[-2:] == (self.seqlen,) * 2 for x in tree_leaves(out)):
            self.found.append(str(func))
        return out


def seeded_gradients(model: CausalLM, seed: int) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(*batch()).backward()
    return {name: grad.clone() for name, grad in gradients(model).items()}
