"""A checkpoint continued under another ZeRO stage or number of ranks: each rank picks its elements out of all shards.

DeepSpeed keeps fp32 weights, and the optimizer's state beside them, in flat tensors that run on from parameter to
parameter and break off at the end of a rank's share. A ``Span`` tells which elements of which parameter lie where. The
saved shards are mapped into memory, so a rank reads what it needs; nothing is written and no rank waits for another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from seqlen_curriculum.errors import CheckpointError

__all__ = ["Span", "load_resharded", "spans_of_parameters", "take"]

_WEIGHT = "fp32"
_SCALER = ("loss_scaler", "dynamic_loss_scale", "overflow")
Piece = tuple[int, dict[str, Tensor]]  # a parameter's elements from one on: the fp32 weights and each state, 1-D


@dataclass(frozen=True)
class Span:
    """``numel`` elements of parameter ``name``, from ``first`` on, lie in flat tensor ``flat`` from ``start`` on."""

    name: str
    first: int
    numel: int
    flat: int
    start: int


@dataclass(frozen=True)
class _Shard:
    spans: list[Span]
    weights: Sequence[Tensor]
    state: Mapping[int, dict[str, Any]]  # torch's own: of the flat tensor of that number

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        for span in self.spans:
            tensors = {_WEIGHT: self.weights[span.flat], **_elementwise(self.state.get(span.flat, {}))}
            cut = {key: flat.view(-1)[span.start : span.start + span.numel] for key, flat in tensors.items()}
            yield span.name, (span.first, cut)


@dataclass(frozen=True)
class _Saved:
    model: dict[str, Any]  # DeepSpeed's model states: the engine's counters, without ZeRO weights and optimizer too
    shards: list[_Shard]
    param_groups: list[dict[str, Any]]
    scaler: dict[str, Any]


def load_resharded(engine: Any, folder: Path, saved_stage: int, saved_ranks: int) -> None:
    """Continue ``engine``, under any ZeRO stage, from ``saved_ranks`` shards saved under ``saved_stage``.

    Weights and optimizer state are the saved ones to the last bit, as are step, loss scale and learning rate. In half
    precision and in pipelines stage 0 is refused: CheckpointError.
    """
    stage, model_rank = engine.zero_optimization_stage(), engine.mpu.get_model_parallel_rank() if engine.mpu else 0
    if 0 in (stage, saved_stage) and isinstance(engine, PipelineEngine):
        raise CheckpointError(
            f"{folder}: saved under ZeRO stage {saved_stage}; a pipeline can't continue it under stage {stage}, set "
            f"zero_optimization.stage to {saved_stage}"
        )
    if 0 in (stage, saved_stage) and (engine.fp16_enabled() or engine.bfloat16_enabled()):
        raise CheckpointError(
            f"{folder}: saved under ZeRO stage {saved_stage}, which in half precision can't continue under stage {stage}: "
            f"stage 0 has an optimizer of its own there; set zero_optimization.stage to {saved_stage}"
        )
    names = [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    saved = _read(folder, saved_stage, saved_ranks, names, model_rank)
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for shard in saved.shards:
        for name, piece in shard.pieces():
            pieces[name].append(piece)
    with torch.no_grad():
        {0: _load_whole, 3: _load_by_parameter}.get(stage, _load_by_group)(engine, saved, pieces)
    _load_counters(engine, saved.model)


def take(pieces: Iterable[tuple[int, Tensor]], first: int, target: Tensor) -> None:
    """Fill 1-D ``target`` with a parameter's elements from ``first`` on, out of ``pieces``: (first element, elements)."""
    found = 0
    for begins, piece in pieces:
        begin, end = max(first, begins), min(first + target.numel(), begins + piece.numel())
        if begin < end:
            target[begin - first : end - first].copy_(piece[begin - begins : end - begins])
            found += end - begin
    if found != target.numel():
        raise ValueError(f"of {target.numel()} elements of a parameter the shards hold {found}")


def spans_of_parameters(shapes: Iterable[Mapping[str, Sequence[int]]], rank: int, ranks: int) -> list[Span]:
    """ZeRO-3: each rank has an equal share of each parameter, the last ones padded; one flat tensor a group of them."""
    spans = []
    for flat, group in enumerate(shapes):
        start = 0
        for name, shape in group.items():
            numel = torch.Size(shape).numel()
            share = -(-numel // ranks)
            spans.append(Span(name, rank * share, max(0, min(share, numel - rank * share)), flat, start))
            start += share
    return spans


def _spans_of_group(mappings: Iterable[Mapping[str, Any]], firsts: Mapping[str, int]) -> list[Span]:
    """ZeRO-1 and 2: each rank has an equal share of a whole group's elements; a parameter may begin on another rank."""
    return [
        Span(name, firsts[name], address.numel, flat, address.start)
        for flat, group in enumerate(mappings)
        for name, address in group.items()
    ]


def _spans_of_whole(weights: Mapping[str, Tensor]) -> list[Span]:
    return [Span(name, 0, weight.numel(), flat, 0) for flat, (name, weight) in enumerate(weights.items())]


def _read(folder: Path, stage: int, ranks: int, names: list[str], model_rank: int) -> _Saved:
    part = f"mp_rank_{model_rank:02d}"
    model = _mapped(min(folder.glob(f"*{part}_model_states.pt")))  # of data rank 0, where each has its own
    if stage == 0:
        weights = {name: model["module"][name] for name in names}
        shard = _Shard(_spans_of_whole(weights), list(weights.values()), model["optimizer"]["state"])
        return _Saved(model, [shard], model["optimizer"]["param_groups"], {})
    states = [
        _mapped(next(folder.glob(f"*zero_pp_rank_{rank}_{part}_optim_states.pt")))["optimizer_state_dict"]
        for rank in range(ranks)
    ]
    key = _base_key(stage)
    shards = list(_shards_of_parameters(states, model["param_shapes"]) if stage == 3 else _shards_of_group(states))
    return _Saved(model, shards, states[0][key]["param_groups"], {k: states[0][k] for k in _SCALER if k in states[0]})


def _mapped(path: Path) -> dict[str, Any]:
    states: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return states


def _base_key(stage: int) -> str:
    return "optimizer_state_dict" if stage == 3 else "base_optimizer_state"


def _shards_of_parameters(states: list[dict[str, Any]], shapes: Any) -> Iterator[_Shard]:
    for rank, state in enumerate(states):
        spans = spans_of_parameters(shapes, rank, len(states))
        yield _Shard(spans, state["fp32_flat_groups"], state[_base_key(3)]["state"])


def _shards_of_group(states: list[dict[str, Any]]) -> Iterator[_Shard]:
    firsts: Counter[str] = Counter()  # elements on the ranks before
    for state in states:
        spans = _spans_of_group(state["param_slice_mappings"], firsts)
        yield _Shard(spans, state["single_partition_of_fp32_groups"], state[_base_key(1)]["state"])
        firsts.update({span.name: span.numel for span in spans})


def _load_whole(engine: Any, saved: _Saved, pieces: Mapping[str, list[Piece]]) -> None:
    weights = {name: weight.data for name, weight in engine.module.named_parameters() if weight.requires_grad}
    base = engine.optimizer.state_dict()
    engine.optimizer.load_state_dict(_filled(base, saved, pieces, _spans_of_whole(weights), list(weights.values())))


def _load_by_group(engine: Any, saved: _Saved, pieces: Mapping[str, list[Piece]]) -> None:
    optimizer = engine.optimizer
    flats = [flat for group in optimizer.optimizer.param_groups for flat in group["params"]]
    mappings = {name: parameter._hp_mapping for name, parameter in engine.module.named_parameters()}
    firsts = {name: mapping.lp_fragment_address.start for name, mapping in mappings.items() if mapping is not None}
    own = optimizer.state_dict()
    spans = _spans_of_group(own["param_slice_mappings"], firsts)
    own |= saved.scaler | {_base_key(1): _filled(own[_base_key(1)], saved, pieces, spans, flats)}
    optimizer.load_state_dict([own] * engine.dp_world_size, load_from_fp32_weights=True)
    optimizer.update_lp_params()


def _load_by_parameter(engine: Any, saved: _Saved, pieces: Mapping[str, list[Piece]]) -> None:
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    shapes = [{names[id(parameter)]: parameter.ds_shape for parameter in group} for group in optimizer.fp16_groups]
    spans = spans_of_parameters(shapes, dist.get_rank(optimizer.dp_process_group), engine.dp_world_size)
    own = optimizer.state_dict()
    filled = _filled(own[_base_key(3)], saved, pieces, spans, optimizer.fp32_partitioned_groups_flat)
    own |= saved.scaler | {_base_key(3): filled}
    optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict([own] * engine.dp_world_size)
    optimizer.checkpoint_event_epilogue()


def _filled(
    base: dict[str, Any], saved: _Saved, pieces: Mapping[str, list[Piece]], spans: list[Span], flats: Sequence[Tensor]
) -> dict[str, Any]:
    """``base``, the state of torch's optimizer over ``flats``, as saved; the weights go into ``flats`` themselves."""
    sample = saved.shards[0].state.get(0, {})  # empty where fp16 has skipped every step so far
    scalars = {key: _scalar(value) for key, value in sample.items() if key not in _elementwise(sample)}
    state = [{key: torch.zeros_like(flat) for key in _elementwise(sample)} for flat in flats]
    for span in spans:
        for key, flat in {_WEIGHT: flats[span.flat], **state[span.flat]}.items():
            target = flat.view(-1)[span.start : span.start + span.numel]
            take([(first, cut[key]) for first, cut in pieces[span.name]], span.first, target)
    groups = [
        {**ours, **{key: theirs[key] for key in ours.keys() & theirs.keys() - {"params"}}}
        for ours, theirs in zip(base["param_groups"], saved.param_groups, strict=True)
    ]
    per_flat = {flat: {**own, **scalars} for flat, own in enumerate(state)}
    return {"state": per_flat if sample else {}, "param_groups": groups}


def _elementwise(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The part of an optimizer's state that has a value for each element."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}


def _scalar(value: Any) -> Any:
    """A count of steps is a tensor in torch's optimizers and an int in DeepSpeed's; torch's take the latter too."""
    number = value.item() if isinstance(value, Tensor) else value
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _load_counters(engine: Any, model: Mapping[str, Any]) -> None:
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, model[name])
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
