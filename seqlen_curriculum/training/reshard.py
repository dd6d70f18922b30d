"""Load a checkpoint under another ZeRO stage or number of ranks: each rank copies its elements from all shards.

DeepSpeed stores fp32 weights and the optimizer's state in flat tensors, which concatenate parameters and are cut at the end
of a rank's share. A ``Span`` is the position of some elements of a parameter. For parameters ``a`` of 5 elements and ``b``
of 3 on two ranks (a dot is padding)::

    stage 0         rank 0: [a0 a1 a2 a3 a4] [b0 b1 b2]   rank 1: the same
    stages 1 and 2  rank 0: [a0 a1 a2 a3]                 rank 1: [a4 b0 b1 b2]
    stage 3         rank 0: [a0 a1 a2 b0 b1]              rank 1: [a3 a4 .  b2 . ]

The saved shards are memory-mapped, so a rank only reads the elements it needs. Nothing is written, and no rank waits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    FP32_WEIGHT_KEY,
    LOSS_SCALER,
    MODEL_FILE_PREFIX,
    MODEL_FILE_SUFFIX,
    OPTIM_FILE_SUFFIX,
    OPTIMIZER_STATE_DICT,
    PARAM_GROUPS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    ZERO_FILE_PREFIX,
)
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.training.read_shard import read_shard

__all__ = ["Span", "load_resharded", "spans_of_groups", "spans_of_parameters", "spans_of_whole", "take"]

_SCALER = (LOSS_SCALER, "dynamic_loss_scale", "overflow")
Piece = tuple[
    int, dict[str, Tensor]
]  # elements of a parameter from some index on: the fp32 weights and each state, 1-D


@dataclass(frozen=True)
class Span:
    """``numel`` elements of parameter ``name`` from ``first`` on, stored in flat tensor ``flat`` from ``start`` on."""

    name: str
    first: int
    numel: int
    flat: int
    start: int


def spans_of_whole(weights: Mapping[str, Tensor]) -> list[Span]:
    """Return the spans at stage 0: each parameter is a separate tensor."""
    return [Span(name, 0, weight.numel(), flat, 0) for flat, (name, weight) in enumerate(weights.items())]


def spans_of_groups(mappings: Iterable[Mapping[str, Any]], firsts: Mapping[str, int]) -> list[Span]:
    """Return a rank's spans at stages 1 and 2: an equal share of the elements of each whole parameter group.

    ``mappings`` are DeepSpeed's fragment addresses, one mapping per group. ``firsts`` counts the elements of a parameter
    on earlier ranks.
    """
    return [
        Span(name, firsts[name], address.numel, flat, address.start)
        for flat, group in enumerate(mappings)
        for name, address in group.items()
    ]


def spans_of_parameters(shapes: Iterable[Mapping[str, Sequence[int]]], rank: int, ranks: int) -> list[Span]:
    """Return a rank's spans at stage 3: an equal, padded share of each parameter, in one flat tensor per group."""
    spans = []
    for flat, group in enumerate(shapes):
        start = 0
        for name, shape in group.items():
            numel = torch.Size(shape).numel()
            share = -(-numel // ranks)  # rounded up: 5 elements on 3 ranks are shares of 2, 2 and 1
            spans.append(Span(name, rank * share, max(0, min(share, numel - rank * share)), flat, start))
            start += share
    return spans


@dataclass(frozen=True)
class _Shard:
    """The state saved by one rank."""

    spans: list[Span]
    weights: Sequence[Tensor]
    """The flat tensors."""
    state: Mapping[int, dict[str, Any]]
    """Torch's state of the optimizer, by the number of the flat tensor."""

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        for span in self.spans:
            tensors = {FP32_WEIGHT_KEY: self.weights[span.flat], **_elementwise(self.state.get(span.flat, {}))}
            # Views of the mapped file, read from the disk only when take() copies elements.
            cut = {key: flat.view(-1)[span.start : span.start + span.numel] for key, flat in tensors.items()}
            yield span.name, (span.first, cut)


class _Saved:
    """The state of a checkpoint from all its ranks."""

    def __init__(self, folder: Path, stage: int, ranks: int, names: list[str], model_rank: int) -> None:
        part = f"{MODEL_FILE_PREFIX}{model_rank:02d}"
        # The file of data-parallel rank 0. The values read from it are the same in the files of all ranks.
        self.model = read_shard(min(folder.glob(f"*{part}{MODEL_FILE_SUFFIX}")), mmap=True)
        self.scaler: dict[str, Any] = {}
        if stage == 0:
            weights, base = {name: self.model["module"][name] for name in names}, self.model["optimizer"]
            shards = [_Shard(spans_of_whole(weights), list(weights.values()), base["state"])]
        else:
            files = (f"*{ZERO_FILE_PREFIX}{rank}_{part}{OPTIM_FILE_SUFFIX}" for rank in range(ranks))
            states = [read_shard(next(folder.glob(file)), mmap=True)[OPTIMIZER_STATE_DICT] for file in files]
            base = states[0][OPTIMIZER_STATE_DICT if stage == 3 else BASE_OPTIMIZER_STATE]
            if LOSS_SCALER in states[0]:  # DeepSpeed's BF16_Optimizer has none
                self.scaler = {key: states[0][key] for key in _SCALER}
            shards = list(_shards_by_parameter(states, self.model) if stage == 3 else _shards_by_group(states))
        self.param_groups: list[dict[str, Any]] = base[PARAM_GROUPS]
        self.sample: dict[str, Any] = shards[0].state.get(0, {})
        """The state of one tensor, empty if fp16 has skipped every step so far."""
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        for shard in shards:
            for name, piece in shard.pieces():
                self.pieces[name].append(piece)

    def fill(self, base: dict[str, Any], spans: list[Span], flats: Sequence[Tensor]) -> dict[str, Any]:
        """Copy the saved weights to ``flats``; return the saved state of torch's optimizer over them, as ``base``."""
        elementwise = _elementwise(self.sample)
        scalars = {key: _scalar(value) for key, value in self.sample.items() if key not in elementwise}
        state = [{key: torch.zeros_like(flat) for key in elementwise} for flat in flats]
        for span in spans:
            for key, flat in {FP32_WEIGHT_KEY: flats[span.flat], **state[span.flat]}.items():
                target = flat.view(-1)[span.start : span.start + span.numel]
                take([(first, cut[key]) for first, cut in self.pieces[span.name]], span.first, target)
        # Learning rate, betas and weight decay are the saved ones. "params" numbers tensors, which have changed.
        groups = []
        for group, saved in zip(base[PARAM_GROUPS], self.param_groups, strict=True):
            shared = group.keys() & saved.keys() - {"params"}
            groups.append({**group, **{key: saved[key] for key in shared}})
        per_flat = {flat: {**own, **scalars} for flat, own in enumerate(state)}
        return {"state": per_flat if self.sample else {}, PARAM_GROUPS: groups}


def _shards_by_parameter(states: list[dict[str, Any]], model: Mapping[str, Any]) -> Iterator[_Shard]:
    for rank, state in enumerate(states):
        spans = spans_of_parameters(model[PARAM_SHAPES], rank, len(states))
        yield _Shard(spans, state[FP32_FLAT_GROUPS], state[OPTIMIZER_STATE_DICT]["state"])


def _shards_by_group(states: list[dict[str, Any]]) -> Iterator[_Shard]:
    firsts: Counter[str] = Counter()  # elements on earlier ranks
    for state in states:
        spans = spans_of_groups(state[PARAM_SLICE_MAPPINGS], firsts)
        yield _Shard(spans, state[SINGLE_PARTITION_OF_FP32_GROUPS], state[BASE_OPTIMIZER_STATE]["state"])
        firsts.update({span.name: span.numel for span in spans})


def load_resharded(engine: Any, folder: Path, saved_stage: int, saved_ranks: int) -> None:
    """Load ``saved_ranks`` shards, saved under ``saved_stage``, into ``engine`` under any ZeRO stage.

    Weights, optimizer state, step, loss scale and learning rate are bit-identical to the saved ones. Raises
    CheckpointError for stage 0, on either side, in half precision and in pipelines.
    """
    stage = engine.zero_optimization_stage()
    if 0 in (stage, saved_stage) and isinstance(engine, PipelineEngine):
        raise CheckpointError(
            f"{folder}: saved under ZeRO stage {saved_stage}; a pipeline can't resume it under stage {stage}, set "
            f"zero_optimization.stage to {saved_stage}"
        )
    if 0 in (stage, saved_stage) and (engine.fp16_enabled() or engine.bfloat16_enabled()):
        raise CheckpointError(
            f"{folder}: saved under ZeRO stage {saved_stage}, which in half precision can't resume under stage {stage}, "
            f"because stage 0 has another optimizer; set zero_optimization.stage to {saved_stage}"
        )
    names = [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    model_rank = engine.mpu.get_model_parallel_rank() if engine.mpu else 0
    saved = _Saved(folder, saved_stage, saved_ranks, names, model_rank)
    with torch.no_grad():
        if stage == 0:
            _load_whole(engine, saved)
        elif stage == 3:
            _load_by_parameter(engine, saved)
        else:
            _load_by_group(engine, saved)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, saved.model[name])
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(saved.model["lr_scheduler"])


def _load_whole(engine: Any, saved: _Saved) -> None:
    weights = {name: weight.data for name, weight in engine.module.named_parameters() if weight.requires_grad}
    base = engine.optimizer.state_dict()
    engine.optimizer.load_state_dict(saved.fill(base, spans_of_whole(weights), list(weights.values())))


def _load_by_group(engine: Any, saved: _Saved) -> None:
    optimizer = engine.optimizer
    flats = [flat for group in optimizer.optimizer.param_groups for flat in group["params"]]
    mappings = {name: parameter._hp_mapping for name, parameter in engine.module.named_parameters()}
    firsts = {name: mapping.lp_fragment_address.start for name, mapping in mappings.items() if mapping is not None}
    own = optimizer.state_dict()
    spans = spans_of_groups(own[PARAM_SLICE_MAPPINGS], firsts)
    own |= saved.scaler | {BASE_OPTIMIZER_STATE: saved.fill(own[BASE_OPTIMIZER_STATE], spans, flats)}
    # DeepSpeed selects this rank's state from a list of all ranks' states, so every entry is this rank's state.
    optimizer.load_state_dict([own] * engine.dp_world_size, load_from_fp32_weights=True)
    optimizer.update_lp_params()


def _load_by_parameter(engine: Any, saved: _Saved) -> None:
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    shapes = [{names[id(parameter)]: parameter.ds_shape for parameter in group} for group in optimizer.fp16_groups]
    spans = spans_of_parameters(shapes, dist.get_rank(optimizer.dp_process_group), engine.dp_world_size)
    own = optimizer.state_dict()
    filled = saved.fill(own[OPTIMIZER_STATE_DICT], spans, optimizer.fp32_partitioned_groups_flat)
    own |= saved.scaler | {OPTIMIZER_STATE_DICT: filled}
    # The prologue partitions every parameter that is gathered. The epilogue gathers those that DeepSpeed keeps gathered,
    # with their new values.
    optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict([own] * engine.dp_world_size)
    optimizer.checkpoint_event_epilogue()


def take(pieces: Iterable[tuple[int, Tensor]], first: int, target: Tensor) -> None:
    """Fill 1-D ``target`` with the elements of a parameter from ``first`` on, from ``pieces`` of (first element, elements).

    Raises ValueError if the pieces don't contain all of them.
    """
    # Elements 4 to 9 from two pieces of 6 elements: 4 and 5 from the first, 6 to 9 from the second.
    taken = 0
    for begins, piece in pieces:
        begin, end = max(first, begins), min(first + target.numel(), begins + piece.numel())
        if begin < end:
            target[begin - first : end - first].copy_(piece[begin - begins : end - begins])
            taken += end - begin
    if taken != target.numel():
        raise ValueError(f"the shards contain {taken} of {target.numel()} elements of a parameter")


def _elementwise(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the part of an optimizer's state with one value per element."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}


def _scalar(value: Any) -> Any:
    """Return a step count, a tensor in torch's optimizers and an int in DeepSpeed's, in a form that both accept."""
    number = value.item() if isinstance(value, Tensor) else value
    return int(number) if isinstance(number, float) and number.is_integer() else number
