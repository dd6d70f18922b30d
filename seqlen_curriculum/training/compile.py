"""``torch.compile`` of a model's blocks and of its loss, with a few graphs for all lengths of a run."""

from __future__ import annotations

import torch
import torch.fx.experimental._config
from deepspeed import comm as dist

from seqlen_curriculum.config.compatibility import compiles_by_default
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.models.causal_lm import AnyCausalLM
from seqlen_curriculum.models.gpt2 import CausalLM
from seqlen_curriculum.training.telemetry import log_rank0

__all__ = ["compile_model", "is_compiled"]


def is_compiled(config: RunConfig, device: torch.device) -> bool:
    """Return ``training.compile``; if it is unset, the device decides. Needs the model section."""
    assert config.model is not None
    if config.training is not None and config.training.compile is not None:
        return config.training.compile
    return device.type == "cuda" and compiles_by_default(config.keys, config.model, config.shortening.method)


def compile_model(config: RunConfig, model: CausalLM | AnyCausalLM, device: torch.device) -> bool:
    """Compile each block, and on a GPU the loss, if ``is_compiled``; return that. Call it on all ranks.

    All lengths share their graphs, and so do all blocks: one for training, one for evaluation, and one for micro-batches of
    a single row, because torch always specializes size 1. Without a working compiler, log a message and don't compile.
    """
    if not is_compiled(config, device):
        return False
    assert isinstance(model, CausalLM)
    problem = _compiler_problem(device)
    missing = torch.tensor(float(bool(problem)), device=device)
    dist.all_reduce(missing)  # a mix would train, but with different rounding on each rank
    if missing > 0:
        log_rank0(
            f"training.compile: {problem or 'another rank has no working compiler'}; training without compilation"
        )
        return True
    log_rank0("training.compile: compiling the model, so the first micro-batches take longer")
    # Otherwise torch treats equal sizes as one size: a step of length 64 in a model of hidden size 64 would get its own
    # graph.
    torch.fx.experimental._config.use_duck_shape = False
    for block in model.lm.transformer.h:
        block.compile(dynamic=True)
    model.lm.lm_head.compiled = True
    return True


def _compiler_problem(device: torch.device) -> str:
    """Compile a function of one operation; return the error, "" if it works."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # each compiler raises its own types
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    torch._dynamo.reset()
    return ""
