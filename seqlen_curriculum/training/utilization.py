"""Utilization of the machine: model FLOPs utilization and memory. All devices are assumed equal to that of rank 0."""

from __future__ import annotations

import resource
import sys
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from seqlen_curriculum.config.cards import peak_flops
from seqlen_curriculum.config.model import ModelConfig

__all__ = ["Utilization", "card_name", "peak_memory_bytes", "precision_of", "utilization_of"]


class Utilization(NamedTuple):
    """Model FLOPs utilization: the share of the peak speed of all devices that training a model uses."""

    model: ModelConfig
    peak_flops: float | None
    """Peak speed of the devices of all ranks together, in FLOP/s; None if unknown."""

    def mfu(self, seqlen: int, tokens: int, seconds: float) -> float | None:
        """Return the MFU of a step that trained ``tokens`` tokens in sequences of ``seqlen``; None if unknown."""
        # GPT-2 117M at 1024: 855M FLOPs per token. 512 rows are 524,288 tokens, 4.48e14 FLOPs. In 1 s on two A100s with
        # 2 x 3.12e14 FLOP/s that is 0.72.
        if self.peak_flops is None or self.model.uncounted:
            return None
        return self.model.flops_per_token(seqlen) * tokens / (seconds * self.peak_flops)


def utilization_of(engine: Any, model: ModelConfig) -> Utilization:
    """Return the utilization of the devices that train ``model`` with ``engine``."""
    peak = peak_flops(card_name(), precision_of(engine))
    return Utilization(model, None if peak is None else peak * dist.get_world_size())


def card_name() -> str:
    """Return the device's model, such as "NVIDIA H100 80GB HBM3", or its type if torch doesn't report models."""
    kind = str(get_accelerator().device_name())
    return str(getattr(getattr(torch, kind, None), "get_device_name", lambda: kind)())


def precision_of(engine: Any) -> str:
    """Return the precision of the engine's matrix products: ``bf16``, ``fp16``, ``fp32`` or ``tf32``."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if engine.torch_autocast_enabled():
        return half.get(engine.torch_autocast_dtype(), "fp32")
    if engine.fp16_enabled() or engine.bfloat16_enabled():
        return "fp16" if engine.fp16_enabled() else "bf16"
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def peak_memory_bytes() -> int:
    """Return the peak memory of tensors on the device since the last call, in bytes.

    On a CPU it is the peak memory of the process since its start, which can't be reset.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = int(accelerator.max_memory_allocated())
    accelerator.reset_peak_memory_stats()
    return peak
