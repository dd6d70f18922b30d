"""The processes that share an evaluation, started by ``deepspeed`` or ``torchrun``, or this process alone."""

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
from seqlen_curriculum.launchers import device_number, fill_environment, launch, port_problem

__all__ = ["Ranks", "join"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The number of this process, how many there are, and the device this one computes on."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return, on every rank, the sum of all ranks' ``values``, element by element."""
        if self.world == 1:
            return values
        summed = torch.from_numpy(values).to(self.device)
        dist.all_reduce(summed)
        return np.asarray(summed.cpu().numpy(), dtype=np.float64)

    def gather(self, value: T) -> list[T]:
        """Return every rank's ``value``, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def join(device: str | None = None) -> Ranks:
    """Join the processes of the launcher, each on a GPU of its own if there are GPUs.

    ``device`` is ``"cpu"`` or ``"cuda"``. The default is ``"cuda"`` where there is a GPU and ``DS_ACCELERATOR`` isn't
    ``cpu``. Raises ConfigError for a GPU that doesn't exist, and where the ranks can't meet.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = device or ("cuda" if gpus and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")
    found = launch()
    rank, world, local_rank = (found.rank, found.ranks, found.local_rank) if found else (0, 1, 0)
    if kind == "cuda" and not gpus:
        raise ConfigError("--device cuda: no GPU is seen here; leave it out to compute on the CPU")
    own_device = torch.device(kind, device_number(local_rank, gpus) if kind == "cuda" else 0)
    if world > 1:
        fill_environment()
        for problem in port_problem():
            raise ConfigError(problem)
        if kind == "cuda":
            torch.cuda.set_device(own_device)
        # Ranks score equal shares and meet once per task. The default of 10 minutes (NCCL) is too short for a rank that
        # waits for one on a slower machine.
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=6))
    return Ranks(rank, world, own_device)
