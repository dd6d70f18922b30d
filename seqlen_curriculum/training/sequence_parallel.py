"""Ulysses sequence parallel: each rank of a sequence has a part of its tokens, and in attention a part of the heads.

Shapes: ``B`` rows, ``S`` seqlen, ``P`` ranks of a sequence, ``nh`` heads of size ``hs``. Keys and values may have fewer
heads than queries; ``P`` divides both numbers.
"""

from __future__ import annotations

from typing import Any

from deepspeed import comm as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn
from transformers import AttentionInterface

from seqlen_curriculum.models.attention import causal_attention
from seqlen_curriculum.models.causal_lm import AnyCausalLM
from seqlen_curriculum.models.gpt2 import CausalLM

__all__ = ["split_attention"]


def split_attention(model: CausalLM | AnyCausalLM, degree: int) -> Any:
    """Make ``model`` attend over ``degree`` neighbouring ranks, which share a sequence; return their process group.

    DeepSpeed's engine averages gradients over all ranks. That is correct, because the mean over equal parts is the mean over
    the row: 2 parts of 4 tokens with means 3 and 5 have the mean 4, as the 8 tokens have.
    """
    groups = [dist.new_group(range(first, first + degree)) for first in range(0, dist.get_world_size(), degree)]
    group = groups[dist.get_rank() // degree]
    attend = DistributedAttention(_whole_rows, group, scatter_idx=2, gather_idx=1)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend over all ranks; query, key and value are (B, nh, S / P, hs), the result is (B, S / P, nh, hs)."""
        # DistributedAttention exchanges parts of the sequence (axis 1) for heads (axis 2) before attention, and back after
        # it. With 8 heads and 64 tokens on 2 ranks, each has 8 heads of 32 tokens outside and 4 heads of 64 tokens inside.
        part = (tensor.transpose(1, 2) for tensor in (query, key, value))
        # Rows are axis 0. Rotary embeddings are applied before attention.
        return attend(*part, 0, None, module, dropout, scaling, sliding_window), None

    AttentionInterface.register("ulysses_causal", attention)
    model.lm.config._attn_implementation = "ulysses_causal"
    return group


def _whole_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    module: nn.Module,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Return causal attention of this rank's heads; all tensors are (B, S, nh / P, hs)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return causal_attention(module, q, k, v, None, dropout, scaling, sliding_window=sliding_window)[0]
