"""GPT-2 under DeepSpeed's AutoTP: each block's layers cut over the ranks of a group, heads and all.

As in Megatron, a block's two inner layers are cut by output and its two projections back by input; embeddings, norms and
the head stay whole. Ranks of a group draw the same dropout masks, in attention too: heads of different ranks share theirs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.models.gpt2 import CausalLM

__all__ = ["is_sharded", "prepare", "whole"]

_PARTITION = {
    "use_default_specs": False,
    "layer_specs": [
        # Queries, keys and values lie one after the other: each is cut by itself, or a rank would get no values.
        {"patterns": [r".*\.c_attn\.weight$"], "partition_type": "column", "shape": [3, -1], "partition_dim": 0},
        {"patterns": [r".*\.c_fc\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.c_proj\.weight$"], "partition_type": "row"},
    ],
}


def prepare(config: RunConfig, model: CausalLM) -> tuple[RunConfig, Any]:
    """Make ``model`` one that AutoTP can cut; the configuration that says how, and ``mpu``, both for ``initialize``.

    With ``mpu`` DeepSpeed counts the ranks that read the same rows once.
    """
    degree = config.keys.tensor_parallel_size
    groups._init_tp_mesh_device(tensor_model_parallel_size=degree)
    for block in model.lm.transformer.h:
        block.attn.split_size //= degree  # AutoTP itself divides the number of heads
        for layers in (block.attn, block.mlp):
            for name, layer in list(layers.named_children()):
                if isinstance(layer, Conv1D):
                    setattr(layers, name, _linear(layer))
    section = {**config.deepspeed["tensor_parallel"], "partition_config": _PARTITION}
    return replace(config, deepspeed={**config.deepspeed, "tensor_parallel": section}), groups


def _linear(conv: Conv1D) -> nn.Linear:
    """The same function: AutoTP cuts nn.Linear, whose weight is (out, in) where Conv1D's is (in, out)."""
    linear = nn.Linear(conv.nx, conv.nf, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous())
    linear.bias = conv.bias
    return linear


def is_sharded(parameter: Tensor) -> bool:
    """Whether AutoTP left each rank a part of it."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


@torch.no_grad()
def whole(name: str, parameter: Tensor) -> Tensor:
    """The parameter ``name`` as the Hugging Face model has it; all ranks call it, in the same order.

    DeepSpeed's own GatherReplacedLayerParams would leave a copy where the parameter was a view of ZeRO's buffer, and no
    later step would reach it.
    """
    if not is_sharded(parameter):
        return parameter.detach()
    group = groups.get_tensor_model_parallel_group()
    shards = [torch.empty_like(parameter) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, parameter.detach().contiguous(), group=group)
    axis, matrices = (1 if "c_proj" in name else 0), (3 if "c_attn" in name else 1)
    chunks = [shard.chunk(matrices, axis) for shard in shards]
    return torch.cat([chunk[matrix] for matrix in range(matrices) for chunk in chunks], axis).t()
