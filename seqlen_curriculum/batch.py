"""Batches shortened to the step's sequence length, in any container a loader gives: rows truncated or cut into segments.

A tensor's sequence axes are those whose size is the full length, which is that of ``input_ids``, ``tokens`` or
``labels``, else of the first 2-D tensor. Axis 0 holds the rows (or 1, for all of them) and is never shortened, so a batch
with ``B == S`` is not ambiguous:

- 2-D ``(B, S)``: axis 1.
- 3-D: the one axis of that size, as in ``(B, S, H)`` and ``(B, 1, S)``; both axes of a mask ``(B, S, S)``, which is a tensor
  of bools or one with mask or bias in its name; axis 1 of ``...embeds``; any other ``(B, S, S)`` is an error.
- 4-D: masks ``(B, heads or 1, S or 1, S)``, named so or with one head: the last two axes, where they have that size.
- ``(3, B, S)`` named ``position_ids``: axis 2.
- No such axis: the tensor is kept unchanged; a name that promises one value per token is an error.

Shapes: B rows, S full length, s the step's, K segments per row (1 where rows are truncated), H anything else.
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
Path = tuple[Any, ...]  # keys, fields and positions that lead to a tensor
IGNORED = -100
"""The label that torch's and Hugging Face's losses leave out."""
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
    """Return a new batch of ``seqlen`` tokens per row, and its number of target tokens (named after Composer's function).

    ``batch`` is a tensor or any nesting of mappings (a kind that is neither a dict nor a ``UserDict`` comes back as a
    dict), dataclasses, tuples, named tuples and lists. Tensors of up to one axis and other values stay as they are. With
    ``seqlen >= S`` the new container holds the same tensors. Shorten batches on the CPU: counting targets waits for a GPU.

    ``truncate=True`` keeps each row's first ``seqlen`` tokens. A 2-D ``attention_mask`` shows where a row is padded on the
    left. Such a row is cut behind its padding, so it keeps the tokens it would keep if it were padded on the right. With
    ``preserve_end_of_sequence`` the row's last real token replaces the last of them.

    ``truncate=False`` makes ``S // seqlen`` rows of each row, row 0's first. The remainder is dropped, left padding before
    tokens at the end. Masks keep each segment's own block, position ids restart at 0, values per row are repeated.

    ``labels_shifted=True``: the label in a column is what that column predicts (shifted by the loader, or masked LM).
    ``False``: the model shifts them, as Hugging Face's causal models do, so the first label of each row, and of each
    segment, is no target. Labels of -100 never are. Without 2-D ``labels``, all columns count as if labelled.

    Raises ConfigError for the arguments, DataError naming the tensor whose axes can't be known.
    """
    if isinstance(seqlen, bool) or not isinstance(seqlen, Integral) or seqlen < 1:
        raise ConfigError(f"seqlen: {seqlen!r} is not valid: give a whole number of tokens, 1 or more")
    if preserve_end_of_sequence and not truncate:
        raise ConfigError("preserve_end_of_sequence: segments end where they are cut; use it with truncate=True only")
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
    """Yield the tensors in a batch and the paths to them: ``{"a": [x, y]}`` gives ``(("a", 0), x), (("a", 1), y)``.

    Raises DataError for a list or array under a name that promises one value per token: it would stay at full length.
    """
    if isinstance(value, Tensor):
        yield path, value
    elif path and path[-1] in _ONE_VALUE_PER_TOKEN and value is not None and not isinstance(value, Mapping):
        raise DataError(f"{_dotted(path)}: a {type(value).__name__} is not cut; give a tensor")
    for name, part in (_parts(value) or {}).items():
        yield from iter_tensors(part, (*path, name))


def replace_tensors(value: Any, tensors: Mapping[Path, Tensor], path: Path = ()) -> Any:
    """Return ``value`` with the tensors at their paths replaced and its containers copied, of the same kinds."""
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
    # Copied and filled, not constructed: a defaultdict keeps its factory, a dataclass doesn't run __post_init__ again.
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
    """Return the path of the first 2-D tensor of this name, at any depth."""
    return next((path for path, tensor in tensors.items() if path[-1:] == (name,) and tensor.ndim == 2), None)


def _find_token_ids(tensors: Mapping[Path, Tensor], batch: object) -> Path:
    """Return the path of the tensor (B, S) whose shape is that of the batch."""
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
    """The columns that each row keeps, and how a tensor is shortened to them.

    Position ids are taken from ``window``: it is ``kept`` without the gap before a preserved end.
    """

    full: int
    """S."""
    segmenting: bool
    kept: Tensor
    """(B, K, s)."""
    window: Tensor
    """(B, K, s)."""

    @classmethod
    def choose(
        cls, tensors: Mapping[Path, Tensor], token_ids: Path, seqlen: int, truncate: bool, keep_end: bool
    ) -> RowColumns:
        """Choose the columns of each row by the batch's 2-D ``attention_mask``, if it has one."""
        rows, full = tensors[token_ids].shape
        segments = 1 if truncate else full // seqlen
        first, last = _real_columns(tensors, rows, full)
        # S=8 and s=3 make 2 segments of 6 columns in all. A row of 7 tokens behind one column of padding starts at
        # column 1 and loses its last token. One of 5 tokens would start at 3, but only 8 - 6 = 2 leaves room for 6.
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

        Those of shape (3, B, S), time, height and width in models of images, can't restart.
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
        # Counted from 0 up to where they fall by themselves, as they do between packed documents: a segment with
        # positions 3 4 5 0 1 becomes 0 1 2 0 1.
        falls = positions[:, 1:] < positions[:, :-1]  # (B * K, s - 1)
        before_fall = torch.cat([torch.zeros_like(falls[:, :1]), falls], 1).cumsum(1) == 0  # (B * K, s)
        return torch.where(before_fall, positions - positions[:, :1], positions)

    def sequence_axes(self, path: Path, tensor: Tensor) -> tuple[int, ...]:
        """Return the sequence axes by the rules at the top of this file. Raises DataError where they leave it open."""
        rows, name = len(self.kept), str(path[-1]) if path else ""
        axes = tuple(axis for axis in range(1, tensor.ndim) if tensor.shape[axis] == self.full)
        is_mask = tensor.dtype == torch.bool or "mask" in name or "bias" in name
        is_mask |= tensor.ndim == 4 and tensor.shape[1] == 1
        # Axes may have the size S by chance: the features of embeddings (B, S, H), the heads of a mask (B, heads, S, S).
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
                f"{_dotted(path)}: shape {tuple(tensor.shape)} leaves open which axes are the sequence of {self.full} "
                "tokens; if it is a mask, name it so ('..._mask'), else cut it yourself"
            )
        return axes

    def take(self, tensor: Tensor, axes: tuple[int, ...], columns: Tensor) -> Tensor:
        """Return a copy with ``columns`` (B, K, s) of one axis, or of both axes of a mask."""
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
    """Return the columns (B) of each row's first and (B) of its last token: 0 and S - 1 without a 2-D mask."""
    path = _find(tensors, "attention_mask")
    if path is None:
        return torch.zeros(rows, dtype=torch.long), torch.full((rows,), full - 1)
    if tensors[path].shape not in ((1, full), (rows, full)):
        raise _misfit(path, tensors[path], rows, full)
    padding = tensors[path].cpu().eq(0).long().expand(rows, full)  # (B, S)
    # The running product of 1 1 0 0 1 is 1 1 0 0 0, whose sum is the number of ones that it starts with: 2.
    return padding.cumprod(1).sum(1), full - 1 - padding.flip(1).cumprod(1).sum(1)


def _misfit(path: Path, tensor: Tensor, rows: int, full: int) -> DataError:
    return DataError(
        f"{_dotted(path)}: shape {tuple(tensor.shape)} doesn't fit a batch of {rows} rows of {full} tokens; give axis 0 "
        f"{rows} rows (or 1, for all), and {full} values where there is one per token"
    )


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "batch"
