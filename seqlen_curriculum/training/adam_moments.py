"""Size of Adam's state over the whole model: the measures of the paper's Figures 1, 4 and 6, under any sharding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_local_optimizer_state
from torch import Tensor

from seqlen_curriculum.training.executor import Executor

__all__ = ["adam_moments"]

_VARIANCE, _MOMENTUM = "exp_avg_sq", "exp_avg"
_CHUNK, _CPU_CHUNK = 1 << 24, 1 << 17
"""Elements looked at together. On a CPU more would take new pages from the system each time: three times as slow."""
_NAMES = ("variance_norm", "variance_max", "momentum_norm", "momentum_max")


@torch.no_grad()
def adam_moments(executor: Executor) -> dict[str, float]:
    """``variance_norm`` and ``variance_max``, the l1 norm and the largest element of Adam's sqrt(v); the same of momentum.

    Over all elements of the model, each counted once however it is sharded, cut or repeated; call it on all ranks, after a
    step. Costs one pass over a rank's share of the state and one gather of four numbers. A number that is not finite is
    left out. Empty where there is no such state, or no true one: other optimizers, offload to NVMe, fp16 at ZeRO stage 0, no
    step taken yet.
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
    found = {name: value for name, value in zip(_NAMES, values, strict=True) if math.isfinite(value)}
    return found if any(values) else {}


def _chunks(states: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The states joined and cut to 1-D chunks: a model has many small parameters, and each kernel costs."""
    chunk: list[tuple[Tensor, Tensor]] = []
    size = 0
    for variance, momentum in states:
        most = _CPU_CHUNK if variance.device.type == "cpu" else _CHUNK
        for cut in zip(*(torch.split(state.reshape(-1), most) for state in (variance, momentum)), strict=True):
            if chunk and size + cut[0].numel() > most:
                yield _joined(chunk)
                chunk, size = [], 0
            chunk.append(cut)
            size += cut[0].numel()
    if chunk:
        yield _joined(chunk)


def _joined(chunk: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(chunk) == 1:
        return chunk[0]
    variances, momenta = zip(*chunk, strict=True)
    return torch.cat(variances), torch.cat(momenta)


def _total(parts: Tensor) -> Tensor:
    """(n, 4) norms and maxima of parts as those of the whole, (4,)."""
    norms, maxima = parts.sum(0), parts.amax(0)
    return torch.stack([norms[0], maxima[1], norms[2], maxima[3]])


def _own_state(executor: Executor) -> Iterator[tuple[Tensor, Tensor]]:
    """(v, momentum) of the elements that this rank counts; padding, which is zero, may be among them."""
    engine = executor.engine
    base = engine.optimizer
    while hasattr(base, "optimizer"):
        base = base.optimizer  # of DeepSpeed's wrappers
    # DeepSpeed's fp16 optimizer of stage 0 keeps a state some 2e4 times too small.
    if not engine.zero_optimization() and (executor.replica > 0 or engine.fp16_enabled()):
        return
    if not any(_VARIANCE in state for state in base.state.values()):  # not Adam's
        return
    parameters = list(engine.module.parameters())
    own = executor.unique_parameters(parameters)
    all_own = len(own) == len(parameters)  # then the flat tensors that hold them are taken whole
    for state in base.state.values() if all_own else (_fragment(base, parameter) for parameter in own):
        if _VARIANCE in state and state[_VARIANCE].numel():
            yield state[_VARIANCE], state[_MOMENTUM]


def _fragment(base: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state of a rank's elements of one parameter; empty if it has none, or nothing tells which they are."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        return {key: safe_get_local_optimizer_state(parameter, key) for key in (_VARIANCE, _MOMENTUM)}
    mapping = getattr(parameter, "_hp_mapping", None)  # of ZeRO-1 and 2: where in its group's flat tensor
    if mapping is None:
        state: dict[str, Tensor] = base.state.get(parameter, {})
        return state
    (flat,) = base.param_groups[mapping.param_group_index]["params"]
    address = mapping.get_hp_fragment_address()
    cut = slice(address.start, address.start + address.numel)
    return {key: value.view(-1)[cut] for key, value in base.state[flat].items() if key in (_VARIANCE, _MOMENTUM)}
