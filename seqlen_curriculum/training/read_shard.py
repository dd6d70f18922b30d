"""Read the files that DeepSpeed's engines pickle into a checkpoint, without running code that somebody put into them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from seqlen_curriculum.errors import CheckpointError

__all__ = ["read_shard"]


def read_shard(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Return the content of a ``.pt`` file: tensors, and the few classes that DeepSpeed stores beside them.

    A pickle may name any function, which loading it would call. Raises CheckpointError for a file with another name.
    """
    try:
        with torch.serialization.safe_globals(_STORED):
            content: dict[str, Any] = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|function ([\w.]+)", str(error))
        if found is None:
            raise CheckpointError(f"{path}: damaged, or no file of torch.save") from None
        raise CheckpointError(
            f"{path}: not loaded, because it contains {found[1] or found[2]}, which no checkpoint of this package does; "
            "loading it could run code of whoever made it"
        ) from None
    return content


def _member(kind: Any, name: str) -> Any:
    """Return a member of DeepSpeed's enumeration of stages, as ``getattr`` does in pickles of Python 3.11."""
    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError(f"function builtins.getattr of {kind} and {name!r}")
    return ZeroStageEnum[name]


_STORED = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, (_member, "builtins.getattr")]
