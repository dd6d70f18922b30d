"""The start of a run: check the machine, set this process's device, and join the other ranks."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.launchers import DEFAULT_PORT, be_only_rank, device_number, fill_environment, launch, port_errors
from seqlen_curriculum.training.extensions import set_up_extensions
from seqlen_curriculum.training.machine import machine_problems

__all__ = ["choose_attention", "join_ranks"]

_FLASH_TOKENS = 1024
"""Maximum sequence length at which cuDNN's attention was measured not to be faster than flash attention."""


def join_ranks(deepspeed_config: Mapping[str, Any], distributed_port: int = DEFAULT_PORT) -> None:
    """Join the ranks of this launch, each on its own device, unless that is already done; call it on all ranks.

    A process that no launcher started becomes rank 0 of 1. ``deepspeed_config`` is DeepSpeed's part of the file. Raises
    ConfigError for requirements that the machine lacks.
    """
    if torch.distributed.is_initialized():
        return
    found = launch()
    if found is not None:
        fill_environment()
    elif importlib.util.find_spec("mpi4py") is None:
        # With mpi4py, DeepSpeed finds ranks that an mpirun unknown to us started.
        be_only_rank(None if distributed_port == DEFAULT_PORT else distributed_port)
        _warn_of_idle_devices()
    # Before any collective, which uses the current device: NCCL refuses two ranks on one device, and a context on device 0
    # takes memory there.
    get_accelerator().set_device(_own_device(found.local_rank if found else 0))
    set_up_extensions(is_first_of_node=found is None or found.local_rank == 0)
    problems = list(machine_problems(deepspeed_config))
    if problems:
        raise ConfigError(problems)
    with port_errors():
        deepspeed.init_distributed(distributed_port=distributed_port)


def choose_attention(seq_length: int) -> None:
    """Turn cuDNN's attention off in this process for sequences of up to 1024 tokens, so that torch uses flash attention.

    On H100 and H200 torch prefers cuDNN's, which builds a plan for each new shape of a micro-batch. Measured on an H200 with
    torch 2.11, bf16, 12 heads of 64, dropout 0.1: a plan takes 116 ms; forward and backward of 16 rows of 1024 tokens take
    0.83 ms by cuDNN's and 0.84 ms by flash attention, of 64 rows of 256 tokens 0.93 and 0.45 ms.
    """
    if seq_length <= _FLASH_TOKENS:
        torch.backends.cuda.enable_cudnn_sdp(False)


def _warn_of_idle_devices() -> None:
    """Warn that a process without a launcher uses one device of several."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu" and accelerator.device_count() > 1:
        print(
            f"warning: no launcher started this process, so it trains on one of {accelerator.device_count()} devices; start "
            "the script with deepspeed or torchrun to use all of them",
            file=sys.stderr,
        )


def _own_device(local_rank: int) -> int:
    """Return the index of this process's device, and set LOCAL_RANK to it, which DeepSpeed uses as the index."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return local_rank
    number = device_number(local_rank, accelerator.device_count())
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed requires that they are equal
        if name in os.environ:
            os.environ[name] = str(number)
    return number
