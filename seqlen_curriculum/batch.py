"""Shorten batches to the step's sequence length, in any container that a loader yields: truncate rows or segment them.

The full length is that of ``input_ids``, ``tokens`` or ``labels``, else of the first 2-D tensor. The sequence axes of a
tensor are the axes of that size. Axis 0 holds the rows (or 1, for all of them) and is never shortened, so a batch with
``B == S`` is not ambiguous:

- 2-D ``(B, S)``: axis 1.
- 3-D: the one axis of size S, as in ``(B, S, H)`` and ``(B, 1, S)``. In ``(B, S, S)``: both axes of a mask (a bool tensor,
  or one with mask or bias in its name), axis 1 of ``...embeds``, and an error for any other tensor.
- 4-D masks ``(B, heads or 1, S or 1, S)``, with mask or bias in their name or with one head: those of the last two axes
  that have size S.
- ``(3, B, S)`` named ``position_ids``: axis 2.
- Without such an axis the tensor is kept unchanged, unless its name implies one value per token, which is an error.

Shapes: B rows, S full length, s the step's length, K segments per row (1 if rows are truncated), H any other size.
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

__all__ = ["IGNORED", "RowColumns", "iter_tensors", "replace_tensors", "set_batch_sequence_length"]

Batch = TypeVar("Batch")
Path = tuple[Any, ...]  # keys, fields and indices that lead to a tensor
IGNORED = -100
"""The label that the losses of torch and Hugging Face ignore."""
_ONE_VALUE_PER_TOKEN = {
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
    """Return a new batch with ``seqlen`` tokens per row, and its number of target tokens (named after Composer's function).

    ``batch`` is a tensor or any nesting of mappings, dataclasses, tuples, named tuples and lists. A mapping that is neither
    a dict nor a ``UserDict`` is returned as a dict. Tensors with at most one axis and other values are kept unchanged. With
    ``seqlen >= S`` the new container holds the same tensors. Shorten batches on the CPU: counting targets synchronizes a
    GPU.

    ``truncate=True`` keeps the first ``seqlen`` tokens of each row. If a 2-D ``attention_mask`` shows padding on the left,
    the tokens are taken after the padding. With ``preserve_end_of_sequence`` the row's last real token replaces the last
    kept one.

    ``truncate=False`` cuts each row into ``S // seqlen`` rows, all of row 0 first. The remainder is dropped: left padding
    if there is enough, else tokens at the end. Masks keep the block of each segment, position ids restart at 0, and values
    per row are repeated.

    ``labels_shifted=True``: the label in a column is what that column predicts (shifted by the loader, or masked LM).
    ``False``: the model shifts the labels, as Hugging Face's causal models do, so the first label of each row and of each
    segment is not a target. Labels of -100 are never targets. Without 2-D ``labels`` every column counts as a target.

    Raises ConfigError for an argument, and DataError naming a tensor whose sequence axes are ambiguous.
    """
    if isinstance(seqlen, bool) or not isinstance(seqlen, Integral) or seqlen < 1:
        raise ConfigError(f"seqlen: {seqlen!r} is not valid: give a whole number of tokens, 1 or more")
    if preserve_end_of_sequence and not truncate:
        raise ConfigError("preserve_end_of_sequence: segments can't keep a row's end; use it with truncate=True only")
    tensors = dict(iter_tensors(batch))
    token_ids = _find_token_ids(tensors, batch)
    if seqlen < tensors[token_ids].shape[1]:
        columns = RowColumns.choose(tensors, token_ids, int(seqlen), truncate, preserve_end_of_sequence)
        tensors = {path: columns.shorten(path, tensor) for path, tensor in tensors.items()}
    labels = _find(tensors, "labels")
    is_target = torch.ones_like(tensors[token_ids]) if labels is None else tensors[labels] != IGNORED  # (B * K, s)
    first_target = 0 if labels_shifted else 1
    return replace_tensors(batch, tensors), int(is_target[:, first_target:].sum())


def iter_tensors(value: object, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield the path and value of each tensor in a batch: ``{"a": [x, y]}`` gives ``(("a", 0), x), (("a", 1), y)``.

    Raises DataError for a list or array whose name implies one value per token, because it would not be shortened.
    """
    if isinstance(value, Tensor):
        yield path, value
    elif path and path[-1] in _ONE_VALUE_PER_TOKEN and value is not None and not isinstance(value, Mapping):
        raise DataError(f"{_dotted(path)}: a {type(value).__name__} is not cut; give a tensor")
    for name, part in (_parts(value) or {}).items():
        yield from iter_tensors(part, (*path, name))


def replace_tensors(value: Any, tensors: Mapping[Path, Tensor], path: Path = ()) -> Any:
    """Return ``value`` with its tensors replaced by ``tensors`` and its containers copied, with the same types."""
    if isinstance(value, Tensor):
        return tensors[path]
    parts = _parts(value)
    if parts is None:
        return value
    parts = {name: replace_tensors(part, tensors, (*path, name)) for name, part in parts.items()}
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


def _find(tensors: Mapping[Path, Tensor], name: str) -> Path | None:
    """Return the path of the first 2-D tensor with this name, at any depth."""
    return next((path for path, tensor in tensors.items() if path[-1:] == (name,) and tensor.ndim == 2), None)


def _find_token_ids(tensors: Mapping[Path, Tensor], batch: object) -> Path:
    """Return the path of the tensor (B, S) that defines the shape of the batch."""
    for name in ("input_ids", "tokens", "labels"):
        path = _find(tensors, name)
        if path is not None:
            return path
    for path, tensor in tensors.items():
        if tensor.ndim == 2:
            return path
    raise DataError(
        f"batch: no tensor (rows, seqlen) in this {type(batch).__name__}; give its token ids, such as input_ids"
    )


@dataclass(frozen=True)
class RowColumns:
    """The columns that each row keeps.

    Position ids are taken from ``window``, which is ``kept`` without the gap before a preserved end.
    """

    full: int
    """Full length S."""
    segmenting: bool
    kept: Tensor
    """Columns of each segment, (B, K, s)."""
    window: Tensor
    """Columns of their position ids, (B, K, s)."""

    @classmethod
    def choose(
        cls, tensors: Mapping[Path, Tensor], token_ids: Path, seqlen: int, truncate: bool, keep_end: bool
    ) -> RowColumns:
        """Choose the columns of each row, after its left padding if the batch has a 2-D ``attention_mask``."""
        rows, full = tensors[token_ids].shape
        segments = 1 if truncate else full // seqlen
        first, last = _real_columns(tensors, rows, full)
        # S=8 and s=3 give 2 segments, 6 columns in all. A row of 7 tokens after one column of padding starts at column 1
        # and loses its last token. A row of 5 tokens would start at 3, but 6 columns only fit from 8 - 6 = 2.
        start = first.clamp(max=full - segments * seqlen)  # (B)
        window = start[:, None] + torch.arange(segments * seqlen)  # (B, K * s)
        kept = window.clone()
        if keep_end:
            kept[:, -1] = torch.maximum(kept[:, -1], last)
        shape = (rows, segments, seqlen)
        return cls(full, not truncate, kept.view(shape), window.view(shape))

    def shorten(self, path: Path, tensor: Tensor) -> Tensor:
        """Return the tensor with its sequence axes shortened, (B, ...) to (B * K, ...)."""
        if path[-1:] == ("position_ids",):
            return self.shorten_positions(path, tensor)
        axes = self.sequence_axes(path, tensor)
        if axes:
            return self.take(tensor, axes, self.kept)
        rows, segments, _ = self.kept.shape
        has_row_values = tensor.ndim > 0 and len(tensor) == rows
        return tensor.repeat_interleave(segments, 0) if has_row_values and segments > 1 else tensor

    def shorten_positions(self, path: Path, tensor: Tensor) -> Tensor:
        """Return shortened position ids, which restart at 0 in each segment.

        Raises DataError for segments of shape (3, B, S): time, height and width in vision models can't restart.
        """
        sections_first = tensor.ndim == 3 and tensor.shape[1:] == (len(self.kept), self.full)
        if sections_first and self.segmenting:
            raise DataError(
                f"{_dotted(path)}: positions of shape {tuple(tensor.shape)} can't restart; use truncate=True"
            )
        if sections_first:
            return self.take(tensor.transpose(0, 1), (2,), self.window).transpose(0, 1).contiguous()
        axes = self.sequence_axes(path, tensor)
        positions = self.take(tensor, axes, self.window) if axes else tensor
        if not (self.segmenting and axes == (1,) and tensor.ndim == 2):
            return positions
        # Only the positions before the first packed document boundary in a segment are shifted: 3 4 5 0 1 becomes
        # 0 1 2 0 1.
        falls = positions[:, 1:] < positions[:, :-1]  # (B * K, s - 1)
        before_fall = torch.cat([torch.zeros_like(falls[:, :1]), falls], 1).cumsum(1) == 0  # (B * K, s)
        return torch.where(before_fall, positions - positions[:, :1], positions)

    def sequence_axes(self, path: Path, tensor: Tensor) -> tuple[int, ...]:
        """Return the sequence axes by the rules at the top of this file. Raises DataError if they are ambiguous."""
        rows, name = len(self.kept), str(path[-1]) if path else ""
        axes = tuple(axis for axis in range(1, tensor.ndim) if tensor.shape[axis] == self.full)
        is_mask = tensor.dtype == torch.bool or "mask" in name or "bias" in name
        is_mask |= tensor.ndim == 4 and tensor.shape[1] == 1
        # Another axis may also have size S: the features of embeddings (B, S, H), the heads of a mask (B, heads, S, S).
        if tensor.ndim == 3 and name.endswith("embeds"):
            axes = tuple(axis for axis in axes if axis == 1)
        if tensor.ndim == 4 and is_mask:
            axes = tuple(axis for axis in axes if axis > 1)
        has_other_rows = bool(axes) and len(tensor) not in (1, rows)
        lacks_sequence = not axes and tensor.ndim > 1 and name in _ONE_VALUE_PER_TOKEN
        if has_other_rows or lacks_sequence:
            raise _misfit(path, tensor, rows, self.full)
        is_open = tensor.ndim > 4 or (not is_mask and (axes == (1, 2) or tensor.ndim == 4))
        if axes and is_open:
            raise DataError(
                f"{_dotted(path)}: shape {tuple(tensor.shape)} doesn't show which axes are the sequence of {self.full} "
                "tokens; if it is a mask, name it '..._mask', else shorten it yourself"
            )
        return axes

    def take(self, tensor: Tensor, axes: tuple[int, ...], columns: Tensor) -> Tensor:
        """Return a copy with only ``columns`` (B, K, s) of one axis, or of both axes of a mask."""
        rows_alike = columns.shape[1] == 1 and bool((columns == columns[0]).all())
        if len(tensor) == 1 and rows_alike:
            columns = columns[:1]  # one mask for all rows stays one
        columns = columns.to(tensor.device)
        front = tuple(range(1, 1 + len(axes)))
        along = tensor.expand(len(columns), *tensor.shape[1:]).movedim(axes, front)  # (B, S, ...) or (B, S, S, ...)
        row = torch.arange(len(columns), device=tensor.device)[:, None, None]  # (B, 1, 1)
        if len(axes) == 1:
            taken = along[row, columns]  # (B, K, s, ...)
        else:
            taken = along[row[..., None], columns[..., :, None], columns[..., None, :]]  # (B, K, s, s, ...)
        return taken.flatten(0, 1).movedim(front, axes).contiguous()


def _real_columns(tensors: Mapping[Path, Tensor], rows: int, full: int) -> tuple[Tensor, Tensor]:
    """Return the columns of each row's first and last token, (B) each: 0 and S - 1 without a 2-D mask."""
    path = _find(tensors, "attention_mask")
    if path is None:
        return torch.zeros(rows, dtype=torch.long), torch.full((rows,), full - 1)
    if tensors[path].shape not in ((1, full), (rows, full)):
        raise _misfit(path, tensors[path], rows, full)
    padding = tensors[path].cpu().eq(0).long().expand(rows, full)  # (B, S)
    # The running product of 1 1 0 0 1 is 1 1 0 0 0, whose sum is the number of leading ones: 2.
    return padding.cumprod(1).sum(1), full - 1 - padding.flip(1).cumprod(1).sum(1)


def _misfit(path: Path, tensor: Tensor, rows: int, full: int) -> DataError:
    return DataError(
        f"{_dotted(path)}: shape {tuple(tensor.shape)} doesn't fit a batch of {rows} rows of {full} tokens; axis 0 needs "
        f"{rows} rows (or 1, for all), and an axis with one value per token needs {full}"
    )


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "batch"
