"""Prepares a corpus: text files to ``PREFIX.bin``, ``PREFIX.idx``, ``PREFIX.tokenizer.json`` and ``PREFIX.json``."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer
from tqdm import tqdm

from seqlen_curriculum.config.data import corpus_prefix
from seqlen_curriculum.data.preparation.corpus_record import OUTPUTS, Prepared, check_folder, existing
from seqlen_curriculum.data.preparation.encode import Encoded, encode
from seqlen_curriculum.data.preparation.input_files import find_files, stdlib_files
from seqlen_curriculum.data.preparation.pieces import PIECE_BYTES, Piece, Rules, batches
from seqlen_curriculum.data.preparation.resumable import Partial, publish_finished
from seqlen_curriculum.data.preparation.texts import TOLD, Tally, parts
from seqlen_curriculum.data.tokenizer import (
    END_OF_TEXT,
    TokenizerChoice,
    build_tokenizer,
    end_of_text_id,
    file_facts,
    splits_at_spaces,
    vocab_size,
)
from seqlen_curriculum.errors import ConfigError, DataError

__all__ = ["Prepared", "Request", "prepare"]


@dataclass(frozen=True)
class Request:
    """What to prepare from what."""

    output_prefix: str
    """Path of the outputs without suffix."""
    tokenizer: TokenizerChoice
    inputs: Sequence[Path] = ()
    """Text, JSON lines and tables, and folders of them."""
    stdlib: bool = False
    """Read the running Python's own ``.py`` files, a document each."""
    rules: Rules = field(default_factory=Rules)
    """How inputs become documents; ``cut_text`` is the tokenizer's to tell."""
    workers: int = field(default_factory=lambda: _all_cores())
    """Processes that encode; the result is the same for any number."""
    overwrite: bool = False
    """Replace outputs of other inputs or settings."""


def prepare(request: Request) -> Prepared:
    """Tokenize the inputs into a corpus, or find it done already with the same inputs and settings.

    Outputs appear together at the end, or not at all. What an interrupted call finished, the next one with the same
    inputs and settings continues. Raises ``ConfigError`` for options and tokenizer files, ``DataError`` for inputs,
    for outputs of something else without ``overwrite``, and while another process prepares the same.
    """
    _check(request)
    prefix = corpus_prefix(request.output_prefix)
    files = _files(request, prefix)
    facts = _facts(request, files)
    if publish_finished(prefix) or not request.overwrite:
        record = existing(prefix, facts, request.overwrite, request.rules.stops_at)
        if record is not None:
            return Prepared(prefix, True, record)
    check_folder(prefix)
    makers = {"piece_bytes": PIECE_BYTES, "tokenizers": tokenizers.__version__}  # a partial of others can't go on
    with Partial(prefix, {**facts, **makers}, request.rules.stops_at) as partial:
        tokenizer = _tokenizer(request, files, partial)
        speed = _encode_into(partial, files, tokenizer, request)
        record = {**_totals(partial, tokenizer), **facts}
        partial.finish(tokenizer.to_str(pretty=True), record)
    return Prepared(prefix, False, record, speed)


def _check(request: Request) -> None:
    request.tokenizer.check()
    rules = request.rules
    if request.workers < 1:
        raise ConfigError(f"--workers: {request.workers} is not valid: it must be 1 or more")
    if not rules.json_keys:
        raise ConfigError("--json-keys: no key given; name at least one, such as text")
    if rules.max_line_bytes < 1024:
        raise ConfigError(f"--max-line-bytes: {rules.max_line_bytes} is not valid: it must be 1024 or more")
    if not request.output_prefix or request.output_prefix.endswith(("/", os.sep)):
        raise ConfigError(f"--output-prefix: {request.output_prefix!r} names no file; add one, as in corpus/text")
    if not request.inputs and not request.stdlib:
        raise ConfigError("--input: nothing to prepare; name text or JSON lines files or folders, or give --stdlib")


def _all_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _files(request: Request, prefix: str) -> list[Path]:
    # A folder of inputs may hold the outputs of an earlier run.
    found = find_files(request.inputs, [Path(prefix + suffix) for suffix in OUTPUTS])
    return found + (stdlib_files() if request.stdlib else [])


def _facts(request: Request, files: Iterable[Path]) -> dict[str, Any]:
    """What decides the outputs: equal facts mean that nothing is left to do."""
    settings = {
        "end_of_text": END_OF_TEXT,
        "append_eod": request.rules.append_eod,
        "json_keys": list(request.rules.json_keys),
        "max_line_bytes": request.rules.max_line_bytes,
        "tokenizer": request.tokenizer.facts(),
    }
    return {"settings": settings, "inputs": [file_facts(path, DataError) for path in files]}


def _tokenizer(request: Request, files: Sequence[Path], partial: Partial) -> Tokenizer:
    if (trained := partial.trained()) is not None:
        return Tokenizer.from_str(trained)
    tokenizer = build_tokenizer(request.tokenizer, _texts(files, request.rules))
    if request.tokenizer.train_vocab is not None:
        partial.keep_trained(tokenizer.to_str())
    return tokenizer


def _texts(files: Sequence[Path], rules: Rules) -> Iterator[str]:
    """Every document's text, long ones in parts, for a tokenizer to train on."""
    with _bar("training the tokenizer", files) as bar:
        for batch in batches(files, rules):
            tally = Tally(rules)  # what is left out is told when it is encoded
            yield from (part.text for piece in batch for part in parts(piece, rules, tally))
            bar.update(_read_bytes(batch))


def _bar(what: str, files: Iterable[Path]) -> Any:
    return tqdm(desc=what, total=_input_bytes(files), unit="B", unit_scale=True, file=sys.stderr, mininterval=0.5)


def _input_bytes(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _read_bytes(batch: Iterable[Piece]) -> int:
    return sum(piece.input_bytes for piece in batch)


def _encode_into(partial: Partial, files: Sequence[Path], tokenizer: Tokenizer, request: Request) -> float:
    """Append all documents behind those that are done; returns the bytes of text encoded a second."""
    rules = replace(request.rules, cut_text=splits_at_spaces(tokenizer))
    workers = min(request.workers, -(-_input_bytes(files) // PIECE_BYTES) or 1)  # none without a batch to encode
    stream = batches(files, rules)
    progress = partial.progress
    began, start = progress.text_bytes, time.monotonic()
    partial.open(vocab_size(tokenizer))
    with _bar("encoding", files) as bar:
        for batch in islice(stream, progress.batches):
            bar.update(_read_bytes(batch))
        for encoded in encode(stream, tokenizer.to_str(), rules, workers):
            _tell(encoded, progress.left_out)
            partial.add(encoded.tokens, encoded.ends, encoded.text_bytes, encoded.left_out)
            bar.update(encoded.input_bytes)
    return (progress.text_bytes - began) / (time.monotonic() - start)


def _tell(encoded: Encoded, before: Mapping[str, int]) -> None:
    """Print the first problems of each kind; the others are counted only."""
    counts = Counter(before)
    for kind, told in encoded.told:
        counts[kind] += 1
        if counts[kind] <= TOLD:
            tqdm.write(f"warning: {told}; left out", file=sys.stderr)


def _totals(partial: Partial, tokenizer: Tokenizer) -> dict[str, Any]:
    found = partial.progress
    if not found.num_documents:
        left_out = ", ".join(f"{count} {kind}" for kind, count in found.left_out.items()) or "nothing"
        raise DataError(f"--input: no text in it (left out: {left_out}); give another")
    return {
        "vocab_size": vocab_size(tokenizer),
        "end_of_text_id": end_of_text_id(tokenizer),
        "documents": found.num_documents,
        "tokens": found.num_tokens,
        "text_bytes": found.text_bytes,
        "left_out": found.left_out,
    }
