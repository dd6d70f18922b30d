"""Gradient accumulation over a number of micro-batches that may change from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from seqlen_curriculum.training.seeding import seed_generators

__all__ = ["accumulate", "set_accumulation"]


def set_accumulation(engine: Any, rows: int, micro_batches: int) -> None:
    """Set DeepSpeed's batch sizes for the next step: ``micro_batches`` micro-batches of ``rows`` rows on each rank.

    DeepSpeed divides each loss by the number of micro-batches and averages over ranks, so the gradient is that of the
    mean loss of the step.
    """
    # 4 micro-batches of 2 rows on 8 ranks: DeepSpeed needs 2 and 4 x 2 x 8 = 64, and divides each loss by 64 / 2 / 8 = 4.
    engine.set_train_micro_batch_size(rows)
    engine.set_train_batch_size(rows * micro_batches * engine.dp_world_size)


def accumulate(
    engine: Any, micro_batches: Sequence[tuple[torch.Tensor, ...]], seeds: Sequence[int] = ()
) -> torch.Tensor:
    """Run forward and backward of equal ``micro_batches``; return this rank's mean loss, an fp64 scalar.

    ``engine(*micro_batch)`` returns a loss. With ``seeds``, one per micro-batch, dropout is seeded with them. Call
    ``engine.step()`` next.
    """
    set_accumulation(engine, len(micro_batches[0][0]), len(micro_batches))
    total: torch.Tensor | None = None
    for number, micro_batch in enumerate(micro_batches):
        if number:
            engine.step()  # before the boundary this only counts the micro-batch
        if seeds:
            seed_generators(engine.device, seeds[number])
        # Set explicitly: DeepSpeed finds the boundary by (micro_steps + 1) % accumulation, which is wrong once accumulation
        # has changed: after 6 micro-steps a step of 4 would end at the 8th micro-step, its second micro-batch.
        engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
        loss = engine(*micro_batch)
        engine.backward(loss)
        loss = loss.detach().double()
        total = loss if total is None else total + loss
    assert total is not None
    return total / len(micro_batches)
