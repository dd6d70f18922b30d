"""Cut padding-free batches: documents side by side in a row, separated by position ids that restart.

Hugging Face's ``DataCollatorWithFlattening``, TRL's ``padding_free`` and BFD packing, and torchtitan make such batches. No
token may attend to another document: Hugging Face's models derive the block mask from ``position_ids`` if there is neither
an ``attention_mask`` nor a cache, FlashAttention reads ``cu_seq_lens_*``, and Mamba layers read ``seq_idx``.

Labels are unchanged. The last token of a piece still predicts the next token of its document, which is the first of the
next piece, so a document of 13 tokens in pieces of 4 trains the same 12 targets as a whole one.

Shapes: B rows (mostly 1), T tokens per row, N pieces of all rows, s the step's length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from seqlen_curriculum.batch.containers import Path, dotted, misfit
from seqlen_curriculum.errors import ConfigError, DataError

_CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")
_POSITIONS = ("position_ids", "positions")


def find_positions(tensors: Mapping[Path, Tensor], ndim: int) -> Path | None:
    """Return the path of the position ids with this number of axes, at any depth: whole numbers, one per token."""
    for path, tensor in tensors.items():
        is_integer = not tensor.is_floating_point() and tensor.dtype != torch.bool
        if path[-1:] and path[-1] in _POSITIONS and tensor.ndim == ndim and is_integer:
            return path
    return None


def find_packed_positions(
    tensors: Mapping[Path, Tensor], tokens: Path, padding_free: bool | None, truncate: bool
) -> Path | None:
    """Return the path of the position ids (B or 1, T) for cutting a padding-free batch; None for any other batch.

    ``padding_free=None`` detects such a batch. Raises ConfigError or DataError for a batch that can't be cut correctly.
    """
    positions = find_positions(tensors, tensors[tokens].ndim)
    markers = [path for path in tensors if path[-1:] and _is_marker(path[-1])]
    mask = next(_masks(tensors, tensors[tokens].shape[-1]), None)
    is_flat = tensors[tokens].ndim == 1
    if padding_free is None:
        restarts = truncate and positions is not None and mask is None and _restart(tensors[positions])
        padding_free = bool(markers) or is_flat or restarts
    if not padding_free:
        if markers or is_flat:
            marker = dotted(markers[0] if markers else tokens)
            raise ConfigError(f"padding_free: False, but {marker} marks a padding-free batch; remove one of the two")
        return None
    named = dotted(markers[0]) if markers else "padding_free"
    unknown = [path for path in markers if path[-1] not in (*_CUMULATIVE, "seq_idx")]
    if unknown:
        raise DataError(f"{dotted(unknown[0])}: not a known name; give position_ids, cu_seq_lens_q and cu_seq_lens_k")
    if positions is None:
        raise DataError(
            f"{named}: this padding-free batch has no position_ids of whole numbers in the shape of its tokens; set "
            "return_position_ids=True in the collator"
        )
    if mask is not None:
        raise DataError(f"{dotted(mask)}: a padding-free batch is cut by its position ids; leave the mask out")
    return positions


def cut_documents(values: Mapping[Path, Any], tokens: Path, positions: Path, seqlen: int) -> dict[Path, Any]:
    """Cut documents into pieces of ``seqlen`` tokens that don't attend to each other; return the changed values.

    Position ids restart in each piece. ``cu_seq_lens_*``, ``max_length_*`` and ``seq_idx`` describe the pieces, in
    their original dtype and device. Raises DataError if they had a boundary where the position ids don't restart.
    """
    shape, old = values[tokens].shape, values[positions]
    if old.shape[-1] != shape[-1] or (old.ndim == 2 and len(old) not in (1, shape[0])):
        raise misfit(positions, old, shape[0] if len(shape) == 2 else 1, shape[-1])
    if 0 in shape:
        raise DataError(f"{dotted(tokens)}: shape {tuple(shape)} holds no tokens; leave empty padding-free batches out")
    columns = torch.arange(shape[-1], device=old.device)
    starts = _document_starts(old)  # (B or 1, T)
    offsets = (columns - torch.where(starts, columns, 0).cummax(-1).values) % seqlen  # 0 at the start of each piece
    is_first = (offsets == 0).expand(shape)
    edges = torch.cat([is_first.flatten().nonzero()[:, 0], columns.new_tensor([is_first.numel()])])  # (N + 1)
    # transformers' FlashAttention takes the smallest position as the start of a document, so every piece starts with it.
    new: dict[Path, Any] = {positions: (offsets + old.min()).to(old.dtype)}
    for path, value in values.items():
        name = path[-1] if path and value is not None else None
        if name in _CUMULATIVE or name == "seq_idx":
            _check_boundaries(path, value, starts.expand(shape))
        if name in _CUMULATIVE:
            new[path] = edges.to(value)
        elif name == "seq_idx":
            new[path] = (is_first.cumsum(-1) - 1).to(value)
        elif name in _LONGEST and isinstance(value, (Integral, Tensor)):
            longest = edges.diff().max()
            new[path] = longest.to(value) if isinstance(value, Tensor) else int(longest)
    return new


def _is_marker(name: object) -> bool:
    return name == "seq_idx" or str(name).startswith("cu_seq")


def _masks(tensors: Mapping[Path, Tensor], full: int) -> Iterator[Path]:
    """Yield the paths of attention masks, found by name or by two last axes of ``full`` tokens."""
    for path, tensor in tensors.items():
        if (path and "attention_mask" in str(path[-1])) or (tensor.ndim > 2 and tensor.shape[-2:] == (full, full)):
            yield path


def _document_starts(positions: Tensor) -> Tensor:
    """Return a mask of the columns where documents start: the position isn't the previous one + 1 (transformers' rule)."""
    first = torch.ones_like(positions[..., :1], dtype=torch.bool)
    return torch.cat([first, positions[..., 1:] != positions[..., :-1] + 1], -1)


def _restart(positions: Tensor) -> bool:
    """Return whether positions count up and restart at their smallest value inside a row, as in packed rows."""
    # Positions that restart at their smallest value never end T - 1 above their first one.
    if not positions.numel() or bool((positions[..., -1] - positions[..., 0] == positions.shape[-1] - 1).all()):
        return False
    is_break = _document_starts(positions)[..., 1:]
    return bool(is_break.any()) and bool((positions[..., 1:][is_break] == positions.min()).all())


def _check_boundaries(path: Path, value: Tensor, starts: Tensor) -> None:
    """Raise DataError if ``cu_seq_lens`` (N + 1) or ``seq_idx`` (B, T) disagrees with the starts (B, T) of documents."""
    if path[-1] in _CUMULATIVE:
        fits = value.ndim == 1 and len(value) > 0 and int(value[-1]) == starts.numel() and int(value[0]) == 0
        agrees = fits and bool(starts.flatten()[value[value < starts.numel()].to(starts.device, torch.long)].all())
    else:
        fits = value.shape == starts.shape
        agrees = fits and bool(starts[..., 1:][(value[..., 1:] != value[..., :-1]).to(starts.device)].all())
    if not agrees:
        raise DataError(
            f"{dotted(path)}: its boundaries differ from those of position_ids, which restart at "
            f"{int(starts.sum())} places; make both with the same collator"
        )
