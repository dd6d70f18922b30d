"""``torch.compile`` of a model's blocks, with a few graphs for all lengths of a run."""

from __future__ import annotations

import torch
import torch.fx.experimental._config
from deepspeed import comm as dist
from torch import nn

from seqlen_curriculum.config.compatibility import compiles_by_default
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.training.telemetry import log_rank0

__all__ = ["compile_blocks", "is_compiled"]


def is_compiled(config: RunConfig, device: torch.device) -> bool:
    """Return ``training.compile`` of a file with model and training sections; if it is unset, the device decides."""
    assert config.training is not None
    assert config.model is not None
    if config.training.compile is not None:
        return config.training.compile
    return device.type == "cuda" and compiles_by_default(config.keys, config.model, config.shortening.method)


def compile_blocks(blocks: nn.ModuleList, device: torch.device) -> None:
    """Compile each block with dynamic rows and lengths. Without a working compiler, log a message and don't compile.

    All blocks share their graphs: one for training, one for evaluation, and one for micro-batches of a single row, because
    torch always specializes size 1.
    """
    problem = _compiler_problem(device)
    missing = torch.tensor(float(bool(problem)), device=device)
    dist.all_reduce(missing)  # a mix would train, but with different rounding on each rank
    if missing > 0:
        log_rank0(
            f"training.compile: {problem or 'another rank has no working compiler'}; training without compilation"
        )
        return
    log_rank0("training.compile: compiling the model's blocks, so the first micro-batches take longer")
    # Otherwise torch treats equal sizes as one size: a step of length 64 in a model of hidden size 64 would get its own
    # graph.
    torch.fx.experimental._config.use_duck_shape = False
    for block in blocks:
        block.compile(dynamic=True)


def _compiler_problem(device: torch.device) -> str:
    """Compile a function of one operation; return the error, "" if it works."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # each compiler raises its own types
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    torch._dynamo.reset()
    return ""
