"""Peak FLOP/s of accelerators, for model FLOPs utilization (MFU; PaLM, appendix B). Needs no torch."""

from __future__ import annotations

import re

__all__ = ["PEAK_TFLOPS", "peak_flops"]


def _peaks(half: float, single: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "fp32": single}


PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # NVIDIA's data sheets: dense matrix products, accumulated in fp32. Their larger figures are for 2:4 sparsity. The
    # figures for fp32 are without TF32.
    "b200": {"bf16": 2250.0, "fp16": 2250.0},
    "h200 nvl": _peaks(835.5, 60.0),
    "h200": _peaks(989.4, 67.0),
    "gh200": _peaks(989.4, 67.0),
    "h100 nvl": _peaks(835.5, 60.0),
    "h100 pcie": _peaks(756.0, 51.0),
    "h100": _peaks(989.4, 67.0),
    "a100": _peaks(312.0, 19.5),
    "a800": _peaks(312.0, 19.5),
    "a40": _peaks(149.7, 37.4),
    "a30": _peaks(165.0, 10.3),
    "a10": _peaks(125.0, 31.2),
    "l40s": _peaks(362.0, 91.6),
    "l4": _peaks(121.0, 30.3),
    # Neither has bf16 in hardware.
    "v100 pcie": {"fp16": 112.0, "fp32": 14.0},
    "v100": {"fp16": 125.0, "fp32": 15.7},
    "t4": {"fp16": 65.0, "fp32": 8.1},
    # NVIDIA's white papers on Ampere GA102, Ada and Blackwell. These cards accumulate in fp32 at half speed.
    "rtx 5090": _peaks(209.5, 104.8),
    "rtx 4090": _peaks(165.2, 82.6),
    "rtx 3090": _peaks(71.0, 35.6),
    # AMD's data sheets, dense. An MI250X appears as two devices with half of its 383 TFLOP/s each.
    "mi325x": _peaks(1307.4, 163.4),
    "mi300x": _peaks(1307.4, 163.4),
    "mi250x": {"bf16": 191.5, "fp16": 191.5},
}
"""TFLOP/s by words of the device's name and by precision. If two entries match a name, the first one counts."""


def peak_flops(card: str, precision: str) -> float | None:
    """Return the peak FLOP/s of the device that torch names ``card``, in ``bf16``, ``fp16`` or ``fp32``; None if unknown."""
    words = set(re.split(r"[^a-z0-9]+", card.lower()))
    if words & {"mig", "laptop"}:  # a part of a card, or a smaller chip of the same name
        return None
    fitting = (peaks for name, peaks in PEAK_TFLOPS.items() if words.issuperset(name.split()))
    tflops = next(fitting, {}).get(precision)
    return None if tflops is None else tflops * 1e12
