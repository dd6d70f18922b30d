"""When ``training.compile`` is on where the file leaves it open, and determinism on request, without a GPU."""

import copy
import os

import pytest
import torch

from seqlen_curriculum import RunConfig
from seqlen_curriculum.training.compile import is_compiled
from seqlen_curriculum.training.deterministic import be_deterministic

CUDA = torch.device("cuda:0")


def decide(tiny_run, device=CUDA, compile=None, method="truncate", **sections):
    run = {**copy.deepcopy(tiny_run), **sections}
    run["curriculum_learning"]["method"] = method
    if compile is not None:
        run["training"]["compile"] = compile
    return is_compiled(RunConfig.from_dict(run), device)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_gpu_compiles_unless_the_file_says_otherwise(tiny_run, stage):
    zero = {"zero_optimization": {"stage": stage}}
    assert decide(tiny_run, **zero)
    assert decide(tiny_run, method="segment", **zero)
    assert not decide(tiny_run, compile=False, **zero)


def test_a_cpu_compiles_only_on_request(tiny_run):
    cpu = torch.device("cpu")
    assert not decide(tiny_run, cpu)
    assert decide(tiny_run, cpu, compile=True)


@pytest.mark.parametrize(
    "sections",
    [
        {"method": "window"},
        {"zero_optimization": {"stage": 3}},
        {"pipeline": {"stages": 2}},
        {"tensor_parallel": {"autotp_size": 2}},
        {"sequence_parallel_size": 2},
    ],
    ids=lambda sections: next(iter(sections)),
)
def test_what_compiles_badly_or_is_not_tested_compiles_only_on_request(tiny_run, sections):
    assert not decide(tiny_run, **sections)


def test_determinism_is_asked_of_torch_and_of_cublas(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        be_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
