"""The mask token and the special tokens of a masked run, from its tokenizer, its corpora and its model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.objective import Masking, NextToken, Objective
from seqlen_curriculum.data.preparation.corpus_record import read_record
from seqlen_curriculum.errors import ConfigError

__all__ = ["MASK_TOKENS", "open_objective", "tokenizer_path"]

MASK_TOKENS = ("[MASK]", "<mask>")
"""Mask tokens of BERT and RoBERTa, for a tokenizer without files that name its own."""
_ROLES = ("bos", "eos", "pad", "cls", "sep")


def open_objective(config: RunConfig) -> Objective:
    """Return what the model of a run predicts. Raises ConfigError if masked tokens are asked for and none is known."""
    training, model, data = config.training, config.model, config.data
    if training is None or training.objective == "causal":
        return NextToken()
    assert model is not None
    assert data is not None
    ends = {read_record(prefix).get("end_of_text_id") for prefix in data.prefixes}
    path = tokenizer_path(data.prefixes[0], model)
    own_mask, special = _of_tokenizer(path, model) if path is not None else (None, set(_of_model(model)))
    mask_id = _checked(training.mask_token_id, own_mask, path, model.vocab_size)
    known = sorted({number for number in special | ends if type(number) is int and 0 <= number < model.vocab_size})
    return Masking(training.seed, training.predicted_share, mask_id, tuple(known), model.vocab_size)


def tokenizer_path(prefix: str, model: ModelConfig) -> Path | None:
    """Return the tokenizer beside the corpus ``prefix``, else the folder of the model if that has one, else None."""
    beside = Path(f"{prefix}.tokenizer.json")
    if beside.exists():
        return beside
    if model.initial is None:
        return None
    from seqlen_curriculum.data.tokenizer import tokenizer_files  # an optional package

    return model.initial.folder if tokenizer_files(model.initial.folder) else None


def _of_tokenizer(path: Path, model: ModelConfig) -> tuple[int | None, set[int]]:
    """Return the id of the mask token, if any, and those of all special tokens."""
    from seqlen_curriculum.data.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(path)
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids = (tokenizer.token_to_id(name) for name in _mask_names(path, model))
    return next((number for number in ids if number is not None), None), special


def _mask_names(path: Path, model: ModelConfig) -> Iterator[str]:
    from seqlen_curriculum.data.document_end import named_tokens

    folders = [path] if path.is_dir() else []
    folders += [model.initial.folder] if model.initial is not None else []
    for folder in folders:
        yield from (name for name in named_tokens(folder, "mask_token") if isinstance(name, str))
    yield from MASK_TOKENS


def _of_model(model: ModelConfig) -> Iterator[Any]:
    """Yield the ids of the special tokens in ``config.json``, for a run without a tokenizer."""
    config = model.architecture or {}
    yield from (config.get(f"{role}_token_id") for role in _ROLES)


def _checked(given: int | None, own: int | None, path: Path | None, vocab_size: int) -> int:
    """Return the id of the mask token: ``given`` in the file, or the tokenizer's ``own``. Raises ConfigError."""
    if given is None and own is None:
        source = f"the tokenizer {path} has no mask token" if path is not None else "the run has no tokenizer"
        raise ConfigError(
            f'training.mask_token_id: required, but not given: {source}, and training.objective is "masked"; give an id '
            f"below model.vocab_size {vocab_size} that the corpus doesn't use"
        )
    if given is not None and own is not None and given != own:
        raise ConfigError(f"training.mask_token_id: {given} is not the mask token of {path}, {own}; remove the key")
    mask_id = own if given is None else given
    assert mask_id is not None
    if mask_id >= vocab_size:
        raise ConfigError(
            f"training.mask_token_id: {mask_id}, that of {path}, is outside the model's vocabulary of {vocab_size}; give a "
            "model of this tokenizer"
        )
    return mask_id
