"""Scores rows with any causal language model of Hugging Face, on any number of ranks with the same result.

Rows of one length make a batch, so nothing is padded and no mask is needed: a row's score can't depend on its neighbours.
The batches are the same for any number of ranks; a rank takes every ``world``-th. Logits are made for the scored positions
alone.

Shapes: ``B`` rows, ``S`` tokens read, ``K`` targets at their end, ``V`` vocabulary.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.evaluation.distributed import Ranks
from seqlen_curriculum.evaluation.task import Row, Scores

__all__ = ["BATCH_TOKENS", "batches", "score"]

BATCH_TOKENS = 8192
"""Tokens a batch reads by default; a row that is longer is a batch of its own."""
_BATCH_LOGITS = 2048
"""Positions whose logits are held at once: 2048 * 50257 * 4 bytes = 412 MB."""
_CHUNK = 256
"""Positions whose softmax is held at once, in fp32: 51 MB."""


def score(model: Any, rows: Sequence[Row], ranks: Ranks, batch_tokens: int = BATCH_TOKENS, name: str = "") -> Scores:
    """Scores of ``rows`` on every rank; ``name`` stands before the progress bar. ``model`` is in eval mode on its device.

    Raises ConfigError where a batch doesn't fit into the device's memory, CheckpointError where a score isn't finite.
    """
    nll, right = np.zeros(len(rows)), np.zeros(len(rows))
    own = batches(rows, batch_tokens)[ranks.rank :: ranks.world]
    total = sum(map(len, own))
    with tqdm(desc=name, total=total, unit="row", file=sys.stderr, disable=ranks.rank != 0, delay=1) as bar:
        for batch in own:
            nll[batch], right[batch] = _score_batch(model, [rows[number] for number in batch])
            bar.update(len(batch))
    return _finite(Scores(ranks.total(nll), ranks.total(right) > 0), name)


def batches(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Numbers of the rows that have targets, those of one length together, the longest first."""

    def size(number: int) -> tuple[int, int]:
        return len(rows[number].tokens) - 1, rows[number].targets

    found: list[list[int]] = []
    room, last = 0, 0
    for number in sorted((one for one, row in enumerate(rows) if row.targets), key=size, reverse=True):
        seqlen, targets = size(number)
        if not room or seqlen != last:
            found.append([])
            # The first has the most targets of its length.
            room, last = max(min(batch_tokens // seqlen, _BATCH_LOGITS // targets), 1), seqlen
        found[-1].append(number)
        room -= 1
    return found


@torch.inference_mode()
def _score_batch(model: Any, rows: Sequence[Row]) -> tuple[Any, Any]:
    """Sums of the negative log likelihoods, and whether all targets are right, of rows of one length."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows])).to(model.device)  # (B, S + 1)
    counts = torch.tensor([row.targets for row in rows], device=model.device)
    most = int(counts.max())
    targets = tokens[:, -most:]  # (B, K)
    try:
        logits = _last_logits(model, tokens[:, :-1], most)
        losses = _losses(logits.flatten(0, 1), targets.flatten()).view_as(targets)
    except torch.OutOfMemoryError as error:
        shape = f"{len(rows)} x {tokens.shape[1] - 1}"
        raise ConfigError(f"--batch-tokens: a batch of {shape} tokens doesn't fit the memory; give less") from error
    counted = torch.arange(most, device=model.device) >= most - counts.unsqueeze(1)  # (B, K)
    nll = torch.where(counted, losses.double(), 0.0).sum(1)
    right = ((logits.argmax(-1) == targets) | ~counted).all(1)
    return nll.cpu().numpy(), right.cpu().numpy()


def _last_logits(model: Any, inputs: Tensor, positions: int) -> Tensor:
    """Logits (B, K, V) of the last ``positions`` of ``inputs`` (B, S)."""
    keep = {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: Tensor = model(inputs, use_cache=False, **keep).logits
    return logits[:, -positions:]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """fp32 cross entropies (N) of ``logits`` (N, V)."""
    chunks = zip(torch.split(logits, _CHUNK), torch.split(targets, _CHUNK), strict=True)
    return torch.cat([F.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in chunks])


def _finite(scores: Scores, name: str) -> Scores:
    bad = int(np.sum(~np.isfinite(scores.nll)))
    if bad:
        raise CheckpointError(
            f"{name}: the loss of {bad:,} of {len(scores.nll):,} rows is not finite; the weights have diverged, or need "
            "--dtype float32"
        )
    return scores
