"""The processes that share an evaluation, started by ``deepspeed`` or ``torchrun``, or this one alone."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from seqlen_curriculum.errors import ConfigError

__all__ = ["Ranks", "join"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, and the device it computes on."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of every rank's ``values``, element by element, on every rank."""
        if self.world == 1:
            return values
        summed = torch.from_numpy(values).to(self.device)
        dist.all_reduce(summed)
        return np.asarray(summed.cpu().numpy(), dtype=np.float64)

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found


def join(device: str | None = None) -> Ranks:
    """This process among those of its launcher (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``), on a GPU of its own if any.

    ``device`` is ``"cpu"`` or ``"cuda"``; by default the latter where there is one and ``DS_ACCELERATOR`` isn't ``cpu``.
    Raises ConfigError for a GPU that isn't there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = device or ("cuda" if gpus and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")
    rank, world, local = (int(os.environ.get(name, value)) for name, value in _LAUNCHER.items())
    if kind == "cuda" and not gpus:
        raise ConfigError("--device cuda: no GPU is seen here; leave it out to compute on the CPU")
    if kind == "cuda" and local >= gpus:
        raise ConfigError(
            f"--device cuda: {gpus} GPUs are seen here, rank {rank} needs number {local}; start fewer ranks"
        )
    place = torch.device(kind, local if kind == "cuda" else 0)
    if world > 1:
        if kind == "cuda":
            torch.cuda.set_device(place)
        # Ranks have even shares, yet the first may wait long for one on a slower machine.
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=6))
    return Ranks(rank, world, place)


_LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
