"""Shards of a checkpoint are read without running code that somebody put into them."""

import enum
import os
import pickle

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.training.read_shard import read_shard


class Calls:
    """An object whose pickle calls ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("mmap", [False, True])
def test_what_deepspeed_stores_is_read(tmp_path, mmap):
    path = tmp_path / "shard.pt"
    scaler = DynamicLossScaler(2**16, 2, 1000, 1, 2, dtype=torch.float16)
    stored = {
        "module": {"weight": torch.arange(6.0).reshape(2, 3)},
        "optimizer_state_dict": {"loss_scaler": scaler, "zero_stage": ZeroStageEnum.gradients},
        "param_slice_mappings": [{"weight": fragment_address(numel=6, start=2)}],
        "static": LossScaler(1.0),
        "shapes": [{"weight": torch.Size([2, 3])}],
    }
    torch.save(stored, path)
    found = read_shard(path, mmap=mmap)
    assert torch.equal(found["module"]["weight"], stored["module"]["weight"])
    assert found["optimizer_state_dict"]["loss_scaler"].__dict__ == scaler.__dict__
    assert found["optimizer_state_dict"]["zero_stage"] is ZeroStageEnum.gradients
    assert found["param_slice_mappings"] == stored["param_slice_mappings"]


def test_a_member_of_an_enumeration_as_python_3_11_0_pickles_it_is_read(tmp_path):
    torch.save({"zero_stage": Calls(getattr, ZeroStageEnum, "weights")}, tmp_path / "shard.pt")
    assert read_shard(tmp_path / "shard.pt")["zero_stage"] is ZeroStageEnum.weights


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Calls(os.system, "touch canary"), "posix.system"),
        (Calls(exec, "open('canary', 'w')"), "exec"),
        (Calls(os.mkdir, "canary"), "posix.mkdir"),
        (Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, "canary"))), "pickle.loads"),
        (Calls(getattr, LossScaler, "__init__"), "builtins.getattr"),
        (Calls(enum.Enum, "canary"), "enum"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_shard_that_calls_something_else_is_refused_by_name_and_runs_nothing(tmp_path, monkeypatch, call, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"module": {}, "extra": call}, "shard.pt")
    with pytest.raises(CheckpointError, match=rf"^shard.pt: not loaded, because it contains {name}"):
        read_shard("shard.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["shard.pt"]


def test_a_damaged_file_is_said_to_be_one(tmp_path):
    (tmp_path / "shard.pt").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match=r"damaged, or no file of torch\.save"):
        read_shard(tmp_path / "shard.pt")
