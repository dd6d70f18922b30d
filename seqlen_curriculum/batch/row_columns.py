"""Choose the columns that each row of a batch keeps, find the sequence axes of its tensors and shorten them.

Shapes: B rows, S full length, s the step's length, K segments per row (1 if rows are truncated), H any other size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from seqlen_curriculum.batch.containers import ONE_VALUE_PER_TOKEN, Path, dotted, find, misfit
from seqlen_curriculum.errors import DataError


@dataclass(frozen=True)
class RowColumns:
    """The columns that each row keeps.

    Position ids are taken from ``window``, which is ``kept`` without the gap before a preserved end.
    """

    rows: int
    """B."""
    full: int
    """Full length S."""
    segmenting: bool
    kept: Tensor
    """(B, K, s), or (1, K, s) if all rows keep the same columns."""
    window: Tensor
    """(B, K, s) or (1, K, s). The same tensor as ``kept`` if there is no gap."""

    @classmethod
    def choose(
        cls, tensors: Mapping[Path, Tensor], token_ids: Path, seqlen: int, truncate: bool, keep_end: bool
    ) -> RowColumns:
        """Choose the columns of each row, after its left padding if the batch has a 2-D ``attention_mask``."""
        rows, full = tensors[token_ids].shape
        segments = 1 if truncate else full // seqlen
        mask = _padding_mask(tensors, rows, full)
        # S=8 and s=3 give 2 segments, 6 columns in all. A row of 7 tokens after one column of padding starts at column 1
        # and loses its last token. A row of 5 tokens would start at 3, but 6 columns only fit from 8 - 6 = 2.
        start = _once(_first_real_column(mask).clamp(max=full - segments * seqlen))  # (B) or (1)
        window = kept = start[:, None] + torch.arange(segments * seqlen)  # (B or 1, K * s)
        if keep_end:
            end = torch.maximum(window[:, -1], _last_real_column(mask, full))
            lines = max(len(window), len(end))
            kept = _once(torch.cat([window[:, :-1].expand(lines, -1), end[:, None].expand(lines, -1)], 1))
        shape = (-1, segments, seqlen)
        window_by_segment = window.view(shape)
        return cls(rows, full, not truncate, kept.view(shape) if keep_end else window_by_segment, window_by_segment)

    def shorten(self, path: Path, tensor: Tensor) -> Tensor:
        """Return the tensor with its sequence axes shortened, (B, ...) to (B * K, ...)."""
        if path[-1:] == ("position_ids",) and tensor.ndim > 1:
            return self.shorten_positions(path, tensor)
        axes = self.sequence_axes(path, tensor)
        if axes:
            return self.take(tensor, axes, self.kept)
        segments = self.kept.shape[1]
        has_row_values = tensor.ndim > 0 and len(tensor) == self.rows
        return tensor.repeat_interleave(segments, 0) if has_row_values and segments > 1 else tensor

    def shorten_positions(self, path: Path, tensor: Tensor) -> Tensor:
        """Return shortened position ids, which restart at 0 in each segment.

        Raises DataError for segments of shape (3, B, S): time, height and width in vision models can't restart.
        """
        sections_first = tensor.ndim == 3 and tensor.shape[1:] == (self.rows, self.full)
        if sections_first and self.segmenting:
            raise DataError(
                f"{dotted(path)}: positions of shape {tuple(tensor.shape)} can't restart; use truncate=True"
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
        before_fall = torch.nn.functional.pad(falls, (1, 0)).cumsum(1) == 0  # (B * K, s)
        return torch.where(before_fall, positions - positions[:, :1], positions)

    def sequence_axes(self, path: Path, tensor: Tensor) -> tuple[int, ...]:
        """Return the sequence axes by the rules in ``sequence_length.py``. Raises DataError if they are ambiguous."""
        rows, name = self.rows, str(path[-1]) if path else ""
        axes = tuple(axis for axis in range(1, tensor.ndim) if tensor.shape[axis] == self.full)
        is_mask = tensor.dtype == torch.bool or "mask" in name or "bias" in name
        is_mask |= tensor.ndim == 4 and tensor.shape[1] == 1
        # Another axis may also have size S: the features of embeddings (B, S, H), the heads of a mask (B, heads, S, S).
        if tensor.ndim == 3 and name.endswith("embeds"):
            axes = tuple(axis for axis in axes if axis == 1)
        if tensor.ndim == 4 and is_mask:
            axes = tuple(axis for axis in axes if axis > 1)
        has_other_rows = bool(axes) and len(tensor) not in (1, rows)
        lacks_sequence = not axes and tensor.ndim > 1 and name in ONE_VALUE_PER_TOKEN
        if has_other_rows or lacks_sequence:
            raise misfit(path, tensor, rows, self.full)
        is_open = tensor.ndim > 4 or (not is_mask and (axes == (1, 2) or tensor.ndim == 4))
        if axes and is_open:
            raise DataError(
                f"{dotted(path)}: shape {tuple(tensor.shape)} doesn't show which axes are the sequence of {self.full} "
                "tokens; if it is a mask, name it '..._mask', else shorten it yourself"
            )
        return axes

    def take(self, tensor: Tensor, axes: tuple[int, ...], columns: Tensor) -> Tensor:
        """Return a contiguous copy with only ``columns`` (B or 1, K, s) of one axis, or of both axes of a mask."""
        is_slice = len(columns) == 1 and columns is self.window
        if is_slice and (len(axes) == 1 or columns.shape[1] == 1):
            return self.slice(tensor, axes)
        one_for_all = len(tensor) == 1 and len(columns) == 1 and columns.shape[1] == 1  # a mask shared by all rows
        rows = 1 if one_for_all else self.rows
        columns = columns.to(tensor.device)
        front = tuple(range(1, 1 + len(axes)))
        along = tensor.expand(rows, *tensor.shape[1:]).movedim(axes, front)  # (B, S, ...) or (B, S, S, ...)
        row = torch.arange(rows, device=tensor.device)[:, None, None]  # (B, 1, 1)
        if len(axes) == 1:
            taken = along[row, columns]  # (B, K, s, ...)
        else:
            taken = along[row[..., None], columns[..., :, None], columns[..., None, :]]  # (B, K, s, s, ...)
        return taken.flatten(0, 1).movedim(front, axes).contiguous()

    def slice(self, tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Return the result of ``take`` if all rows keep the same contiguous columns, about 40 times as fast."""
        _, segments, seqlen = self.window.shape
        for axis in axes:
            tensor = tensor.narrow(axis, int(self.window[0, 0, 0]), segments * seqlen)
        if segments > 1:
            tensor = tensor.expand(self.rows, *tensor.shape[1:])
            tensor = torch.unflatten(tensor, axes[0], (segments, seqlen)).movedim(axes[0], 1)  # (B, K, s, ...)
        copied = tensor.clone(memory_format=torch.contiguous_format)
        return copied.flatten(0, 1) if segments > 1 else copied


def _padding_mask(tensors: Mapping[Path, Tensor], rows: int, full: int) -> Tensor | None:
    """Return the 2-D ``attention_mask`` (B or 1, S); None if there is none."""
    path = find(tensors, "attention_mask")
    if path is not None and tensors[path].shape not in ((1, full), (rows, full)):
        raise misfit(path, tensors[path], rows, full)
    return None if path is None else tensors[path]


def _first_real_column(mask: Tensor | None) -> Tensor:
    """Return the column of each row's first token, (B), or (1) with 0 if no row has padding on the left."""
    if mask is None or bool(mask[:, 0].all()):
        return torch.zeros(1, dtype=torch.long)
    # The running product of 1 1 0 0 1 is 1 1 0 0 0, whose sum is the number of leading ones: 2.
    return mask.cpu().eq(0).long().cumprod(1).sum(1)


def _last_real_column(mask: Tensor | None, full: int) -> Tensor:
    """Return the column of each row's last token, (B), or (1) with S - 1 without a mask."""
    if mask is None:
        return torch.tensor([full - 1])
    return full - 1 - mask.cpu().eq(0).long().flip(1).cumprod(1).sum(1)


def _once(values: Tensor) -> Tensor:
    """Return the first row of (B) or (B, s) if all are equal, else all rows."""
    return values[:1] if len(values) == 1 or bool((values == values[:1]).all()) else values
