"""Importing this lets torchvision be imported beside a PyTorch without CUDA.

PyPI has torchvision for CUDA only. Without CUDA its library can't be loaded, and its import fails at the two operators that
are declared here. Trainers for text import torchvision but don't use its operators.
"""

import importlib.util

import torch

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
if importlib.util.find_spec("torchvision") and torch.version.cuda is None:
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
