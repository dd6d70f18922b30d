"""Bit-identical steps on a GPU."""

from __future__ import annotations

import os

import torch

__all__ = ["be_deterministic"]


def be_deterministic() -> None:
    """Let this process use torch's deterministic algorithms alone; call it before anything is computed on a GPU.

    An operation without such an algorithm then raises RuntimeError.
    """
    # cuBLAS reads this once, when its first handle is made. 8 buffers of 4096 KiB are what torch asks for.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
