"""One optimizer step's gradients from any number of micro-batches, however many the last step had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["accumulate", "set_accumulation"]


def set_accumulation(engine: Any, rows: int, micro_batches: int) -> None:
    """Tell DeepSpeed that the coming step has ``micro_batches`` micro-batches of ``rows`` rows on each rank.

    DeepSpeed scales each loss by the number of micro-batches and averages over ranks, so the gradient is that of the
    whole step's mean loss.
    """
    engine.set_train_micro_batch_size(rows)
    engine.set_train_batch_size(rows * micro_batches * engine.dp_world_size)


def accumulate(
    engine: Any, micro_batches: Sequence[tuple[torch.Tensor, ...]], seeds: Sequence[int] = ()
) -> torch.Tensor:
    """Forward and backward of equal ``micro_batches``; this rank's mean loss, an fp64 scalar. ``engine.step()`` is next.

    ``engine(*micro_batch)`` gives a loss. With ``seeds``, one a micro-batch, dropout draws from them.
    """
    set_accumulation(engine, len(micro_batches[0][0]), len(micro_batches))
    total = torch.zeros((), device=engine.device, dtype=torch.float64)
    for number, micro_batch in enumerate(micro_batches):
        if number:
            engine.step()  # before the boundary this only tells DeepSpeed that a micro-batch is done
        if seeds:
            torch.manual_seed(seeds[number])
        # Said outright: DeepSpeed's own count of micro-batches goes astray when their number changes between steps.
        engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
        loss = engine(*micro_batch)
        engine.backward(loss)
        total += loss.detach()
    return total / len(micro_batches)
