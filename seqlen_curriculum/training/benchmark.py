"""Throughput of a run's model at every length, on random tokens, for different micro-batches and methods.

Shapes: ``B`` rows of a rank in a step, ``S`` tokens of a row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from seqlen_curriculum.config.deepspeed import batch_shape
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.config.training import MLM_PROBABILITY
from seqlen_curriculum.data.objective import Masking, NextToken, Objective
from seqlen_curriculum.models.attention import set_window
from seqlen_curriculum.models.causal_lm import build_model
from seqlen_curriculum.models.masked_lm import MaskedLM
from seqlen_curriculum.schedule.micro_batch import balanced_rows
from seqlen_curriculum.schedule.shortening import Method, Shortening
from seqlen_curriculum.training.abilities import check_abilities
from seqlen_curriculum.training.adam_moments import adam_moments
from seqlen_curriculum.training.build import build_executor
from seqlen_curriculum.training.compile import compile_model
from seqlen_curriculum.training.executor import Executor
from seqlen_curriculum.training.start import choose_attention, join_ranks

__all__ = ["KINDS", "measure_throughput"]

KINDS: dict[str, Method] = {"fixed": "truncate", "balanced": "truncate", "segment": "segment", "window": "window"}
"""Kinds of measurement: ``truncate`` in fixed and in balanced micro-batches, other methods in balanced ones."""


class _Case(NamedTuple):
    """A step of ``rows`` rows of ``row_tokens`` tokens per rank, in micro-batches of ``micro_rows`` rows."""

    seqlen: int
    kind: str
    rows: int
    row_tokens: int
    micro_rows: int


def measure_throughput(
    config: RunConfig, lengths: Sequence[int], rounds: int, kinds: Sequence[str] = ("fixed", "balanced")
) -> list[dict[str, Any]]:
    """Measure the throughput; return one record per length and kind, in the order of ``lengths``.

    ``seqlen, kind, micro_batch_rows, tokens_per_second`` (median over ``rounds`` of a whole optimizer step of all ranks),
    ``of_full_length`` (relative to the first kind at full length), ``peak_memory_bytes`` of the device (None on a CPU) and
    ``moments_of_step`` (the time to measure Adam's moments once, relative to a step; medians). Every round measures all
    cases, so that drift of the machine affects all of them. The first round is a warmup. Needs the model and data sections.
    Call it on every rank.
    """
    assert config.model is not None
    assert config.data is not None
    full, model_config = config.data.seq_length, config.model
    join_ranks(config.deepspeed)
    choose_attention(full)
    config = config.for_ranks(dist.get_world_size())
    rows, micro_batch, _ = batch_shape(config.keys, dist.get_world_size())
    torch.manual_seed(0)  # the same weights on every rank
    model = build_model(model_config)
    compiled = config.training.compile if config.training else None
    check_abilities(model, "window" if "window" in kinds else "truncate", compiled)
    executor, _ = build_executor(config.keys, config.deepspeed, model, config.curriculum_scheduler())
    if "window" not in kinds:  # windows aren't compiled
        compile_model(config, model, executor.engine.device)
    objective = _objective(config)
    draw = torch.Generator().manual_seed(executor.data_rank)  # ranks that share rows draw the same
    cases = [
        _case(seqlen, kind, full, rows, micro_batch, config.keys.pipeline_stages)
        for seqlen in sorted({*lengths, full})
        for kind in kinds
    ]
    seen: list[list[tuple[float, int | None]]] = [[] for _ in cases]
    moments_seconds: list[float] = []
    for turn in tqdm(range(rounds + 1), unit="round", disable=True if dist.get_rank() else None):
        for case, measured in zip(cases, seen, strict=True):
            tokens = torch.randint(0, model_config.vocab_size, (case.rows, case.row_tokens + 1), generator=draw)
            if "window" in kinds:
                assert not isinstance(model, MaskedLM)  # check_abilities refuses windows
                set_window(model, case.seqlen if KINDS[case.kind] == "window" else None)
            one = _one_step(executor, objective, tokens, case.micro_rows)
            measured += [one] if turn else []
        started = time.perf_counter()
        adam_moments(executor)  # returns numbers on the host, so it has finished
        moments_seconds += [time.perf_counter() - started] if turn else []
    full_speed, moments = _median_speed(seen[-len(kinds)]), statistics.median(moments_seconds)
    return [
        {
            "seqlen": case.seqlen,
            "kind": case.kind,
            "micro_batch_rows": case.micro_rows,
            "tokens_per_second": _median_speed(measured),
            "of_full_length": _median_speed(measured) / full_speed,
            "moments_of_step": moments * _median_speed(measured) / (case.rows * case.row_tokens * executor.data_ranks),
            "peak_memory_bytes": max((peak for _, peak in measured if peak is not None), default=None),
        }
        for case, measured in zip(cases, seen, strict=True)
    ]


def _case(seqlen: int, kind: str, full: int, samples: int, micro_batch: int, least: int) -> _Case:
    shortening = Shortening(KINDS[kind], full)
    rows, row_tokens = samples * shortening.rows_per_sample(seqlen), shortening.tokens_per_row(seqlen)
    balanced = balanced_rows(rows, micro_batch, full, row_tokens, least)
    return _Case(seqlen, kind, rows, row_tokens, micro_batch if kind == "fixed" else balanced)


def _median_speed(measured: list[tuple[float, int | None]]) -> float:
    return statistics.median(speed for speed, _ in measured)


def _objective(config: RunConfig) -> Objective:
    """Return what the model predicts of random tokens; the id of the mask token has no effect on the speed."""
    assert config.model is not None
    if not config.model.is_encoder:
        return NextToken()
    share = config.training.predicted_share if config.training else MLM_PROBABILITY
    return Masking(0, share, 0, (), config.model.vocab_size)


def _one_step(
    executor: Executor, objective: Objective, tokens: torch.Tensor, micro_rows: int
) -> tuple[float, int | None]:
    """Time an optimizer step on ``tokens`` (B, S + 1); return (tokens/s over all ranks, peak device bytes or None)."""
    device = executor.engine.device
    accelerator, on_cpu = get_accelerator(), device.type == "cpu"
    inputs, targets = objective.of_step(tokens[:, :-1].numpy(), tokens[:, 1:].numpy(), 1, 0)
    parts = (torch.split(torch.from_numpy(part).to(device), micro_rows) for part in (inputs, targets))
    micro_batches = list(zip(*parts, strict=True))
    if not on_cpu:
        accelerator.reset_peak_memory_stats()
    accelerator.synchronize()
    dist.barrier()
    started = time.perf_counter()
    executor.train(micro_batches, [0] * len(micro_batches))
    accelerator.synchronize()
    dist.barrier()
    trained = tokens[:, 1:].numel() * executor.data_ranks
    peak = None if on_cpu else int(accelerator.max_memory_allocated())
    return trained / (time.perf_counter() - started), peak
