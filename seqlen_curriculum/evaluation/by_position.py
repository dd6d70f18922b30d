"""The validation loss by position in a full-length row, which shows what a model predicts from little context.

Position *p* is the token that is predicted from the *p* tokens before it in its row. The mean over positions 1 to 8 is the
loss of rows of 8 tokens. The mean over all positions is the run log's ``valid_loss`` on the same rows, unless
``data.attention`` is "document".

Shapes: ``B`` rows of a batch, ``S`` the run's ``data.seq_length``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.from_config import check_corpora, corpora_of
from seqlen_curriculum.data.samples import Samples, open_split
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.evaluation.distributed import Ranks, join
from seqlen_curriculum.evaluation.scoring import BATCH_LOGITS, BATCH_TOKENS, check_finite, predict
from seqlen_curriculum.files import read_json
from seqlen_curriculum.models.pretrained import load_model
from seqlen_curriculum.run_folder.model_folder import model_folder, refuse_encoder, sizes_in, vocabulary
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["BinLoss", "ValidationRows", "bins", "loss_by_position", "mean_loss", "measure", "validation_rows"]

_FIRST_BIN, _GROWTH = 8, 8


class BinLoss(NamedTuple):
    """The mean loss of some positions."""

    loss: float
    """Nats per token."""
    tokens: int
    """The number of tokens that were predicted."""


@dataclass(frozen=True)
class ValidationRows:
    """Rows of a run's validation split."""

    samples: Samples
    ids: IntArray

    @property
    def seqlen(self) -> int:
        return self.samples.seq_length

    def is_same(self, other: ValidationRows) -> bool:
        """Return whether both have the same tokens, from the same files."""
        return self._origin() == other._origin()

    def _origin(self) -> tuple[Any, ...]:
        ranges = [(str(Path(corpus.prefix).resolve()), first, end) for corpus, first, end in self.samples.ranges]
        return ranges, self.seqlen, len(self.ids)


def loss_by_position(
    folder: Path,
    config: RunConfig,
    rows: int | None = None,
    ranks: Ranks | None = None,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, BinLoss]:
    """Return the validation loss of positions ``1-8``, ``9-64``, ``65-512`` and so on, by that name.

    ``folder`` is a run's folder (its newest complete checkpoint is used), a checkpoint of any engine, or a causal language
    model in Hugging Face's format. ``config`` is the run whose validation split is read, at its full ``data.seq_length``:
    ``rows`` rows, evenly over the split, by default ``training.eval_rows`` of them, as in the evaluations of training.

    ``ranks`` share the rows, with the same result for any number of them; by default those of the launcher, or this process,
    on a GPU if there is one. ``dtype`` is that of the weights, and at most ``batch_tokens`` tokens are read at once.

    All input is checked before the weights are read. Raises ConfigError, DataError, CheckpointError.
    """
    folder = model_folder(folder)
    valid = validation_rows(folder, config, rows)
    ranks = join() if ranks is None else ranks
    # The rows that pad the vocabulary stay, as in training.
    model = load_model(folder, dtype, padding=True).to(ranks.device)
    return measure(model, valid, ranks, batch_tokens, str(folder))


def validation_rows(folder: Path, config: RunConfig, rows: int | None = None) -> ValidationRows:
    """Open the validation rows of ``config``, as in ``loss_by_position``, and check that the model in ``folder`` fits them.

    Raises ConfigError, and DataError for corpora that are missing or of another vocabulary.
    """
    if config.data is None or config.training is None:
        missing = "data" if config.data is None else "training"
        raise ConfigError(f"{missing}: section required, but not given; give the configuration of a run")
    refuse_encoder(folder, "it has no loss by position; give a causal language model")
    seqlen, positions = (
        config.data.seq_length,
        sizes_in(read_json(folder / "config.json")).get("max_position_embeddings"),
    )
    if positions is not None and seqlen > positions:
        raise ConfigError(
            f"data.seq_length: {seqlen} is above the {positions} positions of the model in {folder}; give the "
            "configuration of the run that trained it"
        )
    prefixes, split = corpora_of(config, "valid")
    vocab_size = vocabulary(folder)
    check_corpora(prefixes, folder, vocab_size)
    samples = open_split(prefixes, split, "valid", seqlen, config.training.seed, vocab_size)
    count = min(config.training.eval_rows if rows is None else rows, samples.num_samples)
    return ValidationRows(samples, np.arange(count, dtype=np.int64) * samples.num_samples // count)


def measure(
    model: Any, valid: ValidationRows, ranks: Ranks, batch_tokens: int = BATCH_TOKENS, name: str = ""
) -> dict[str, BinLoss]:
    """Return what ``loss_by_position`` does, on every rank, for a ``model`` in eval mode on ``ranks.device``.

    ``name`` labels the progress bar and errors.
    """
    seqlen, rows = valid.seqlen, len(valid.ids)
    losses = _position_losses(model, valid, ranks, batch_tokens, name) / rows
    check_finite(name, losses, "positions")
    return {
        f"{first}-{last}": BinLoss(float(losses[first - 1 : last].mean()), rows * (last - first + 1))
        for first, last in bins(seqlen)
    }


def _position_losses(
    model: Any, valid: ValidationRows, ranks: Ranks, batch_tokens: int, name: str
) -> NDArray[np.float64]:
    """Return the loss of each position, (S), summed over all rows, on every rank."""
    total = torch.zeros(valid.seqlen, dtype=torch.float64, device=ranks.device)
    most = max(1, min(batch_tokens, BATCH_LOGITS) // valid.seqlen)
    batches = [valid.ids[start : start + most] for start in range(0, len(valid.ids), most)][ranks.rank :: ranks.world]
    hidden = True if ranks.rank else None
    for ids in tqdm(batches, desc=name, unit="batch", file=sys.stderr, disable=hidden, delay=1):
        tokens = valid.samples.read(ids, valid.seqlen).astype(np.int64)  # (B, S + 1)
        total += predict(model, tokens, valid.seqlen)[2].double().sum(0)
    return ranks.total(total.cpu().numpy())


def bins(seqlen: int) -> list[tuple[int, int]]:
    """Return the first and the last position of each bin of a row of ``seqlen`` tokens."""
    # 1024: 1-8, 9-64, 65-512, 513-1024. Each bin ends 8 times as far into the row, and the last one with it.
    ends = [_FIRST_BIN]
    while ends[-1] < seqlen:
        ends.append(ends[-1] * _GROWTH)
    return [(first, min(last, seqlen)) for first, last in zip([1, *(end + 1 for end in ends)], ends, strict=False)]


def mean_loss(by_position: Mapping[str, BinLoss]) -> float:
    """Return the mean loss over all positions, in nats per token."""
    tokens = sum(each.tokens for each in by_position.values())
    return sum(each.loss * each.tokens for each in by_position.values()) / tokens
