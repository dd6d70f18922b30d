"""Trained models and their tokenizers, from checkpoints, runs and Hugging Face folders; nothing is fetched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from seqlen_curriculum.data.tokenizer import END_OF_TEXT, read_tokenizer, tokenizer_files, vocab_size
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.run_folder.model_folder import model_folder, vocabulary

__all__ = [
    "copy_tokenizer",
    "load_model",
    "load_tokenizer",
    "mend_generation",
    "model_folder",
    "quiet",
    "save_tokenizer",
]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def load_model(path: Path, dtype: torch.dtype | None = torch.float32, padding: bool = False) -> Any:
    """The ``AutoModelForCausalLM`` of ``model_folder(path)`` on the CPU, in eval mode, without padding rows unless asked.

    ``dtype`` is float32 whatever was saved: it holds every saved value exactly, and logits that are compared or summed
    need its digits; None for the saved one. Raises CheckpointError.
    """
    folder = model_folder(path)
    try:
        with quiet():
            model, told = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # damaged files make the libraries raise nearly anything
        raise CheckpointError(f"{folder}: can't be loaded as a causal language model ({_first_line(error)})") from error
    lost = sorted({*told["missing_keys"], *(key[0] for key in told["mismatched_keys"])})
    if lost:
        raise CheckpointError(
            f"{folder}: its files lack {len(lost)} of the model's weights, such as {lost[0]}; give a whole model with a head"
        )
    if not padding:
        _cut_vocabulary(model, vocabulary(folder))
    mend_generation(model)
    return model.eval()


def mend_generation(model: Any) -> None:
    """Put defaults for a ``generation_config.json`` that contradicts itself: transformers would refuse to save it again."""
    with quiet():
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            model.generation_config = GenerationConfig.from_model_config(model.config)


def _cut_vocabulary(model: Any, size: int | None) -> None:
    if size is not None and size < model.get_input_embeddings().num_embeddings:
        with quiet():
            model.resize_token_embeddings(size)


def load_tokenizer(path: Path, tokenizer: Path | None = None) -> Tokenizer:
    """The tokenizer of ``model_folder(path)``, or the one at ``tokenizer``: a file, a folder, GPT-2's pair of files.

    Raises CheckpointError, and ConfigError where there is none or it has more tokens than the model.
    """
    folder = model_folder(path)
    if tokenizer is None and not tokenizer_files(folder):
        raise ConfigError(
            f"{folder}: has no tokenizer.json; give --tokenizer, a tokenizer.json or a folder with one or with GPT-2's "
            "encoder.json and vocab.bpe"
        )
    found, size = read_tokenizer(tokenizer or folder), vocabulary(folder)
    if size is not None and vocab_size(found) > size:
        raise ConfigError(
            f"{tokenizer or folder}: the tokenizer has {vocab_size(found)} tokens, the model in {folder} {size}; give the "
            "--tokenizer that it was trained with"
        )
    return found


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer.from_pretrained(folder)``."""
    ends = tokenizer.token_to_id(END_OF_TEXT) is not None
    names = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT} if ends else {}
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put the tokenizer at ``source``, a file or folder as for ``load_tokenizer``, into ``folder``, for ``AutoTokenizer``.

    What a Hugging Face folder has is copied as it is, chat template and all. Raises ConfigError.
    """
    if not (source / "tokenizer_config.json").exists():
        save_tokenizer(read_tokenizer(source), folder)
        return
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and advice off the terminal; its errors are raised all the same."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
