"""Tensor parallel by DeepSpeed's AutoTP: the layers of each block are sharded over the ranks of a group.

As in Megatron, the first layer of attention and MLP is sharded by output, attention by heads, and the second one by input.
Embeddings, norms and the head are replicated. Ranks of a group draw the same dropout masks, so heads on different ranks
share attention dropout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.module_inject.layers import GatherFromTensorParallelRegion, ScatterToTensorParallelRegion
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.causal_lm import AnyCausalLM
from seqlen_curriculum.models.gpt2 import CausalLM

__all__ = ["check_sharded", "gather_parameter", "is_sharded", "partition_specs", "prepare"]

_GPT2_SPECS: list[dict[str, Any]] = [
    # Queries, keys and values are concatenated, so each is sharded separately. Otherwise a rank would have no values.
    {"patterns": [r".*\.c_attn\.weight$"], "partition_type": "column", "shape": [3, -1], "partition_dim": 0},
    {"patterns": [r".*\.c_fc\.weight$"], "partition_type": "column"},
    {"patterns": [r".*\.c_proj\.weight$"], "partition_type": "row"},
]
_STYLES: dict[str, dict[str, Any]] = {
    "colwise": {"partition_type": "column"},
    "rowwise": {"partition_type": "row"},
    # The norm of each head's queries or keys, as in Qwen3. A rank's gradient is that of its own heads, so they are summed.
    "replicated_with_grad_allreduce": {"partition_type": "skip", "grad_allreduce": True},
    # transformers gathers queries, keys and values on every rank, because OLMo2 normalizes those of all heads together. Here
    # only the norm gets all of them (``_normalize_all_heads``), and attention stays sharded.
    "colwise_gather_output": {"partition_type": "column"},
    "rowwise_split_input": {"partition_type": "row"},
}
"""AutoTP's settings for a layer, by its style in transformers' plan of the architecture."""
_OF_ALL_HEADS = ("colwise_gather_output", "rowwise_split_input")


def prepare(
    deepspeed_config: Mapping[str, Any], degree: int, model: CausalLM | AnyCausalLM
) -> tuple[dict[str, Any], Any]:
    """Change ``model`` so that AutoTP can shard it; return its configuration, and ``mpu`` for ``initialize``.

    With ``mpu``, DeepSpeed counts ranks that read the same rows once. Raises ConfigError for an architecture that can't be
    sharded.
    """
    specs = _GPT2_SPECS if isinstance(model, CausalLM) else partition_specs(model, degree)
    groups._init_tp_mesh_device(tensor_model_parallel_size=degree)
    if isinstance(model, CausalLM):
        _use_linear_layers(model, degree)
    else:
        for norm in _norms_of_all_heads(model.lm):
            _normalize_all_heads(norm, degree)
    partition = {"use_default_specs": False, "layer_specs": specs}
    section = {**deepspeed_config["tensor_parallel"], "partition_config": partition}
    return {**deepspeed_config, "tensor_parallel": section}, groups


def partition_specs(model: AnyCausalLM, degree: int) -> list[dict[str, Any]]:
    """Return AutoTP's ``layer_specs`` of ``model``, from transformers' own plan of its architecture.

    Raises ConfigError if there is no plan, or if it contains anything that this module can't shard.
    """
    plan: dict[str, str] = getattr(model.lm.config, "base_model_tp_plan", None) or {}
    problem = _problem(model.lm, plan) if plan else "for which transformers has no plan (base_model_tp_plan)"
    if problem:
        raise ConfigError(
            f"tensor_parallel.autotp_size: {degree} doesn't work with a {model.lm.config.model_type}, {problem}; set it to "
            "1 (ZeRO and pipelines divide the weights too)"
        )
    return [{"patterns": [_pattern(layer)], **_STYLES[style]} for layer, style in plan.items()]


def _pattern(layer: str) -> str:
    """Return the pattern of the weights of a ``layer`` of a plan, such as ``layers.*.mlp.up_proj``."""
    return r".*\." + re.escape(layer).replace(r"\*", r"\d+") + r"\.weight$"


def _problem(lm: nn.Module, plan: Mapping[str, str]) -> str:
    """Return why the layers in ``plan`` can't be sharded, "" if they can."""
    norms = set(_norms_of_all_heads(lm))
    for layer, style in plan.items():
        parents = [lm.get_submodule(name.rpartition(".")[0]) for name, _ in _named(lm, layer)]
        if style not in _STYLES or (style in _OF_ALL_HEADS and not norms & {m for p in parents for m in p.children()}):
            return f"whose {layer} is {style} in transformers' plan"
    names = {name for layer in plan for name, _ in _named(lm, layer)}
    for parent in {name.rpartition(".")[0] for name in names}:
        # A parameter between two sharded layers has a part of its gradient on each rank.
        for name, module in lm.get_submodule(parent).named_modules(prefix=parent):
            if name not in names and module not in norms and any(True for _ in module.parameters(recurse=False)):
                return f"whose {name} isn't in transformers' plan"
    return "" if names else "which has none of the layers in transformers' plan"


def _named(lm: nn.Module, layer: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a ``layer`` of a plan."""
    return ((name, module) for name, module in lm.named_modules() if re.fullmatch(_pattern(layer), f"{name}.weight"))


def _norms_of_all_heads(lm: nn.Module) -> Iterator[nn.Module]:
    """Yield the norms that normalize queries or keys of all heads together, such as OLMo2's."""
    for attention in lm.modules():
        for projection, norm in (("q_proj", "q_norm"), ("k_proj", "k_norm")):
            linear, module = getattr(attention, projection, None), getattr(attention, norm, None)
            if linear is not None and module is not None and module.weight.numel() == linear.out_features:
                yield module


def _normalize_all_heads(norm: Any, degree: int) -> None:
    """Make ``norm`` gather the features of all ranks of the group, normalize them, and return those of this rank.

    Its weight stays replicated, and its gradient is whole on every rank.
    """
    group = groups.get_tensor_model_parallel_group()
    own = groups.get_tensor_model_parallel_rank()
    sizes = (norm.weight.numel() // degree,) * degree

    def gather(_norm: nn.Module, inputs: tuple[Tensor]) -> Any:
        return GatherFromTensorParallelRegion.apply(group, inputs[0], sizes)  # (B, S, H / ranks) to (B, S, H)

    def scatter(_norm: nn.Module, _inputs: Any, output: Tensor) -> Any:
        return ScatterToTensorParallelRegion.apply(group, output, sizes, own)

    norm.register_forward_pre_hook(gather)
    norm.register_forward_hook(scatter)


def _use_linear_layers(model: CausalLM, degree: int) -> None:
    """Replace GPT-2's Conv1D layers, which AutoTP can't shard."""
    for block in model.lm.transformer.h:
        block.attn.split_size //= degree  # AutoTP divides the number of heads itself
        for layers in (block.attn, block.mlp):
            for name, layer in list(layers.named_children()):
                if isinstance(layer, Conv1D):
                    setattr(layers, name, _linear(layer))


def _linear(conv: Conv1D) -> nn.Linear:
    """Convert Conv1D, with weight (in, out), to the equal nn.Linear, with weight (out, in), which AutoTP can shard."""
    linear = nn.Linear(conv.nx, conv.nf, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous())
    linear.weight.is_transposed = True  # type: ignore[attr-defined]
    linear.bias = conv.bias
    return linear


def is_sharded(parameter: Tensor) -> bool:
    """Return whether AutoTP sharded ``parameter``."""
    # AutoTP marks only sharded parameters. check_sharded verifies that.
    return bool(getattr(parameter, "tensor_model_parallel", False))


def check_sharded(engine: Any) -> None:
    """Raise RuntimeError if AutoTP didn't mark all weights that ``prepare`` wanted to shard.

    Otherwise shards would be saved as whole weights.
    """
    specs = engine.tensor_parallel_config().partition_config["layer_specs"]
    patterns = [pattern for spec in specs if spec["partition_type"] != "skip" for pattern in spec["patterns"]]
    for name, parameter in engine.module.named_parameters():
        if any(re.fullmatch(pattern, name) for pattern in patterns) and not is_sharded(parameter):
            raise RuntimeError(
                f"{name}: this version of DeepSpeed doesn't mark weights that AutoTP shards as tensor_model_parallel; "
                "install one in the range of pyproject.toml"
            )


@torch.no_grad()
def gather_parameter(parameter: Any) -> Tensor:
    """Return the full ``parameter`` in the layout of the Hugging Face model; call it on all ranks in the same order."""
    if not is_sharded(parameter):
        whole: Tensor = parameter.detach()
        return whole
    # AutoTP replaces the data by the whole. DeepSpeed's GatherReplacedLayerParams then shards it again, into a copy. The
    # data was a view of ZeRO's buffer, which later steps update, so it is put back.
    shard = parameter.data
    try:
        parameter.gather_params([parameter])
        whole = parameter.data
    finally:
        parameter.data = shard
    return whole.t() if getattr(parameter, "is_transposed", False) else whole
