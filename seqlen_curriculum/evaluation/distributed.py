"""The ranks that share an evaluation, started by ``deepspeed`` or ``torchrun``, or a single process."""

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
from seqlen_curriculum.launchers import device_number, fill_environment, launch, port_errors, port_problem

__all__ = ["Ranks", "join"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the world size, and the device of this rank."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the elementwise sum of ``values`` over all ranks, on every rank."""
        if self.world == 1:
            return values
        summed = torch.from_numpy(values).to(self.device)
        dist.all_reduce(summed)
        return np.asarray(summed.cpu().numpy(), dtype=np.float64)

    def gather(self, value: T) -> list[T]:
        """Return the list of ``value`` from all ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def join(device: str | None = None) -> Ranks:
    """Join the ranks of the launcher, each on its own GPU if there are GPUs.

    ``device`` is ``"cpu"`` or ``"cuda"``. The default is ``"cuda"`` if there is a GPU and ``DS_ACCELERATOR`` isn't
    ``cpu``. Raises ConfigError for a GPU that doesn't exist, and if the ranks can't connect.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = device or ("cuda" if gpus and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")
    found = launch()
    rank, world, local_rank = (found.rank, found.ranks, found.local_rank) if found else (0, 1, 0)
    if kind == "cuda" and not gpus:
        raise ConfigError("--device cuda: no GPU is visible; leave it out to use the CPU")
    own_device = torch.device(kind, device_number(local_rank, gpus) if kind == "cuda" else 0)
    if world > 1:
        fill_environment()
        for problem in port_problem():
            raise ConfigError(problem)
        if kind == "cuda":
            torch.cuda.set_device(own_device)
        # Ranks score equal shares and synchronize once per task. The default of 10 minutes (NCCL) is too short for a rank
        # that waits for one on a slower machine.
        with port_errors():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=6))
    return Ranks(rank, world, own_device)
