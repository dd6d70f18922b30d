"""Open and check the data of a run's configuration before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.config.run_file import is_corpus, places
from seqlen_curriculum.data.decomposed_data import DecomposedData, buckets_of
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.mask_tokens import open_objective
from seqlen_curriculum.data.pieces import Pieces
from seqlen_curriculum.data.samples import SPLITS, Samples, check_token_ids, open_split, split_documents
from seqlen_curriculum.data.training_data import RunData, TrainingData
from seqlen_curriculum.errors import ConfigError, DataError

__all__ = ["check_corpora", "corpora_of", "open_run_data", "open_samples", "open_training_data", "with_buckets"]


def open_run_data(config: RunConfig) -> tuple[RunData, Samples | None]:
    """Open (training data, validation samples) of a file with model, data and training sections.

    The validation samples are None if the run never evaluates. Raises ConfigError, DataError.
    """
    assert config.model is not None
    assert config.data is not None
    assert config.training is not None
    data = config.data
    prefixes = [*data.prefixes, *(data.valid or [])]
    _check_places(prefixes, config.folder)
    corpora = [IndexedCorpus(prefix) for prefix in prefixes]
    for corpus in corpora:
        _check_vocabulary(corpus, config.model)
    if config.model.initial is not None:
        initial = config.model.initial.folder
        _check_tokenizers(corpora, initial, f"model.hf_checkpoint {initial}", "name a model trained with this one")
    open_objective(config)
    return open_training_data(config), open_samples(config, "valid") if config.training.eval_interval else None


def open_training_data(config: RunConfig) -> RunData:
    """Open the training data of a file with data and training sections, without reading tokens."""
    return open_decomposed_data(config) if config.decomposed else open_packed_data(config)


def open_decomposed_data(config: RunConfig) -> DecomposedData:
    """Open the training data of a file whose ``data.order`` is ``decomposed``."""
    assert config.data is not None
    pieces = open_pieces(config)
    buckets = buckets_of(pieces, config.data.weights)
    return DecomposedData(pieces, config.with_buckets(buckets).timeline(), buckets)


def open_packed_data(config: RunConfig) -> TrainingData:
    """Open the training data of a file whose ``data.order`` is ``packed``."""
    assert config.data is not None
    data, timeline = config.data, config.plan.timeline
    samples = [open_samples(config, "train", source) for source in _sources(config)]
    return TrainingData(samples, timeline, data.leftovers == "recycle", data.weights)


def _sources(config: RunConfig) -> list[list[str]]:
    """Return the training corpora of each source: all of one without weights, else one each."""
    assert config.data is not None
    return [config.data.prefixes] if config.data.weights is None else [[prefix] for prefix in config.data.prefixes]


def open_pieces(config: RunConfig) -> list[Pieces]:
    """Open the pieces of each source of a decomposed run. Raises ConfigError, DataError."""
    assert config.data is not None
    _, split = corpora_of(config, "train")
    seed = config.training.seed if config.training else 0
    vocab_size = config.model.vocab_size if config.model else None
    return [
        Pieces(split_documents(prefixes, split, "train"), config.data.piece_lengths, seed, vocab_size)
        for prefixes in _sources(config)
    ]


def with_buckets(config: RunConfig) -> RunConfig:
    """Return ``config`` with the pieces of its corpora, on which the plan of a decomposed run depends; others unchanged.

    Raises ConfigError, DataError.
    """
    if config.decomposed is None or config.buckets is not None:
        return config
    return config.with_buckets(buckets_of(open_pieces(config), config.decomposed.weights))


def open_samples(config: RunConfig, which: str, prefixes: Sequence[str] | None = None) -> Samples:
    """Open the samples of split ``which`` (train, valid or test) or of its own corpora, or the samples of ``prefixes``."""
    assert config.data is not None
    seed = config.training.seed if config.training else 0
    corpora, split = corpora_of(config, which)
    vocab_size = config.model.vocab_size if config.model else None
    return open_split(prefixes or corpora, split, which, config.data.seq_length, seed, vocab_size)


def corpora_of(config: RunConfig, which: str) -> tuple[list[str], str]:
    """Return the corpora that ``which`` (train, valid or test) is taken from, and the split of each of them.

    Raises ConfigError, and DataError for a corpus that is in none of the folders where it is looked up.
    """
    assert config.data is not None
    data = config.data
    own = {"train": None, "valid": data.valid, "test": data.test}[which]
    if which == "test" and own is None and data.valid is not None:
        raise ConfigError(
            "data.test: not given; data.valid has corpora of its own, so data.train is not split: give corpora for data.test"
        )
    whole = own is not None or (which == "train" and data.valid is not None)
    corpora = own or data.prefixes
    _check_places(corpora, config.folder)
    return corpora, ",".join(str(int(name == which)) for name in SPLITS) if whole else data.split


def _check_places(prefixes: Sequence[str], folder: Path | None) -> None:
    """Raise DataError for a relative prefix without a corpus, if it was looked up in more than the current folder."""
    looked_up = places(folder)
    for prefix in prefixes:
        if len(looked_up) > 1 and not os.path.isabs(prefix) and not is_corpus(prefix):
            raise DataError(
                f"{prefix}: no corpus, neither in {' nor in '.join(looked_up)}, the folder of the run's file; give the "
                "prefix of a .bin/.idx pair relative to one of them, or make one with slw prepare"
            )


def _check_vocabulary(corpus: IndexedCorpus, model: ModelConfig) -> None:
    if corpus.vocab_size is not None and corpus.vocab_size > model.vocab_size:
        fix = f"set model.vocab_size to {corpus.vocab_size}"
        if model.hf_config is not None:
            fix = f"set vocab_size in model.hf_config to {corpus.vocab_size}"
        elif model.hf_checkpoint:
            fix = f"prepare the corpus with the tokenizer of {model.hf_checkpoint}"
        raise DataError(
            f"{corpus.prefix}: was made with a vocabulary of {corpus.vocab_size}, the model has {model.vocab_size}; {fix}"
        )
    check_token_ids(corpus, model.vocab_size)


def check_corpora(prefixes: Sequence[str], folder: Path, vocab_size: int | None) -> None:
    """Check that the model in ``folder``, of ``vocab_size`` tokens if known, can be evaluated on corpora.

    Raises DataError for a corpus of a larger vocabulary or of another tokenizer.
    """
    corpora = [IndexedCorpus(prefix) for prefix in prefixes]
    fix = "give the run that trained it"
    for corpus in corpora:
        if vocab_size is not None and (corpus.vocab_size or 0) > vocab_size:
            raise DataError(
                f"{corpus.prefix}: was made with a vocabulary of {corpus.vocab_size}, the model in {folder} has "
                f"{vocab_size}; {fix}"
            )
        if vocab_size is not None:
            check_token_ids(corpus, vocab_size)
    _check_tokenizers(corpora, folder, str(folder), fix)


def _check_tokenizers(corpora: Sequence[IndexedCorpus], folder: Path, name: str, fix: str) -> None:
    """Raise DataError unless each token of the tokenizer in ``folder``, if any, has the same id in the corpora's.

    ``name`` is that of the folder in the message, and ``fix`` the way out besides preparing the corpus again.
    """
    from seqlen_curriculum.data.tokenizer import tokenizer_files  # an optional package, which only this check needs

    if not tokenizer_files(folder):
        return
    theirs = _ids(folder)
    for path in (Path(f"{corpus.prefix}.tokenizer.json") for corpus in corpora):
        ours = _ids(path) if path.exists() else theirs
        for token in sorted(theirs, key=theirs.__getitem__):
            if ours.get(token) != theirs[token]:
                raise DataError(
                    f"{path}: is not the tokenizer in {name}: id {theirs[token]} there is {token!r}, here another; "
                    f"prepare the corpus with that one, or {fix}"
                )


def _ids(tokenizer: Path) -> dict[str, int]:
    from seqlen_curriculum.data.tokenizer import read_tokenizer

    found: dict[str, int] = read_tokenizer(tokenizer).get_vocab(with_added_tokens=True)
    return found
