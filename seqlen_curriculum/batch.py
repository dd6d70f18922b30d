"""A batch cut to today's length, in whatever container the loader gives it: each row truncated, or cut into segments.

A tensor's sequence axes are those whose size is the full length, which is that of ``input_ids``, ``tokens`` or
``labels``, else of the first 2-D tensor. Axis 0 holds the rows (or 1, for all of them) and is never cut, so that
``B == S`` is no riddle:

- 2-D ``(B, S)``: axis 1.
- 3-D: the one axis of that size, as in ``(B, S, H)`` and ``(B, 1, S)``; both axes of a mask ``(B, S, S)``, which is a tensor
  of bools or one whose name says mask or bias; axis 1 of ``...embeds``; any other ``(B, S, S)`` is an error.
- 4-D: masks ``(B, heads or 1, S or 1, S)``, named so or with one head: the last two axes, where they have that size.
- ``(3, B, S)`` named ``position_ids``: axis 2.
- No such axis: left as it is; an error where the name promises one value a token.

Shapes: B rows, S full length, s today's, K segments a row (1 where rows are truncated), H anything else.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from seqlen_curriculum.errors import ConfigError, DataError

__all__ = ["set_batch_sequence_length"]

Batch = TypeVar("Batch")
Path = tuple[Any, ...]  # keys, fields and positions that lead to a tensor
IGNORED = -100
"""The label that torch's and Hugging Face's losses leave out."""
_ONE_VALUE_A_TOKEN = {
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "loss_mask",
    "inputs_embeds",
}


def set_batch_sequence_length(
    batch: Batch,
    seqlen: int,
    truncate: bool = True,
    preserve_end_of_sequence: bool = False,
    *,
    labels_shifted: bool = True,
) -> tuple[Batch, int]:
    """A new batch of ``seqlen`` tokens a row, and its number of target tokens; Composer's function, without its faults.

    ``batch`` is a tensor or any nesting of mappings (a kind that is neither a dict nor a ``UserDict`` comes back as a
    dict), dataclasses, tuples, named tuples and lists; tensors of up to one axis and other values stay as they are. From
    ``seqlen >= S`` on, the new container holds the same tensors. Shortening on the CPU: counting targets waits for a GPU.

    ``truncate``: each row's first ``seqlen`` tokens. A 2-D ``attention_mask`` tells where a row is padded on the left; such
    a row is cut behind its padding, so it keeps the tokens it would keep if it were padded on the right. With
    ``preserve_end_of_sequence`` the last of them gives way to the row's last real token.

    ``truncate=False``: each row as ``S // seqlen`` rows of its own, row 0's first; what is over is dropped, left padding
    before tokens at the end. Masks keep each segment's own block, position ids restart at 0, values a row are repeated.

    ``labels_shifted=True``: the label in a column is what that column predicts (moved into place already, or masked LM).
    ``False``: the model moves them, as Hugging Face's causal models do, so the first label of each row, and of each
    segment, is no target. Labels of -100 never are; where there is no 2-D ``labels``, all columns count as if labelled.

    Raises ConfigError for the arguments, DataError naming the tensor whose axes can't be known.
    """
    _check_arguments(seqlen, truncate, preserve_end_of_sequence)
    tensors = dict(_tensors(batch, ()))
    reference = _reference(tensors, batch)
    if seqlen < tensors[reference].shape[1]:
        cut = _cut(tensors, reference, int(seqlen), truncate, preserve_end_of_sequence)
        tensors = {path: cut(path, tensor) for path, tensor in tensors.items()}
    return _rebuilt(batch, (), tensors), _targets(tensors, tensors[reference], labels_shifted)


def _check_arguments(seqlen: int, truncate: bool, preserve_end_of_sequence: bool) -> None:
    if isinstance(seqlen, bool) or not isinstance(seqlen, Integral) or seqlen < 1:
        raise ConfigError(f"seqlen: {seqlen!r} is not valid: give a whole number of tokens, 1 or more")
    if preserve_end_of_sequence and not truncate:
        raise ConfigError("preserve_end_of_sequence: segments end where they are cut; use it with truncate=True only")


def _parts(value: object) -> dict[Any, Any] | None:
    """What a container holds, by key, field or position; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    return None


def _tensors(value: object, path: Path) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif path and path[-1] in _ONE_VALUE_A_TOKEN and value is not None and not isinstance(value, Mapping):
        raise DataError(f"{_told(path)}: a {type(value).__name__} is not cut; give a tensor")
    for name, part in (_parts(value) or {}).items():
        yield from _tensors(part, (*path, name))


def _rebuilt(value: Any, path: Path, tensors: Mapping[Path, Tensor]) -> Any:
    """``value`` with its tensors replaced, its containers copied."""
    if isinstance(value, Tensor):
        return tensors[path]
    parts = _parts(value)
    if parts is None:
        return value
    return _with_parts(value, {name: _rebuilt(part, (*path, name), tensors) for name, part in parts.items()})


def _with_parts(value: Any, parts: dict[Any, Any]) -> Any:
    """A container of ``value``'s kind that holds ``parts``."""
    if isinstance(value, tuple):
        return value._make(parts.values()) if hasattr(value, "_make") else type(value)(parts.values())
    if isinstance(value, list):
        return type(value)(parts.values())
    if isinstance(value, Mapping) and not isinstance(value, (dict, UserDict)):
        return parts
    new = copy.copy(value)
    for name, part in parts.items():
        if isinstance(value, (dict, UserDict)):
            new[name] = part
        else:
            object.__setattr__(new, name, part)  # a frozen dataclass refuses setattr
    return new


def _named(tensors: Mapping[Path, Tensor], name: str) -> Path | None:
    """The first 2-D tensor of this name, at any depth."""
    return next((path for path, tensor in tensors.items() if path[-1:] == (name,) and tensor.ndim == 2), None)


def _reference(tensors: Mapping[Path, Tensor], batch: object) -> Path:
    """The tensor (B, S) that tells rows and full length."""
    first = next((path for path, tensor in tensors.items() if tensor.ndim == 2), None)
    found = next(filter(None, (_named(tensors, name) for name in ("input_ids", "tokens", "labels"))), first)
    if found is None:
        raise DataError(
            f"batch: no tensor (rows, seqlen) in this {type(batch).__name__}; give its token ids, such as input_ids"
        )
    return found


def _targets(tensors: Mapping[Path, Tensor], reference: Tensor, labels_shifted: bool) -> int:
    path = _named(tensors, "labels")
    counted = torch.ones_like(reference) if path is None else tensors[path] != IGNORED
    return int(counted[:, 0 if labels_shifted else 1 :].sum())


def _cut(tensors: Mapping[Path, Tensor], reference: Path, seqlen: int, truncate: bool, keep_end: bool) -> _Cut:
    """Which columns each row keeps."""
    rows, full = tensors[reference].shape
    segments = 1 if truncate else full // seqlen
    left, end = _real_columns(tensors, rows, full)
    window = left.clamp(max=full - segments * seqlen)[:, None] + torch.arange(segments * seqlen)
    kept = window.clone()
    if keep_end:
        kept[:, -1] = torch.maximum(kept[:, -1], end)
    shape = (rows, segments, seqlen)
    return _Cut(full, not truncate, kept.view(shape), window.view(shape))


def _real_columns(tensors: Mapping[Path, Tensor], rows: int, full: int) -> tuple[Tensor, Tensor]:
    """Columns (B,) and (B,) of each row's first and last token; all are tokens where no 2-D mask tells otherwise."""
    path = _named(tensors, "attention_mask")
    if path is None:
        return torch.zeros(rows, dtype=torch.long), torch.full((rows,), full - 1)
    if tensors[path].shape not in ((1, full), (rows, full)):
        raise _misfit(path, tensors[path], rows, full)
    padding = tensors[path].cpu().eq(0).long().expand(rows, full)  # (B, S)
    return padding.cumprod(1).sum(1), full - 1 - padding.flip(1).cumprod(1).sum(1)


@dataclass(frozen=True)
class _Cut:
    """Takes ``columns`` (B, K, s) of each row; position ids come from ``window``, which has no gap before a kept end."""

    full: int
    segmenting: bool
    columns: Tensor
    window: Tensor

    def __call__(self, path: Path, tensor: Tensor) -> Tensor:
        """The cut tensor, (B, ...) to (B * K, ...)."""
        if path[-1:] == ("position_ids",):
            return self._positions(path, tensor)
        axes = self._axes(path, tensor)
        if axes:
            return self._take(tensor, axes, self.columns)
        repeats = self.columns.shape[1] if tensor.ndim and len(tensor) == len(self.columns) else 1
        return tensor.repeat_interleave(repeats, 0) if repeats > 1 else tensor

    def _positions(self, path: Path, tensor: Tensor) -> Tensor:
        sections_first = tensor.ndim == 3 and tensor.shape[1:] == (len(self.columns), self.full)
        if sections_first and self.segmenting:
            raise DataError(f"{_told(path)}: positions of shape {_shape(tensor)} can't restart; use truncate=True")
        if sections_first:
            return self._take(tensor.transpose(0, 1), (2,), self.window).transpose(0, 1).contiguous()
        axes = self._axes(path, tensor)
        taken = self._take(tensor, axes, self.window) if axes else tensor
        return _restarted(taken) if axes == (1,) and tensor.ndim == 2 and self.segmenting else taken

    def _axes(self, path: Path, tensor: Tensor) -> tuple[int, ...]:
        """Sequence axes by the rules at the top of this file."""
        rows, name = len(self.columns), str(path[-1]) if path else ""
        found = tuple(axis for axis in range(1, tensor.ndim) if tensor.shape[axis] == self.full)
        mask = tensor.dtype == torch.bool or "mask" in name or "bias" in name
        if tensor.ndim == 3 and name.endswith("embeds") and found:
            found = (1,) if 1 in found else ()
        mask |= tensor.ndim == 4 and tensor.shape[1] == 1
        if tensor.ndim == 4 and mask:
            found = tuple(axis for axis in found if axis > 1)  # there may be as many heads as tokens
        if (found and len(tensor) not in (1, rows)) or (tensor.ndim > 1 and not found and name in _ONE_VALUE_A_TOKEN):
            raise _misfit(path, tensor, rows, self.full)
        if (found == (1, 2) and not mask) or (tensor.ndim == 4 and found and not mask) or (tensor.ndim > 4 and found):
            raise DataError(
                f"{_told(path)}: {_shape(tensor)} leaves open which axes are the sequence of {self.full} tokens; if it is a "
                "mask, name it so ('..._mask'), else cut it yourself"
            )
        return found

    def _take(self, tensor: Tensor, axes: tuple[int, ...], columns: Tensor) -> Tensor:
        """``columns`` of one axis, or of both axes of a mask; always a copy."""
        alike = len(tensor) == 1 and columns.shape[1] == 1 and bool((columns == columns[0]).all())
        columns = (columns[:1] if alike else columns).to(tensor.device)  # one mask for all rows stays one
        front = tuple(range(1, 1 + len(axes)))
        along = tensor.expand(len(columns), *tensor.shape[1:]).movedim(axes, front)  # (B, S, ...) or (B, S, S, ...)
        row = torch.arange(len(columns), device=tensor.device)[:, None, None]
        if len(axes) == 1:
            taken = along[row, columns]  # (B, K, s, ...)
        else:
            taken = along[row[..., None], columns[..., :, None], columns[..., None, :]]  # (B, K, s, s, ...)
        return taken.flatten(0, 1).movedim(front, axes).contiguous()


def _restarted(positions: Tensor) -> Tensor:
    """Position ids (B * K, s) counted from 0, up to where they restart by themselves, as packed documents do."""
    fell = positions[:, 1:] < positions[:, :-1]
    continued = torch.cat([torch.zeros_like(fell[:, :1]), fell], 1).cumsum(1) == 0
    return torch.where(continued, positions - positions[:, :1], positions)


def _misfit(path: Path, tensor: Tensor, rows: int, full: int) -> DataError:
    return DataError(
        f"{_told(path)}: {_shape(tensor)} doesn't fit a batch of {rows} rows of {full} tokens; give axis 0 {rows} rows "
        f"(or 1, for all), and {full} values where there is one a token"
    )


def _told(path: Path) -> str:
    return ".".join(map(str, path)) or "batch"


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
