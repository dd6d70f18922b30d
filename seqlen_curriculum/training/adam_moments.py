"""Norms of Adam's state over the whole model, under any sharding: the measures in the paper's Figures 1, 4 and 6.

Shapes: ``n`` elements of a tensor or a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_local_optimizer_state
from torch import Tensor

from seqlen_curriculum.training.executor import Executor
from seqlen_curriculum.training.progress import log_rank0

__all__ = ["MomentsMeter", "adam_moments"]

_VARIANCE, _MOMENTUM = "exp_avg_sq", "exp_avg"
_CHUNK, _CPU_CHUNK = 1 << 24, 1 << 17
"""Elements reduced together. On a CPU larger chunks allocate new pages each time, which is three times as slow."""
_NAMES = ("variance_norm", "variance_max", "momentum_norm", "momentum_max")


@torch.no_grad()
def adam_moments(executor: Executor) -> dict[str, float]:
    """Return the l1 norm and the largest element of Adam's sqrt(v), ``variance_norm`` and ``variance_max``, and of momentum.

    Each element of the model counts once, whether it is sharded, split or replicated. Call it on all ranks after a step. It
    costs one pass over the state of this rank and one gather of four numbers. Values that are not finite are omitted. The
    result is empty without such a state or with an incorrect one: other optimizers, offload to NVMe, fp16 at ZeRO stage 0,
    no step taken yet.
    """
    parts = []
    for variance, momentum in _chunks(_own_state(executor)):
        root, size = variance.sqrt(), momentum.abs()
        parts.append(torch.stack([root.sum(), root.max(), size.sum(), size.max()]).double())
    device = executor.engine.device
    own = _total(torch.stack(parts)) if parts else torch.zeros(4, dtype=torch.float64)
    gathered = [torch.empty(4, dtype=torch.float64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own.to(device))
    values = _total(torch.stack(gathered)).tolist()
    if not any(values):
        return {}
    return {name: value for name, value in zip(_NAMES, values, strict=True) if math.isfinite(value)}


class MomentsMeter:
    """``adam_moments`` of an executor, with one line in the log about moments that can't be measured."""

    def __init__(self, executor: Executor) -> None:
        self._executor, self._has_reported = executor, False

    def measure(self) -> dict[str, float]:
        """Return the moments after a step, as ``adam_moments`` does. Call it on all ranks."""
        measured, engine = adam_moments(self._executor), self._executor.engine
        if not self._has_reported and engine.global_steps > engine.skipped_steps:
            self._has_reported = True
            if line := _unmeasured(engine, measured):
                log_rank0(f"optimizer.type {engine.optimizer_name()}: {line}")
        return measured


def _unmeasured(engine: Any, measured: Mapping[str, float]) -> str | None:
    """Return in words which moments weren't measured after a step, None if all were."""
    if measured and any(getattr(parameter, "use_muon", False) for parameter in engine.module.parameters()):
        return "variance_norm and momentum_norm are those of the parameters that Adam trains; Muon keeps no variance"
    if measured:
        return None
    if any(_VARIANCE in state for state in engine.basic_optimizer.state.values()):
        return (
            "the variance can't be measured here (fp16 at ZeRO stage 0, a state on NVMe, or values that aren't finite)"
        )
    return "keeps no variance of the gradients, so the run log has no variance_norm and momentum_norm"


def _chunks(states: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Join and split the (variance, momentum) pairs to 1-D chunks of at most ``_CHUNK`` elements."""
    # A 24-layer GPT-2 has 292 parameters, most of them biases and norms of 1,024 elements. Four reductions for each would
    # be 1,168 kernels with almost no work.
    chunk: list[tuple[Tensor, Tensor]] = []
    size = 0
    for variance, momentum in states:
        most = _CPU_CHUNK if variance.device.type == "cpu" else _CHUNK
        for piece in zip(torch.split(variance.reshape(-1), most), torch.split(momentum.reshape(-1), most), strict=True):
            if chunk and size + piece[0].numel() > most:
                yield _joined(chunk)
                chunk, size = [], 0
            chunk.append(piece)
            size += piece[0].numel()
    if chunk:
        yield _joined(chunk)


def _joined(chunk: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(chunk) == 1:
        return chunk[0]  # no copy: most elements are in large tensors
    variances, momenta = zip(*chunk, strict=True)
    return torch.cat(variances), torch.cat(momenta)


def _total(parts: Tensor) -> Tensor:
    """Combine norms and maxima of parts (parts, 4) to those of the whole, (4,)."""
    norms, maxima = parts.sum(0), parts.amax(0)
    return torch.stack([norms[0], maxima[1], norms[2], maxima[3]])


def _own_state(executor: Executor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (variance, momentum) of the elements that this rank counts, possibly with padding, which is zero."""
    engine = executor.engine
    # The state of DeepSpeed's fp16 optimizer of stage 0 is about 2e4 times too small.
    if not engine.zero_optimization() and (executor.replica > 0 or engine.fp16_enabled()):
        return
    state_of = engine.basic_optimizer.state
    if not any(_VARIANCE in state for state in state_of.values()):  # not Adam's
        return
    parameters = list(engine.module.parameters())
    counted = executor.unique_parameters(parameters)
    # A flat tensor with only counted parameters is used whole, else the parts of the counted parameters.
    states = state_of.values()
    if len(counted) < len(parameters):
        states = [_state_of(parameter, engine) for parameter in counted]
    for state in states:
        if _VARIANCE in state and state[_VARIANCE].numel():
            yield state[_VARIANCE], state[_MOMENTUM]


def _state_of(parameter: Tensor, engine: Any) -> dict[str, Tensor]:
    """Return the state of this rank's elements of one parameter, empty if the rank has none."""
    base = engine.basic_optimizer
    if getattr(parameter, "use_muon", False):
        return {}
    if engine.zero_optimization_stage() == 3:
        return {key: safe_get_local_optimizer_state(parameter, key) for key in (_VARIANCE, _MOMENTUM)}
    if not isinstance(engine.optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):  # ZeRO stage 0
        state: dict[str, Tensor] = base.state.get(parameter, {})
        return state
    mapping = parameter._hp_mapping  # type: ignore[attr-defined] # its address in the flat tensor of its group
    if mapping is None:
        return {}
    (flat,) = base.param_groups[mapping.param_group_index]["params"]
    address = mapping.get_hp_fragment_address()
    own = slice(address.start, address.start + address.numel)
    return {key: value.view(-1)[own] for key, value in base.state[flat].items() if key in (_VARIANCE, _MOMENTUM)}
