"""GPT-2 under DeepSpeed's AutoTP: the layers of each block are sharded over the ranks of a group, by heads in attention.

As in Megatron, the first layer of attention and MLP is sharded by output, the second by input. Embeddings, norms and the
head are replicated. Ranks of a group draw the same dropout masks, so heads on different ranks share attention dropout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from seqlen_curriculum.models.gpt2 import CausalLM

__all__ = ["check_sharded", "gather_parameter", "is_sharded", "prepare"]

_PARTITION: dict[str, Any] = {
    "use_default_specs": False,
    "layer_specs": [
        # Queries, keys and values are concatenated, so each is sharded separately. Otherwise a rank would have no values.
        {"patterns": [r".*\.c_attn\.weight$"], "partition_type": "column", "shape": [3, -1], "partition_dim": 0},
        {"patterns": [r".*\.c_fc\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.c_proj\.weight$"], "partition_type": "row"},
    ],
}


def prepare(deepspeed_config: Mapping[str, Any], degree: int, model: CausalLM) -> tuple[dict[str, Any], Any]:
    """Change ``model`` so that AutoTP can shard it; return its configuration, and ``mpu`` for ``initialize``.

    With ``mpu``, DeepSpeed counts ranks that read the same rows once.
    """
    groups._init_tp_mesh_device(tensor_model_parallel_size=degree)
    for block in model.lm.transformer.h:
        block.attn.split_size //= degree  # AutoTP divides the number of heads itself
        for layers in (block.attn, block.mlp):
            for name, layer in list(layers.named_children()):
                if isinstance(layer, Conv1D):
                    setattr(layers, name, _linear(layer))
    section = {**deepspeed_config["tensor_parallel"], "partition_config": _PARTITION}
    return {**deepspeed_config, "tensor_parallel": section}, groups


def _linear(conv: Conv1D) -> nn.Linear:
    """Convert Conv1D, with weight (in, out), to the equal nn.Linear, with weight (out, in), which AutoTP can shard."""
    linear = nn.Linear(conv.nx, conv.nf, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous())
    linear.bias = conv.bias
    return linear


def is_sharded(parameter: Tensor) -> bool:
    """Return whether AutoTP sharded ``parameter``."""
    # AutoTP marks only sharded parameters. check_sharded verifies that.
    return bool(getattr(parameter, "tensor_model_parallel", False))


def check_sharded(model: nn.Module) -> None:
    """Raise RuntimeError if AutoTP did not mark the weights of ``_PARTITION``; shards would be saved as whole weights."""
    patterns = [pattern for spec in _PARTITION["layer_specs"] for pattern in spec["patterns"]]
    for name, parameter in model.named_parameters():
        if any(re.fullmatch(pattern, name) for pattern in patterns) and not is_sharded(parameter):
            raise RuntimeError(
                f"{name}: this version of DeepSpeed doesn't mark weights that AutoTP shards as tensor_model_parallel; "
                "install one in the range of pyproject.toml"
            )


@torch.no_grad()
def gather_parameter(name: str, parameter: Tensor) -> Tensor:
    """Return the full parameter ``name`` in the layout of the Hugging Face model; call it on all ranks in the same order.

    DeepSpeed's GatherReplacedLayerParams replaces the parameter, a view of ZeRO's buffer, by a copy, which later steps
    don't update.
    """
    if not is_sharded(parameter):
        return parameter.detach()
    group = groups.get_tensor_model_parallel_group()
    shards = [torch.empty_like(parameter) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, parameter.detach().contiguous(), group=group)
    # Linear weights are (out, in). c_attn is sharded by output, Q, K and V separately: with 2 ranks the shards are
    # [Q0 K0 V0] and [Q1 K1 V1], joined as [Q0 Q1 K0 K1 V0 V1]. c_proj is sharded by input, the others by output.
    axis, matrices = (1 if "c_proj" in name else 0), (3 if "c_attn" in name else 1)
    chunks = [shard.chunk(matrices, axis) for shard in shards]
    return torch.cat([chunk[matrix] for matrix in range(matrices) for chunk in chunks], axis).t()
