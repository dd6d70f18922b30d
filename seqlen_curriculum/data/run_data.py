"""The training and validation samples of a run's configuration, checked before any work."""

from __future__ import annotations

from seqlen_curriculum.config import RunConfig
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.samples import Samples, check_token_ids, open_split
from seqlen_curriculum.errors import DataError

__all__ = ["open_run_data"]


def open_run_data(config: RunConfig) -> tuple[Samples, Samples | None]:
    """(training, validation) samples of a file with model, data and training sections; None if it never evaluates.

    Raises ConfigError, DataError.
    """
    assert config.model is not None
    assert config.data is not None
    assert config.training is not None
    data, vocab_size = config.data, config.model.vocab_size
    for prefix in data.train:
        _check_vocabulary(IndexedCorpus(prefix), vocab_size)
    train = _open(config, "train")
    return train, _open(config, "valid") if config.training.eval_interval else None


def _open(config: RunConfig, which: str) -> Samples:
    assert config.model is not None
    assert config.data is not None
    assert config.training is not None
    data = config.data
    return open_split(data.train, data.split, which, data.seq_length, config.training.seed, config.model.vocab_size)


def _check_vocabulary(corpus: IndexedCorpus, vocab_size: int) -> None:
    if corpus.vocab_size is not None and corpus.vocab_size > vocab_size:
        raise DataError(
            f"{corpus.prefix}: was made with a vocabulary of {corpus.vocab_size}, the model has {vocab_size}; set "
            f"model.vocab_size to {corpus.vocab_size}"
        )
    check_token_ids(corpus, vocab_size)
