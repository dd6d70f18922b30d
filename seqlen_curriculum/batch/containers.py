"""Read and replace the tensors in a batch: any nesting of mappings, dataclasses, tuples, named tuples and lists."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from seqlen_curriculum.errors import DataError

Path = tuple[Any, ...]  # keys, fields and indices that lead to a value
ONE_VALUE_PER_TOKEN = {
    "input_ids",
    "labels",
    "shift_labels",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "loss_mask",
    "inputs_embeds",
}
_MUST_BE_TENSORS = {*ONE_VALUE_PER_TOKEN, "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"}


def iter_values(value: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """Yield the path and value of each leaf (no container): ``{"a": [x, 5]}`` gives ``(("a", 0), x), (("a", 1), 5)``.

    Raises DataError for a list or array whose name implies one value per token, because it would not be shortened.
    """
    parts = None if isinstance(value, Tensor) else _parts(value)
    is_named = bool(path) and path[-1] in _MUST_BE_TENSORS
    if is_named and value is not None and not isinstance(value, (Tensor, Mapping)):
        raise DataError(f"{dotted(path)}: a {type(value).__name__} can't be shortened; give a tensor")
    if parts is None:
        yield path, value
    for name, part in (parts or {}).items():
        yield from iter_values(part, (*path, name))


def iter_tensors(batch: object) -> Iterator[tuple[Path, Tensor]]:
    """Yield the path and value of each tensor in a batch: ``{"a": [x, y]}`` gives ``(("a", 0), x), (("a", 1), y)``."""
    return ((path, value) for path, value in iter_values(batch) if isinstance(value, Tensor))


def replace_values(value: Any, new_values: Mapping[Path, Any], path: Path = ()) -> Any:
    """Return a copy of ``value`` with the values at these paths replaced; containers keep their types."""
    if path in new_values:
        return new_values[path]
    parts = _parts(value)
    if parts is None:
        return value
    parts = {name: replace_values(part, new_values, (*path, name)) for name, part in parts.items()}
    if isinstance(value, tuple):
        return value._make(parts.values()) if hasattr(value, "_make") else type(value)(parts.values())
    if isinstance(value, list):
        return type(value)(parts.values())
    if isinstance(value, Mapping) and not isinstance(value, (dict, UserDict)):
        return parts
    # Copied, not constructed, so that a defaultdict keeps its factory and __post_init__ of a dataclass isn't rerun.
    new = copy.copy(value)
    for name, part in parts.items():
        if isinstance(value, (dict, UserDict)):
            new[name] = part
        else:
            object.__setattr__(new, name, part)  # a frozen dataclass refuses setattr
    return new


def _parts(value: object) -> dict[Any, Any] | None:
    """Return the contents of a container by key, field or position; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    return None


def find(tensors: Mapping[Path, Tensor], name: str, ndim: int = 2) -> Path | None:
    """Return the path of the first tensor with this name and number of axes, at any depth."""
    return next((path for path, tensor in tensors.items() if path[-1:] == (name,) and tensor.ndim == ndim), None)


def dotted(path: Path) -> str:
    """Return a path in the form that messages use: ``0.labels``."""
    return ".".join(map(str, path)) or "batch"


def misfit(path: Path, tensor: Tensor, rows: int, full: int) -> DataError:
    """Return the error for a tensor whose shape doesn't fit rows (B) of ``full`` tokens."""
    return DataError(
        f"{dotted(path)}: shape {tuple(tensor.shape)} doesn't fit a batch of {rows} rows of {full} tokens; axis 0 needs "
        f"{rows} rows (or 1, for all), and an axis with one value per token needs {full}"
    )
