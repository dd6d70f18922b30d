"""``torch.compile`` of a model's blocks and of its loss, with a few graphs for all lengths of a run."""

from __future__ import annotations

import torch
import torch.fx.experimental._config
from deepspeed import comm as dist

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.models.causal_lm import AnyCausalLM
from seqlen_curriculum.models.gpt2 import CausalLM
from seqlen_curriculum.models.masked_lm import MaskedLM
from seqlen_curriculum.training.telemetry import log_rank0

__all__ = ["compile_model", "compiled_parts"]


def compiled_parts(config: RunConfig, device: torch.device) -> list[str]:
    """Return what ``training.compile`` compiles of a model on ``device``: "blocks", "loss", both or nothing."""
    wanted = config.training.compile if config.training else None
    return ["blocks"] * (wanted is True) + ["loss"] * (device.type == "cuda" and wanted is not False)


def compile_model(config: RunConfig, model: CausalLM | AnyCausalLM | MaskedLM, device: torch.device) -> bool:
    """Compile the ``compiled_parts`` of a causal model; return whether anything is compiled. Call it on all ranks.

    All lengths share their graphs, and so do all blocks: one for training, one for evaluation, and one for micro-batches of
    a single row, because torch always specializes size 1. Layers with a sliding window have a few more. Without a working
    compiler, log a message and don't compile.

    Compiled blocks need more host time (an H200's host, GPT-2 117M, a micro-batch of up to 8192 tokens: 37 ms, uncompiled
    26), and took as long as uncompiled ones at 16,384 tokens.
    """
    if isinstance(model, MaskedLM):
        return False
    parts = compiled_parts(config, device)
    if model.head is None and "loss" in parts:
        parts.remove("loss")  # of logits
    if not parts:
        return False
    problem = _compiler_problem(device)
    missing = torch.tensor(float(bool(problem)), device=device)
    dist.all_reduce(missing)  # a mix would train, but with different rounding on each rank
    if missing > 0:
        log_rank0(
            f"training.compile: {problem or 'another rank has no working compiler'}; training without compilation"
        )
        return False
    log_rank0(f"training.compile: compiling {' and '.join(parts)}, so the first micro-batches take longer")
    # Otherwise torch treats equal sizes as one size: a step of length 64 in a model of hidden size 64 would get its own
    # graph.
    torch.fx.experimental._config.use_duck_shape = False
    # Layers with a sliding window have graphs of their own, and up to three times as many: rows within the window, multiples
    # of it, others. torch's limit of 8 graphs would leave the rest uncompiled.
    torch._dynamo.config.recompile_limit = max(16, torch._dynamo.config.recompile_limit)
    if model.head is not None:
        model.head.compiled = "loss" in parts
    for block in model.blocks if "blocks" in parts else ():
        block.compile(dynamic=True)
    return True


def _compiler_problem(device: torch.device) -> str:
    """Compile a function of one operation; return the error, "" if it works."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # each compiler raises its own types
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    torch._dynamo.reset()
    return ""
