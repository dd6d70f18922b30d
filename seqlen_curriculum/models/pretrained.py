"""Trained models and their tokenizers, from checkpoints, runs and Hugging Face folders; nothing is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from seqlen_curriculum.data.tokenizer import END_OF_TEXT, read_tokenizer, tokenizer_files, vocab_size
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.files import follow_umask
from seqlen_curriculum.run_folder.model_folder import model_folder, vocabulary

__all__ = [
    "copy_tokenizer",
    "load_model",
    "load_tokenizer",
    "model_folder",
    "quiet",
    "replace_invalid_generation_config",
    "save_pretrained",
    "save_tokenizer",
    "save_weights",
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
    """Load the ``AutoModelForCausalLM`` of ``model_folder(path)`` on the CPU, in eval mode.

    Padding rows of the vocabulary are removed unless ``padding``. The default ``dtype`` is float32 for any saved dtype: it
    represents every saved value exactly, and sums of logits need its precision. None keeps the saved one. Raises
    CheckpointError.
    """
    folder = model_folder(path)
    try:
        with quiet():
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # damaged files make the libraries raise almost anything
        message = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder}: can't be loaded as a causal language model ({type(error).__name__}: {message})"
        ) from error
    # transformers only warns about missing weights and initialises them randomly.
    lost = sorted({*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])})
    if lost:
        raise CheckpointError(
            f"{folder}: {len(lost)} of the model's weights are missing, such as {lost[0]}; give a complete model with a head"
        )
    size = vocabulary(folder)
    if not padding and size is not None and size < model.get_input_embeddings().num_embeddings:
        with quiet():
            model.resize_token_embeddings(size)
    replace_invalid_generation_config(model)
    return model.eval()


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write ``weights`` as safetensors for transformers, with file modes that follow the umask."""
    save_file(dict(weights), path, metadata={"format": "pt"})
    follow_umask(path)


def save_pretrained(model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write transformers' ``model``, or ``weights`` instead of its own, to ``folder``, with modes that follow the umask."""
    with quiet():
        model.save_pretrained(folder, state_dict=weights)
    for path in folder.glob("*.safetensors"):
        follow_umask(path)


def replace_invalid_generation_config(model: Any) -> None:
    """Replace an inconsistent ``generation_config.json`` by defaults.

    transformers loads such a file, for example ``temperature`` without ``do_sample``, but refuses to save it.
    """
    with quiet():
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            model.generation_config = GenerationConfig.from_model_config(model.config)


def load_tokenizer(path: Path, tokenizer: Path | None = None) -> Tokenizer:
    """Load the tokenizer of ``model_folder(path)``, or that at ``tokenizer``: a file, or a folder.

    Raises CheckpointError, and ConfigError if there is none or it has more tokens than the model.
    """
    folder = model_folder(path)
    if tokenizer is None and not tokenizer_files(folder):
        raise ConfigError(
            f"{folder}: has no tokenizer.json; give --tokenizer, a tokenizer.json or a folder with one or with GPT-2's "
            "encoder.json and vocab.bpe"
        )
    loaded, size = read_tokenizer(tokenizer or folder), vocabulary(folder)
    if size is not None and vocab_size(loaded) > size:
        raise ConfigError(
            f"{tokenizer or folder}: the tokenizer has {vocab_size(loaded)} tokens, the model in {folder} {size}; give the "
            "--tokenizer that it was trained with"
        )
    return loaded


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer.from_pretrained(folder)``."""
    special_tokens = {}
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        special_tokens = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens).save_pretrained(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer at ``source``, a file or folder as in ``load_tokenizer``, to ``folder``, for ``AutoTokenizer``.

    The files of a Hugging Face folder are copied unchanged, including the chat template. Raises ConfigError.
    """
    if not (source / "tokenizer_config.json").exists():
        save_tokenizer(read_tokenizer(source), folder)
        return
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


@contextmanager
def quiet() -> Iterator[None]:
    """Disable the progress bars and warnings of transformers. Errors are raised as usual."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
