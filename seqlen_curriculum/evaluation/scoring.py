"""Score rows with any causal language model of Hugging Face, on any number of ranks with the same result.

The rows of a batch have equal lengths, so there is no padding and no mask, and a row's score doesn't depend on other rows.
The batches are the same for any number of ranks, and a rank scores every ``world``-th batch. Logits are computed only for
the scored positions.

Shapes: ``B`` rows, ``S`` tokens read, ``K`` targets at their end, ``V`` vocabulary.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.evaluation.distributed import Ranks
from seqlen_curriculum.evaluation.task import Row, Scores
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["BATCH_LOGITS", "BATCH_TOKENS", "batches", "check_finite", "predict", "score"]

BATCH_TOKENS = 8192
"""Default maximum tokens of a batch. A longer row is a separate batch."""
BATCH_LOGITS = 2048
"""Maximum positions with logits in memory: 2048 * 50257 * 4 bytes = 412 MB."""
_CHUNK = 256
"""Maximum positions with an fp32 softmax in memory: 51 MB."""


def score(model: Any, rows: Sequence[Row], ranks: Ranks, batch_tokens: int = BATCH_TOKENS, name: str = "") -> Scores:
    """Return the scores of ``rows`` on every rank. ``model`` is in eval mode on the rank's device.

    ``name`` labels the progress bar and errors. Raises ConfigError if a batch doesn't fit in the device's memory,
    CheckpointError if a score isn't finite.
    """
    nll, right = np.zeros(len(rows)), np.zeros(len(rows))
    own_batches = batches(rows, batch_tokens)[ranks.rank :: ranks.world]
    own_rows = sum(map(len, own_batches))
    with tqdm(
        desc=name, total=own_rows, unit="row", file=sys.stderr, disable=True if ranks.rank else None, delay=1
    ) as bar:
        for batch in own_batches:
            nll[batch], right[batch] = _score_batch(model, [rows[number] for number in batch])
            bar.update(len(batch))
    # A row has its score on one rank and 0 on all others, so the sum over ranks is its score.
    nll, right = ranks.total(nll), ranks.total(right)
    check_finite(name, nll, "rows")
    return Scores(nll, right > 0)


def check_finite(name: str, losses: NDArray[np.float64], what: str) -> None:
    """Raise CheckpointError, which starts with ``name``, for ``losses`` of rows or positions that aren't finite."""
    bad = int(np.sum(~np.isfinite(losses)))
    if bad:
        raise CheckpointError(
            f"{name}: the loss of {bad:,} of {len(losses):,} {what} is not finite; the weights have diverged, or need "
            "--dtype float32"
        )


def batches(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Return batches of row indices with equal lengths, longest first, without rows that have no targets."""

    def size(number: int) -> tuple[int, int]:
        return len(rows[number].tokens) - 1, rows[number].targets

    batched: list[list[int]] = []
    room, last_seqlen = 0, 0
    scored = [number for number, row in enumerate(rows) if row.targets]
    for number in sorted(scored, key=size, reverse=True):
        seqlen, targets = size(number)
        if not room or seqlen != last_seqlen:
            batched.append([])
            # With a seqlen of 1024 a batch has 8192 // 1024 = 8 rows. If all positions are targets, the logits allow only
            # 2048 // 1024 = 2. The first row of a batch has the most targets.
            room, last_seqlen = max(min(batch_tokens // seqlen, BATCH_LOGITS // targets), 1), seqlen
        batched[-1].append(number)
        room -= 1
    return batched


@torch.inference_mode()
def _score_batch(model: Any, rows: Sequence[Row]) -> tuple[Any, Any]:
    """Return the summed negative log likelihood and whether all targets are right, (B) each, for rows of equal length."""
    counts = torch.tensor([row.targets for row in rows], device=model.device)  # (B)
    most = int(counts.max())
    logits, targets, losses = predict(model, np.stack([row.tokens for row in rows]), most)
    # For a row with 2 targets in a batch with K=5, only the last 2 of 5 columns count, starting at 5 - 2 = 3.
    counted = torch.arange(most, device=model.device) >= most - counts.unsqueeze(1)  # (B, K)
    nll = torch.where(counted, losses.double(), 0.0).sum(1)
    right = ((logits.argmax(-1) == targets) | ~counted).all(1)
    return nll.cpu().numpy(), right.cpu().numpy()


@torch.inference_mode()
def predict(model: Any, rows: IntArray, targets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (B, K, V), targets and losses (B, K) of the last ``targets`` (K) tokens of ``rows`` (B, S + 1).

    Losses are in nats, in fp32. Raises ConfigError if the batch doesn't fit in the device's memory.
    """
    tokens = torch.from_numpy(rows).to(model.device)
    wanted = tokens[:, -targets:]
    only_last = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        only_last["logits_to_keep"] = targets
    try:
        logits = model(tokens[:, :-1], use_cache=False, **only_last).logits[:, -targets:]
        losses = _token_losses(logits.flatten(0, 1), wanted.flatten()).view_as(wanted)
    except torch.OutOfMemoryError as error:
        shape = f"{len(rows)} x {tokens.shape[1] - 1}"
        raise ConfigError(f"--batch-tokens: a batch of {shape} tokens doesn't fit in memory; lower it") from error
    return logits, wanted, losses


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the fp32 cross entropies (N) of ``logits`` (N, V)."""
    chunks = zip(torch.split(logits, _CHUNK), torch.split(targets, _CHUNK), strict=True)
    return torch.cat([F.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in chunks])
