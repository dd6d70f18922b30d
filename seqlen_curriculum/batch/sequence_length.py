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

A padding-free batch, whose rows hold documents side by side, is cut by its position ids instead (``padding_free.py``).

Shapes: B rows, S full length, s the step's length, K segments per row (1 if rows are truncated), H any other size.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from seqlen_curriculum.batch.containers import Path, find, iter_values, replace_values
from seqlen_curriculum.batch.padding_free import cut_documents, find_packed_positions, find_positions
from seqlen_curriculum.batch.row_columns import RowColumns
from seqlen_curriculum.errors import ConfigError, DataError

Batch = TypeVar("Batch")
IGNORED = -100
"""The label that the losses of torch and Hugging Face ignore."""


@overload
def set_batch_sequence_length(
    batch: Batch,
    seqlen: int,
    truncate: bool = ...,
    preserve_end_of_sequence: bool = ...,
    *,
    labels_shifted: bool = ...,
    emit_shift_labels: bool = ...,
    padding_free: bool | None = ...,
    count_targets: Literal[True] = ...,
) -> tuple[Batch, int]: ...


@overload
def set_batch_sequence_length(
    batch: Batch,
    seqlen: int,
    truncate: bool = ...,
    preserve_end_of_sequence: bool = ...,
    *,
    labels_shifted: bool = ...,
    emit_shift_labels: bool = ...,
    padding_free: bool | None = ...,
    count_targets: Literal[False],
) -> tuple[Batch, None]: ...


def set_batch_sequence_length(
    batch: Batch,
    seqlen: int,
    truncate: bool = True,
    preserve_end_of_sequence: bool = False,
    *,
    labels_shifted: bool = True,
    emit_shift_labels: bool = False,
    padding_free: bool | None = None,
    count_targets: bool = True,
) -> tuple[Batch, int | None]:
    """Return a new batch with ``seqlen`` tokens per row, and its number of target tokens (named after Composer's function).

    ``batch`` is a tensor or any nesting of mappings, dataclasses, tuples, named tuples and lists. A mapping that is neither
    a dict nor a ``UserDict`` is returned as a dict. Tensors with at most one axis and other values are kept unchanged. With
    ``seqlen >= S`` the new container holds the same tensors. Shortened tensors are contiguous copies, never views, so that
    ``view(-1)`` works on them and writing to them leaves the caller's batch unchanged.

    ``truncate=True`` keeps the first ``seqlen`` tokens of each row. If a 2-D ``attention_mask`` shows padding on the left,
    the tokens are taken after the padding. With ``preserve_end_of_sequence`` the row's last real token replaces the last
    kept one.

    ``truncate=False`` cuts each row into ``S // seqlen`` rows, all of row 0 first. The remainder is dropped: left padding
    if there is enough, else tokens at the end. Masks keep the block of each segment, position ids restart at 0, and values
    per row are repeated.

    ``labels_shifted=True``: the label in a column is the target of that column (shifted by the loader, or masked LM).
    ``False``: the model shifts the labels, as Hugging Face's causal models do, so the first label of each row and of each
    segment is not a target. Labels of -100 are never targets. The targets are ``shift_labels``, which Hugging Face's loss
    takes as they are, else the 2-D ``labels``, else the second tensor of a pair ``(inputs, labels)``. Without any of them
    every column counts as a target.

    ``emit_shift_labels=True``, with ``labels_shifted=False``, adds ``shift_labels`` made from the full rows, so that the
    last kept column also has a target: a row of 8 tokens trains 8 targets, not 7. The last column of a full row has none.
    The batch must be a mapping, and the model must pass ``shift_labels`` on to its loss. Causal models of transformers do:
    their ``forward`` hands its keyword arguments to ``loss_function``.

    ``padding_free=True``: the rows hold documents side by side, separated by position ids that restart, as from TRL's BFD
    packing and Hugging Face's ``DataCollatorWithFlattening``. Every document is cut into pieces of at most ``seqlen``
    tokens that don't attend to each other. ``position_ids``, ``cu_seq_lens_*``, ``max_length_*`` and ``seq_idx``
    change; tokens and labels stay, so no target is lost, and ``truncate`` has no effect. ``None`` detects such a batch:

    - it has ``cu_seq_lens_*`` or ``seq_idx``,
    - or with ``truncate=True`` and without an attention mask, its ``position_ids`` (or ``positions``) count up and restart
      at their smallest value inside a row,
    - or its tokens and ``positions`` are flat, (T), as in torchtitan.

    A row with a single document and without ``cu_seq_lens_*`` looks like any other row: pass ``True`` if the loader packs.

    ``count_targets=False`` returns None for the count. Counting waits for a GPU, as does reading a 2-D ``attention_mask``
    or, unless ``padding_free=False``, integer position ids: shorten batches on the CPU where you can.

    Raises ConfigError for an invalid argument. Raises DataError for a tensor whose sequence axes are ambiguous, and for a
    padding-free batch without position ids, with an attention mask, or with boundaries that contradict each other.
    """
    if isinstance(seqlen, bool) or not isinstance(seqlen, Integral) or seqlen < 1:
        raise ConfigError(f"seqlen: {seqlen!r} is not valid: give a whole number of tokens, 1 or more")
    if preserve_end_of_sequence and not truncate:
        raise ConfigError("preserve_end_of_sequence: segments can't keep a row's end; use it with truncate=True only")
    if emit_shift_labels and labels_shifted:
        raise ConfigError("emit_shift_labels: the labels are shifted already; use it with labels_shifted=False only")
    if emit_shift_labels:
        batch = _with_shift_labels(batch)
    values = dict(iter_values(batch))
    tensors = {path: value for path, value in values.items() if isinstance(value, Tensor)}
    tokens = _find_tokens(tensors, batch)
    if seqlen < tensors[tokens].shape[-1]:
        positions = find_packed_positions(tensors, tokens, padding_free, truncate)
        if positions is None:
            columns = RowColumns.choose(tensors, tokens, int(seqlen), truncate, preserve_end_of_sequence)
            values |= {path: columns.shorten(path, tensor) for path, tensor in tensors.items()}
        else:
            values |= cut_documents(values, tokens, positions, int(seqlen))
    return replace_values(batch, values), _count_targets(values, tokens, labels_shifted) if count_targets else None


def _with_shift_labels(batch: Batch) -> Batch:
    """Return a copy with ``shift_labels`` (B, S): the label of the next column, and -100 in the last column."""
    if isinstance(batch, Mapping) and "shift_labels" in batch:
        return batch
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(batch, Mapping) or not isinstance(labels, Tensor) or labels.ndim != 2:
        raise DataError(
            f"emit_shift_labels: this {type(batch).__name__} is not a mapping with labels (rows, tokens); give it one"
        )
    new: Any = copy.copy(batch) if isinstance(batch, (dict, UserDict)) else dict(batch)
    new["shift_labels"] = pad(labels[:, 1:], (0, 1), value=IGNORED)[:, : labels.shape[1]]  # no column for rows of none
    return cast(Batch, new)


def _find_tokens(tensors: Mapping[Path, Tensor], batch: object) -> Path:
    """Return the path of the tensor (B, S) that defines the shape of the batch, or of flat position ids (T)."""
    for name in ("input_ids", "tokens", "labels"):
        path = find(tensors, name)
        if path is not None:
            return path
    for path, tensor in tensors.items():
        if tensor.ndim == 2:
            return path
    path = find_positions(tensors, 1)
    if path is not None:
        return path
    raise DataError(
        f"batch: no tensor (rows, seqlen) in this {type(batch).__name__}; give its token ids, such as input_ids"
    )


def _count_targets(values: Mapping[Path, Any], tokens: Path, labels_shifted: bool) -> int:
    """Return the number of columns with a target in a shortened batch."""
    tensors = {path: value for path, value in values.items() if isinstance(value, Tensor)}
    ndim = tensors[tokens].ndim
    shift_labels = find(tensors, "shift_labels", ndim)
    labels = shift_labels or find(tensors, "labels", ndim) or _second_of_two(tensors, tokens)
    first = 0 if labels_shifted or shift_labels else 1
    if labels is None:
        return tensors[tokens][..., first:].numel()
    targets = tensors[labels][..., first:]
    if targets.is_cpu and not targets.is_floating_point():
        return int(np.count_nonzero(targets.numpy() != IGNORED))  # three times as fast as torch on one thread
    return int(torch.count_nonzero(targets != IGNORED))


def _second_of_two(tensors: Mapping[Path, Tensor], tokens: Path) -> Path | None:
    """Return the path of the labels in a pair of inputs and labels, such as torchtitan's."""
    is_pair = {path[0] for path in tensors if path} == {0, 1} and (1,) in tensors
    return (1,) if is_pair and tensors[1,].shape == tensors[tokens].shape else None
