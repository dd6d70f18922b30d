"""Prepares a corpus: text files to ``PREFIX.bin``, ``PREFIX.idx``, ``PREFIX.tokenizer.json`` and ``PREFIX.json``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from seqlen_curriculum.data.documents import PIECE_BYTES, batches, find_files, parts, stdlib_files
from seqlen_curriculum.data.encode import encode
from seqlen_curriculum.data.indexed import IndexedCorpus, corpus_prefix
from seqlen_curriculum.data.tokenizer import (
    END_OF_TEXT,
    TokenizerChoice,
    build_tokenizer,
    end_of_text_id,
    file_facts,
    splits_at_spaces,
    vocab_size,
)
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.errors import ConfigError, DataError

__all__ = ["Prepared", "Request", "prepare"]

_OUTPUTS = (".bin", ".idx", ".tokenizer.json", ".json")


@dataclass(frozen=True)
class Request:
    """What to prepare from what."""

    output_prefix: str
    """Path of the outputs without suffix."""
    tokenizer: TokenizerChoice
    inputs: Sequence[Path] = ()
    """Text or JSON lines files, ``.gz`` of either, and folders of them."""
    stdlib: bool = False
    """Read the running Python's own ``.py`` files, a document each."""
    json_keys: Sequence[str] = ("text",)
    """Keys of a JSON line whose texts, joined by newlines, are the document."""
    workers: int = field(default_factory=lambda: _all_cores())
    """Processes that encode; the result is the same for any number."""
    overwrite: bool = False
    """Replace outputs of other inputs or settings."""


@dataclass(frozen=True)
class Prepared:
    """What ``PREFIX.json`` records, and whether it was there before."""

    prefix: str
    already: bool
    record: dict[str, Any]

    def __str__(self) -> str:
        state = "already prepared" if self.already else "prepared"
        numbers = {key: self.record[key] for key in ("documents", "tokens", "text_bytes", "vocab_size")}
        told = "{documents:,} documents, {tokens:,} tokens of {text_bytes:,} bytes, vocabulary {vocab_size:,}"
        return f"{state}: {self.prefix} ({told.format(**numbers)})"


def prepare(request: Request) -> Prepared:
    """Tokenize the inputs into a corpus, or find it done already with the same inputs and settings.

    Outputs appear together at the end, or not at all. Raises ``ConfigError`` for options and tokenizer files,
    ``DataError`` for inputs, and for outputs of something else without ``overwrite``.
    """
    _check(request)
    prefix = corpus_prefix(request.output_prefix)
    files = _files(request, prefix)
    facts = _facts(request, files)
    if (record := _existing(prefix, facts, request.overwrite)) is not None:
        return Prepared(prefix, True, record)
    _check_folder(prefix)
    tokenizer = build_tokenizer(request.tokenizer, _texts(files, request.json_keys))
    return Prepared(prefix, False, _write(request, prefix, files, tokenizer, facts))


def _check(request: Request) -> None:
    request.tokenizer.check()
    if request.workers < 1:
        raise ConfigError(f"--workers: {request.workers} is not valid: it must be 1 or more")
    if not request.json_keys:
        raise ConfigError("--json-keys: no key given; name at least one, such as text")
    if not request.output_prefix or request.output_prefix.endswith(("/", os.sep)):
        raise ConfigError(f"--output-prefix: {request.output_prefix!r} names no file; add one, as in corpus/text")
    if not request.inputs and not request.stdlib:
        raise ConfigError("--input: nothing to prepare; name text or JSON lines files or folders, or give --stdlib")


def _all_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _files(request: Request, prefix: str) -> list[Path]:
    # A folder of inputs may hold the outputs of an earlier run.
    found = find_files(request.inputs, [Path(prefix + suffix) for suffix in _OUTPUTS])
    return found + (stdlib_files() if request.stdlib else [])


def _facts(request: Request, files: Iterable[Path]) -> dict[str, Any]:
    """What decides the outputs: equal facts mean that nothing is left to do."""
    settings = {
        "end_of_text": END_OF_TEXT,
        "json_keys": list(request.json_keys),
        "tokenizer": request.tokenizer.facts(),
    }
    return {"settings": settings, "inputs": [file_facts(path, DataError) for path in files]}


def _existing(prefix: str, facts: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The record of a complete corpus made from the same facts; ``None`` if there is none or it is to be replaced."""
    found = [prefix + suffix for suffix in _OUTPUTS if os.path.lexists(prefix + suffix)]
    if overwrite or not found:
        return None
    record = _read_record(prefix)
    if len(found) == len(_OUTPUTS) and all(record.get(key) == value for key, value in facts.items()):
        IndexedCorpus(prefix)  # raises if the pair was damaged since
        return record
    raise DataError(
        f"{found[0]}: exists and was not made from these inputs and settings; give --overwrite to replace it, "
        "or another --output-prefix"
    )


def _read_record(prefix: str) -> dict[str, Any]:
    try:
        record = json.loads(Path(prefix + ".json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _check_folder(prefix: str) -> None:
    """Tell of a folder that can't be written before the minutes of training a tokenizer."""
    folder = Path(prefix).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: can't be made ({error.strerror}); choose another --output-prefix") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"{folder}: this folder can't be written; choose another --output-prefix")


def _texts(files: Sequence[Path], json_keys: Sequence[str]) -> Iterator[str]:
    """Every document's text, long ones in parts, for a tokenizer to train on."""
    with _bar("training the tokenizer", files) as bar:
        for batch in batches(files, cut_text=True):
            yield from (part.text for piece in batch for part in parts(piece, json_keys))
            bar.update(sum(piece.input_bytes for piece in batch))


def _bar(what: str, files: Iterable[Path]) -> Any:
    return tqdm(desc=what, total=_input_bytes(files), unit="B", unit_scale=True, file=sys.stderr, mininterval=0.5)


def _input_bytes(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _write(
    request: Request, prefix: str, files: Sequence[Path], tokenizer: Tokenizer, facts: dict[str, Any]
) -> dict[str, Any]:
    with CorpusWriter(prefix, vocab_size(tokenizer)) as writer:
        counts = _encode_into(writer, files, tokenizer, request)
        if not writer.num_documents:
            raise DataError(f"{files[0]}: no text in this input ({counts['skipped_documents']} empty documents)")
        totals = {"documents": writer.num_documents, "tokens": writer.num_tokens, **counts}
        vocabulary = {"vocab_size": writer.vocab_size, "end_of_text_id": end_of_text_id(tokenizer)}
        record = {**vocabulary, **totals, **facts}
        writer.add_file(".tokenizer.json", tokenizer.to_str(pretty=True).encode())
        writer.add_file(".json", json.dumps(record, indent=2).encode() + b"\n")
    return record


def _encode_into(writer: CorpusWriter, files: Sequence[Path], tokenizer: Tokenizer, request: Request) -> dict[str, int]:
    """Append all documents; returns the counts that only the text tells."""
    workers = min(request.workers, -(-_input_bytes(files) // PIECE_BYTES) or 1)  # none without a batch to encode
    stream = batches(files, cut_text=splits_at_spaces(tokenizer))
    text_bytes = skipped = 0
    with _bar("encoding", files) as bar:
        for encoded in encode(stream, tokenizer.to_str(), request.json_keys, workers):
            writer.add_tokens(encoded.tokens, encoded.ends)
            text_bytes += encoded.text_bytes
            skipped += encoded.skipped
            bar.update(encoded.input_bytes)
    return {"text_bytes": text_bytes, "skipped_documents": skipped}
