"""Run the largest shape of a run before step 1, so that out-of-memory errors occur immediately.

Composer also runs the largest batch first, so that memory is allocated in one piece. Here the loss is multiplied by zero,
so every gradient buffer is exactly zero afterwards, and no optimizer step is taken.
"""

from __future__ import annotations

import datetime
import itertools
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed.distributed_c10d import _get_default_store

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.document_attention import DocumentParts
from seqlen_curriculum.training.executor import Executor

__all__ = ["preflight"]

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
_PATIENCE = datetime.timedelta(seconds=60)
"""Time that a rank with a problem waits for the reports of the others."""
_AS_LONG_AS_IT_TAKES = datetime.timedelta(days=1)
"""Long enough for a rank that compiles or waits for files; if a rank dies, the launcher ends the launch."""
_calls = itertools.count()


def preflight(
    executor: Executor,
    rows: int,
    seqlen: int,
    target_shape: tuple[int, ...] | None = None,
    parts: DocumentParts | None = None,
) -> None:
    """Run forward and backward of a micro-batch of ``rows`` x ``seqlen`` tokens; call it on all ranks before the first step.

    ``target_shape`` is that of its targets, None for (``rows``, ``seqlen``). ``parts`` are those of documents, if any.

    Weights, gradients, optimizer, loss scale and random state are unchanged afterwards. If any rank runs out of memory,
    raises ConfigError on all ranks, with the keys to lower and the device's message.
    """
    tokens = torch.zeros((rows, seqlen), dtype=torch.int64, device=executor.engine.device)
    devices = [executor.engine.device] if executor.engine.device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=get_accelerator().device_name().split(":")[0]):
        try:
            targets = tokens if target_shape is None else tokens.new_zeros(target_shape)
            executor.dry_run((tokens, targets) if parts is None else (tokens, targets, 0, parts))
            problem = ""
        except (RuntimeError, MemoryError) as error:
            problem = out_of_memory_line(error)
    ranks = _ranks_with(problem)
    if ranks:
        raise ConfigError(
            f"train_micro_batch_size_per_gpu: a micro-batch of {rows} rows of {seqlen} tokens, the largest of this run, "
            f"does not fit the memory of rank {', '.join(map(str, ranks))}; lower it or data.seq_length, set "
            f"model.activation_checkpointing or raise zero_optimization.stage{problem and f' ({problem})'}"
        )


def out_of_memory_line(error: BaseException) -> str:
    """Return the first line of ``error``; reraise it if it is not an out-of-memory error."""
    first_line = (str(error).splitlines() or [""])[0]
    is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if not is_memory and not any(words in first_line.lower() for words in _OUT_OF_MEMORY):
        raise error
    return first_line or type(error).__name__


def _ranks_with(problem: str) -> list[int]:
    """Return the ranks that have a problem, or only this rank if the others don't answer.

    They report through the store. A failed rank has left a collective in which the others still wait, so another
    collective would not match theirs.
    """
    store: Any = _get_default_store()
    call = next(_calls)
    names = [f"preflight/{call}/{rank}" for rank in range(dist.get_world_size())]
    store.set(names[dist.get_rank()], problem)
    try:
        store.wait(names, _PATIENCE if problem else _AS_LONG_AS_IT_TAKES)
    except RuntimeError:
        if not problem:
            raise
        return [dist.get_rank()]
    return [rank for rank, report in enumerate(store.multi_get(names)) if report]  # one message for any number of ranks
