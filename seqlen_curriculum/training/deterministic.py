"""Deterministic algorithms, for bit-identical steps on a GPU."""

from __future__ import annotations

import os

import torch

__all__ = ["be_deterministic"]


def be_deterministic() -> None:
    """Enable only torch's deterministic algorithms in this process; call it before any computation on a GPU.

    Operations without a deterministic algorithm then raise RuntimeError.
    """
    # cuBLAS reads this when its first handle is created. torch requires 8 buffers of 4096 KiB.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
