"""The tokenizers of trained models, in Hugging Face's format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from seqlen_curriculum.data.mask_tokens import MASK_TOKENS
from seqlen_curriculum.data.tokenizer import END_OF_TEXT, read_tokenizer, tokenizer_files, vocab_size
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import read_json
from seqlen_curriculum.models.pretrained import quiet
from seqlen_curriculum.run_folder.model_files import TOKENIZER_FILES, ordinary_file
from seqlen_curriculum.run_folder.model_folder import model_folder, sizes_in, vocabulary

__all__ = ["copy_tokenizer", "load_tokenizer", "save_tokenizer"]


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


def save_tokenizer(tokenizer: Tokenizer, folder: Path, end: str | None = None, positions: int | None = None) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer.from_pretrained(folder)``.

    ``end`` is its end-of-sequence token, by default ``<|endoftext|>`` if it has that; ``positions`` is the longest input.
    """
    if end is None and tokenizer.token_to_id(END_OF_TEXT) is not None:
        end = END_OF_TEXT
    special_tokens = {"eos_token": end, "bos_token": end} if end is not None else {}
    masks = [mask for mask in MASK_TOKENS if tokenizer.token_to_id(mask) is not None]
    special_tokens |= {"mask_token": masks[0]} if masks else {}
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens).save_pretrained(folder)
    _complete_config(folder, end, positions)


def copy_tokenizer(source: Path, folder: Path, end: str | None = None, positions: int | None = None) -> None:
    """Copy the tokenizer at ``source``, a file or folder as in ``load_tokenizer``, to ``folder``, for ``AutoTokenizer``.

    The files of a Hugging Face folder are copied, including the chat template, but not through links that lead out of it.
    ``end`` and ``positions`` are as in ``save_tokenizer``. Raises ConfigError, CheckpointError.
    """
    if not (source / "tokenizer_config.json").exists():
        save_tokenizer(read_tokenizer(source), folder, end, positions)
        return
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(ordinary_file(source, name), folder / name)
    # A limit that is the number of positions of the source's model grows with them.
    outgrown = sizes_in(read_json(source / "config.json")) if (source / "config.json").exists() else {}
    _complete_config(folder, end, positions, outgrown.get("max_position_embeddings"))


def _complete_config(folder: Path, end: str | None, positions: int | None, outgrown: int | None = None) -> None:
    """Set end and longest input in ``tokenizer_config.json``, and write it so that transformers 4 loads it without code.

    A limit above ``positions``, or equal to ``outgrown``, becomes ``positions``.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    # transformers 5 writes a class and a list that transformers 4 doesn't know. It reads the older forms of both.
    if config.pop("auto_map", None) or config.get("tokenizer_class") == "TokenizersBackend":
        is_fast = (folder / "tokenizer.json").exists()
        config["tokenizer_class"] = "PreTrainedTokenizerFast" if is_fast else "GPT2Tokenizer"
        config.pop("backend", None)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # transformers writes 1e30 for an unknown limit, with which truncation=True truncates nothing.
    limit = config.get("model_max_length")
    is_own_limit = (
        isinstance(limit, (int, float)) and positions is not None and limit <= positions and limit != outgrown
    )
    if positions is not None and not is_own_limit:
        config["model_max_length"] = positions
    _write_end(path, config, end)
    tokens = folder / "special_tokens_map.json"
    if tokens.exists():
        _write_end(tokens, read_json(tokens), end)


def _write_end(path: Path, config: dict[str, Any], end: str | None) -> None:
    named = config.get("eos_token")
    if end is not None and (named.get("content") if isinstance(named, dict) else named) != end:
        config["eos_token"] = end
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
