"""Causal attention within the parts of documents that a micro-batch consists of, without masks.

On a CPU, and on GPUs in fp32 or with dropout, parts of similar lengths become rows of their own, padded at their ends. On
GPUs in half precision torch's ``varlen_attn`` attends in all parts at once.

Shapes: ``B`` rows, ``S`` seqlen, ``P`` parts, ``G`` places of padded parts, ``nh`` heads of size ``hs``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DocumentParts", "attend_in_parts", "mean_loss"]

varlen_attn: Any = None
with suppress(ImportError):  # torch before 2.10
    from torch.nn.attention import varlen

    if {"window_size", "enable_gqa"} <= signature(varlen.varlen_attn).parameters.keys():
        varlen_attn = varlen.varlen_attn

_LARGEST_HEAD = 256  # of flash attention, which varlen_attn calls
_AMPERE = 8, 0


@dataclass(frozen=True, eq=False)
class DocumentParts:
    """The parts of a micro-batch, which attention and positions don't cross.

    A tuple would be taken apart by DeepSpeed in half precision.
    """

    positions: Tensor
    """(B, S) int64, the position ids."""
    bounds: Tensor
    """(P + 1) int32, the first token of each part among the B * S tokens of the micro-batch, and their number."""
    longest: int
    """Tokens of the longest part."""
    groups: tuple[tuple[int, int], ...]
    """(parts, tokens that they are padded to) of parts with similar lengths; empty if each row is one part."""
    taken: Tensor
    """(G) int64, the token at each place of the padded parts, group by group."""
    places: Tensor
    """(B * S) int64, the place of each token."""
    padding: Tensor
    """(padded) int64, the places that hold no token; there ``taken`` has the last token of the part."""
    kept: Tensor | None = None
    """(kept) int64, the tokens whose targets count, at least one; None for all."""
    weight: float = 1.0
    """The weight of the mean loss of ``kept`` in the mean over micro-batches."""

    def __eq__(self, other: object) -> bool:
        """Return whether all values are equal, on any devices: tensor-parallel ranks compare their first inputs."""
        if not isinstance(other, DocumentParts):
            return NotImplemented
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(
            torch.equal(a.cpu(), b.cpu()) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            for a, b in both
        )

    __hash__ = None  # type: ignore[assignment]  # tensors have no hash of their values

    @classmethod
    def of(cls, starts: NDArray[np.bool_], window: int | None = None, restart: bool = False) -> DocumentParts:
        """Return the parts that begin where ``starts`` (B, S) is true, as at the first token of each row.

        Positions count from the start of a part. With ``window``, attention is also cut at each multiple of it in a row, and
        with ``restart`` positions are too.
        """
        rows, seqlen = starts.shape
        cuts = starts
        if window is not None:
            cuts = starts.copy()
            cuts[:, ::window] = True
        column = np.arange(seqlen)
        first = np.maximum.accumulate(np.where(cuts if restart else starts, column, 0), axis=1)  # (B, S)
        begins = np.flatnonzero(cuts)  # (P)
        bounds = np.append(begins, rows * seqlen)
        lengths = np.diff(bounds)
        groups, index = (), list(np.empty((3, 0), np.int64))
        if len(lengths) > rows:
            groups, *index = _grouped(begins, lengths)
        taken, places, padding = map(torch.from_numpy, index)
        return cls(
            torch.from_numpy(column - first),
            torch.from_numpy(bounds.astype(np.int32)),
            int(lengths.max()),
            groups,
            taken,
            places,
            padding,
        )

    def keeping(self, kept: NDArray[np.bool_], mean: float) -> DocumentParts:
        """Return the same parts, where only the targets ``kept`` (B, S) count; a micro-batch keeps ``mean`` on average.

        The mean over micro-batches is then that over all kept targets. Two micro-batches keep 3 and 5 targets, 4 on average:
        their mean losses 2 and 1, weighted by 3/4 and 5/4, have the mean (1.5 + 1.25) / 2 = (3 * 2 + 5 * 1) / 8.
        """
        index = np.flatnonzero(kept)
        if not len(index):  # some mean loss, multiplied by 0
            return replace(self, kept=torch.zeros(1, dtype=torch.int64), weight=0.0)
        return replace(self, kept=torch.from_numpy(index), weight=len(index) / mean)

    def to(self, device: torch.device) -> DocumentParts:
        """Return the same on ``device``, copied asynchronously to a GPU."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.pin_memory().to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return DocumentParts(**moved)


def _grouped(begins: NDArray[Any], lengths: NDArray[Any]) -> tuple[Any, ...]:
    """Return ``groups``, ``taken``, ``places`` and ``padding`` of parts that start at ``begins`` (P,)."""
    # Lengths are rounded up to four sizes per power of two, so parts are padded by a quarter at most: 700 to 768, the next
    # multiple of 1024 / 8. Up to 64 tokens it is the next multiple of 8, so that there are few groups.
    unit = np.maximum(8, 1 << np.maximum(np.ceil(np.log2(lengths)).astype(np.int64) - 3, 0))
    padded = -(-lengths // unit) * unit
    order = np.argsort(padded, kind="stable")
    begins, lengths, padded = begins[order], lengths[order], padded[order]
    sizes, counts = np.unique(padded, return_counts=True)
    ends = np.cumsum(padded)
    part = np.repeat(np.arange(len(padded)), padded)  # of each place
    within = np.arange(ends[-1]) - np.repeat(ends - padded, padded)
    taken = begins[part] + np.minimum(within, lengths[part] - 1)
    is_token = within < lengths[part]
    places = np.empty(lengths.sum(), dtype=np.int64)
    places[taken[is_token]] = np.flatnonzero(is_token)
    return tuple(zip(counts.tolist(), sizes.tolist(), strict=True)), taken, places, np.flatnonzero(~is_token)


def mean_loss(
    loss_of: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor, parts: DocumentParts | None
) -> Tensor:
    """Return the mean loss of ``targets`` (B, S) given ``outputs`` (B, S, ...), or the weighted one of those that count.

    ``loss_of(outputs, targets)`` returns the mean loss of any number of tokens.
    """
    if parts is None or parts.kept is None:
        return loss_of(outputs, targets)
    return loss_of(outputs.flatten(0, 1)[parts.kept], targets.flatten()[parts.kept]) * parts.weight


def attend_in_parts(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    parts: DocumentParts,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Return causal attention (B, S, nh, hs) within ``parts``; query, key and value are (B, nh, S, hs).

    ``attend`` computes it in whole rows, for the same ``dropout``, ``scaling`` and ``sliding_window``.
    """
    assert parts.positions.shape == (query.shape[0], query.shape[2])
    if not parts.groups:
        return attend(query, key, value).transpose(1, 2)
    tokens = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]  # (B * S, nh, hs)
    if dropout == 0 and _has_varlen(query, value):
        # Its window counts the tokens before a token, ours also the token itself.
        before = -1 if sliding_window is None else sliding_window - 1
        bounds, longest = parts.bounds, parts.longest
        out: Tensor = varlen_attn(
            *tokens, bounds, bounds, longest, longest, scale=scaling, window_size=(before, 0), enable_gqa=True
        )
        return out.view(len(query), -1, *out.shape[1:])
    padded = [_Take.apply(tensor, parts) for tensor in tokens]  # type: ignore[no-untyped-call]  # (G, nh, hs)
    sizes = [count * length for count, length in parts.groups]
    outs = []
    for (count, _), *group in zip(parts.groups, *(torch.split(tensor, sizes) for tensor in padded), strict=True):
        rows = (tensor.unflatten(0, (count, -1)).transpose(1, 2) for tensor in group)  # (parts, nh, length, hs)
        outs.append(attend(*rows).transpose(1, 2).flatten(0, 1))
    out = _Put.apply(torch.cat(outs), parts)  # type: ignore[no-untyped-call]
    return out.view(len(query), -1, *out.shape[1:])


def _has_varlen(query: Tensor, value: Tensor) -> bool:
    """Return whether ``varlen_attn`` exists and has kernels for these tensors."""
    if varlen_attn is None or query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    is_nvidia = torch.version.cuda is not None and torch.cuda.get_device_capability(query.device) >= _AMPERE
    return is_nvidia and query.shape[3] == value.shape[3] <= _LARGEST_HEAD


class _Take(torch.autograd.Function):
    """Copy tokens (B * S, ...) to the places (G, ...) of padded parts.

    Every token has one place, so its gradient is read from there. That is a copy, where autograd's own gradient of an index
    adds token by token. The gradients of padding are zero, because no token attends to it and its output isn't used.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, parts: DocumentParts) -> Tensor:
        ctx.parts = parts
        return tokens.index_select(0, parts.taken)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.parts.places), None


class _Put(torch.autograd.Function):
    """Copy the places (G, ...) of padded parts back to their tokens (B * S, ...)."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, parts: DocumentParts) -> Tensor:
        ctx.parts = parts
        return padded.index_select(0, parts.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padded = grad.index_select(0, ctx.parts.taken)
        return padded.index_fill_(0, ctx.parts.padding, 0.0), None
