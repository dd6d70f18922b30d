"""Tokens per second of a run's model at every length: fixed against balanced micro-batches, on random tokens.

Shapes: ``B`` rows of a rank in a step, ``S`` seqlen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from seqlen_curriculum.config import RunConfig
from seqlen_curriculum.deepspeed_keys import batch_shape
from seqlen_curriculum.microbatch import balanced_rows
from seqlen_curriculum.models.gpt2 import build_gpt2
from seqlen_curriculum.training.assemble import assemble
from seqlen_curriculum.training.executor import Executor

__all__ = ["measure_throughput"]


def measure_throughput(config: RunConfig, lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """A record for each length and kind of micro-batch, in the order of ``lengths``; ``fixed``, then ``balanced``.

    ``seqlen, kind, micro_batch_rows, tokens_per_second`` (median over ``rounds`` of a whole optimizer step of all ranks),
    ``of_full_length`` (that over fixed at full length) and ``peak_memory_bytes`` of the device (None on a CPU). All cases
    take turns in each round, so that a machine's drift meets them alike; a first round is not counted. Needs the model and
    data sections; call it on every rank.
    """
    assert config.model is not None
    assert config.data is not None
    full, model_config = config.data.seq_length, config.model
    deepspeed.init_distributed()
    config = config.for_ranks(dist.get_world_size())
    rows, micro_batch, _ = batch_shape(config.keys, dist.get_world_size())
    torch.manual_seed(0)  # the same weights on every rank
    executor, _ = assemble(config, build_gpt2(model_config))
    least = executor.least_micro_batches
    draw = torch.Generator().manual_seed(executor.data_rank)  # ranks that share rows draw the same
    cases = []
    for seqlen in sorted({*lengths, full}):
        cases.append((seqlen, "fixed", micro_batch))
        cases.append((seqlen, "balanced", balanced_rows(rows, micro_batch, full, seqlen, least)))
    seen: list[list[tuple[float, int | None]]] = [[] for _ in cases]
    for turn in tqdm(range(rounds + 1), unit="round", disable=dist.get_rank() != 0):
        for (seqlen, _, micro_rows), measured in zip(cases, seen, strict=True):
            tokens = torch.randint(0, model_config.vocab_size, (rows, seqlen + 1), generator=draw)
            one = _one_step(executor, tokens, micro_rows)
            measured += [one] if turn else []
    full_speed = _median_speed(seen[cases.index((full, "fixed", micro_batch))])
    return [
        {
            "seqlen": seqlen,
            "kind": kind,
            "micro_batch_rows": micro_rows,
            "tokens_per_second": _median_speed(measured),
            "of_full_length": _median_speed(measured) / full_speed,
            "peak_memory_bytes": max((peak for _, peak in measured if peak is not None), default=None),
        }
        for (seqlen, kind, micro_rows), measured in zip(cases, seen, strict=True)
    ]


def _median_speed(measured: list[tuple[float, int | None]]) -> float:
    return statistics.median(speed for speed, _ in measured)


def _one_step(executor: Executor, tokens: torch.Tensor, micro_rows: int) -> tuple[float, int | None]:
    """(tokens/s over all ranks, peak bytes of the device or None) of an optimizer step on ``tokens`` (B, S + 1)."""
    device = executor.engine.device
    accelerator, on_cpu = get_accelerator(), device.type == "cpu"
    micro_batches = [(part[:, :-1], part[:, 1:]) for part in torch.split(tokens.to(device), micro_rows)]
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
