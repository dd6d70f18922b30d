"""What ``training.compile`` compiles on which device, and determinism on request, without a GPU."""

import os

import pytest
import torch
from helpers.settings import changed

from seqlen_curriculum import RunConfig
from seqlen_curriculum.training.compile import compiled_parts
from seqlen_curriculum.training.deterministic import be_deterministic

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize(
    ("device", "compile", "parts"),
    [
        (CUDA, None, ["loss"]),  # compiled blocks start slowly: docs/parallelism.md has the figures
        (CUDA, True, ["blocks", "loss"]),
        (CUDA, False, []),
        (CPU, None, []),
        (CPU, True, ["blocks"]),  # torch's linear_cross_entropy serves there
        (CPU, False, []),
    ],
)
def test_a_gpu_compiles_the_loss_and_blocks_are_compiled_on_request(tiny_run, device, compile, parts):
    config = RunConfig.from_dict(changed(tiny_run, training__compile=compile))
    assert compiled_parts(config, device) == parts


def test_determinism_is_asked_of_torch_and_of_cublas(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        be_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
