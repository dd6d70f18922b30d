"""The token that ends each document: the one given, or the tokenizer's or the model's own end-of-sequence token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from seqlen_curriculum.data.tokenizer import END_OF_TEXT, located
from seqlen_curriculum.errors import ConfigError

__all__ = ["choose_end", "named_tokens", "own_end"]

_RECORD_SUFFIX = ".tokenizer.json"
PUBLISHED_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")
"""Ends of GPT-2 and Qwen, Llama 3, DeepSeek, Llama 2 and OPT, Gemma: for a tokenizer without files that name its end."""
_SHOWN_TOKENS = 6


def choose_end(given: str | None, path: Path, tokenizer: Tokenizer, required: bool) -> str | None:
    """Return the token that ends a document: ``given``, else the own one of the tokenizer at ``path``.

    Raises ConfigError for a token that the tokenizer lacks, and if none is known although one is ``required``.
    """
    if given is None:
        end = own_end(path, tokenizer)
        if end is None and required:
            raise ConfigError(
                f"{path}: does not name the token that ends a document; give --eod-token, for example {_listed(tokenizer)}, "
                "or --no-append-eod"
            )
        return end
    if tokenizer.token_to_id(given) is None:
        raise ConfigError(
            f"--eod-token {given!r}: {path} has no such token; give one that it has, such as {_listed(tokenizer)}"
        )
    return given


def own_end(path: Path, tokenizer: Tokenizer) -> str | None:
    """Return the end-of-sequence token of the tokenizer at ``path``, a file or a folder. None if no file names one.

    For the tokenizer of a prepared corpus it is the token that ends the corpus's documents.
    """
    path = located(path)
    if path.name.endswith(_RECORD_SUFFIX):
        names = _of_corpus(path, tokenizer)
    else:
        names = _of_folder(path if path.is_dir() else path.parent, tokenizer)
    known = (name for name in (*names, *PUBLISHED_ENDS) if isinstance(name, str))
    return next((name for name in known if tokenizer.token_to_id(name) is not None), None)


def _of_corpus(path: Path, tokenizer: Tokenizer) -> Iterator[Any]:
    record = _object(path.with_name(path.name.removesuffix(_RECORD_SUFFIX) + ".json"))
    yield _token(record.get("end_of_text_id"), tokenizer)


def _of_folder(folder: Path, tokenizer: Tokenizer) -> Iterator[Any]:
    yield from named_tokens(folder, "eos_token")
    for name in ("generation_config.json", "config.json"):
        end = _object(folder / name).get("eos_token_id")  # a number, or a list: Llama 3 Instruct has three
        yield _token(end[0] if isinstance(end, list) and end else end, tokenizer)


def named_tokens(folder: Path, role: str) -> Iterator[Any]:
    """Yield the token that each file of the tokenizer in ``folder`` names for ``role``, such as ``mask_token``."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _object(folder / name).get(role)  # a string, or an object with the properties of the token
        yield token.get("content") if isinstance(token, dict) else token


def _token(number: object, tokenizer: Tokenizer) -> str | None:
    return tokenizer.id_to_token(number) if type(number) is int and 0 <= number < 2**31 else None


def _object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if there is no such file: these files are optional."""
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _listed(tokenizer: Tokenizer) -> str:
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return ", ".join(map(repr, special[:_SHOWN_TOKENS])) or "the last one of its vocabulary"
