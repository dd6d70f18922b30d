"""Prepare a corpus: from text files make ``PREFIX.bin``, ``PREFIX.idx``, ``PREFIX.tokenizer.json`` and ``PREFIX.json``."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer
from tqdm import tqdm

from seqlen_curriculum.config.data import corpus_prefix
from seqlen_curriculum.data.preparation.corpus_record import OUTPUTS, PreparedCorpus, check_prefix, find_prepared
from seqlen_curriculum.data.preparation.encode import EncodedBatch, encode
from seqlen_curriculum.data.preparation.input_files import find_files, stdlib_files
from seqlen_curriculum.data.preparation.pieces import PIECE_BYTES, Rules, batches
from seqlen_curriculum.data.preparation.resumable import PartialCorpus, publish_finished
from seqlen_curriculum.data.preparation.texts import REPORTED_PROBLEMS, Tally, text_parts
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
from seqlen_curriculum.files import writable_folder

__all__ = ["Request", "prepare", "usable_cores"]


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Request:
    """What to prepare from what."""

    output_prefix: str
    """Path of the outputs without suffix."""
    tokenizer: TokenizerChoice
    inputs: Sequence[Path] = ()
    """Text, JSON lines and tables, and folders of them."""
    stdlib: bool = False
    """Read the ``.py`` files of the running Python, one document each."""
    rules: Rules = field(default_factory=Rules)
    """How inputs become documents; ``cut_text`` is set by the tokenizer."""
    workers: int = field(default_factory=usable_cores)
    """Processes that encode; the result is the same for any number."""
    overwrite: bool = False
    """Replace outputs of other inputs or settings."""

    def check(self) -> None:
        """Raise ``ConfigError`` for an option that is missing or out of range."""
        self.tokenizer.check()
        if self.workers < 1:
            raise ConfigError(f"--workers: {self.workers} is not valid: it must be 1 or more")
        if not self.rules.json_keys:
            raise ConfigError("--json-keys: no key given; name at least one, such as text")
        if self.rules.max_line_bytes < 1024:
            raise ConfigError(f"--max-line-bytes: {self.rules.max_line_bytes} is not valid: it must be 1024 or more")
        check_prefix(corpus_prefix(self.output_prefix))
        if not self.inputs and not self.stdlib:
            raise ConfigError("--input: nothing to prepare; name text or JSON lines files or folders, or give --stdlib")

    def facts(self, files: Iterable[Path]) -> dict[str, Any]:
        """Return everything that decides the outputs: with equal facts nothing is left to do."""
        settings = {
            "end_of_text": END_OF_TEXT,
            "append_eod": self.rules.append_eod,
            "json_keys": list(self.rules.json_keys),
            "max_line_bytes": self.rules.max_line_bytes,
            "tokenizer": self.tokenizer.facts(),
        }
        return {"settings": settings, "inputs": [file_facts(path, DataError) for path in files]}


def prepare(request: Request) -> PreparedCorpus:
    """Tokenize the inputs into a corpus, unless that was done already with the same inputs and settings.

    Outputs appear together at the end, or not at all. After an interruption, a call with the same inputs and settings
    resumes. Raises ``ConfigError`` for options and tokenizer files, and ``DataError`` for inputs, for outputs of something
    else without ``overwrite``, and while another process prepares the same corpus.
    """
    request.check()
    prefix = corpus_prefix(request.output_prefix)
    # A folder of inputs may hold the outputs of an earlier run.
    files = find_files(request.inputs, [Path(prefix + suffix) for suffix in OUTPUTS])
    files += stdlib_files() if request.stdlib else []
    facts = request.facts(files)
    # A corpus that was finished but not moved is this one, even with overwrite: a killed run was about to put it there.
    if publish_finished(prefix) or not request.overwrite:
        record = find_prepared(prefix, facts, request.overwrite, request.rules.stops_at)
        if record is not None:
            return PreparedCorpus(prefix, True, record)
    writable_folder("--output-prefix", Path(prefix).resolve().parent)
    # Done work is counted in batches, so it can be resumed only with batches of the same size and the same library.
    reader = {"piece_bytes": PIECE_BYTES, "tokenizers": tokenizers.__version__}
    with PartialCorpus(prefix, {**facts, **reader}, request.rules.stops_at) as partial:
        job = _Job(request, files, partial)
        tokenizer = job.tokenizer()
        speed = job.encode_with(tokenizer)
        record = {**job.totals(tokenizer), **facts}
        partial.finish(tokenizer.to_str(pretty=True), record)
    return PreparedCorpus(prefix, False, record, speed)


@dataclass(frozen=True)
class _Job:
    """The work on one corpus: train its tokenizer if need be, encode, count."""

    request: Request
    files: Sequence[Path]
    partial: PartialCorpus

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that was chosen, or that an interrupted call trained."""
        trained = self.partial.trained()
        if trained is not None:
            return Tokenizer.from_str(trained)
        tokenizer = build_tokenizer(self.request.tokenizer, self.texts())
        if self.request.tokenizer.train_vocab is not None:
            self.partial.keep_trained(tokenizer.to_str())
        return tokenizer

    def texts(self) -> Iterator[str]:
        """Yield the text of every document, long ones in parts, for a tokenizer to train on."""
        rules = self.request.rules
        with self.progress_bar("training the tokenizer") as bar:
            for batch in batches(self.files, rules):
                tally = Tally(rules)  # not printed here but when the same batch is encoded
                for piece in batch:
                    for part in text_parts(piece, rules, tally):
                        yield part.text
                bar.update(sum(piece.input_bytes for piece in batch))

    def encode_with(self, tokenizer: Tokenizer) -> float:
        """Append all documents that aren't done yet; return the bytes of text encoded per second."""
        rules = replace(self.request.rules, cut_text=splits_at_spaces(tokenizer))
        max_batches = -(-self.input_bytes() // PIECE_BYTES)  # 600,000 bytes: 3 pieces of 256 KiB, so 3 workers
        workers = min(self.request.workers, max_batches or 1)
        progress = self.partial.progress
        done_bytes, start = progress.text_bytes, time.monotonic()
        self.partial.open(vocab_size(tokenizer))
        stream = batches(self.files, rules)
        with self.progress_bar("encoding") as bar:
            # Batches that are done are read again, because only reading shows where the next one starts; it costs little.
            for batch in islice(stream, progress.batches):
                bar.update(sum(piece.input_bytes for piece in batch))
            for encoded in encode(stream, tokenizer.to_str(), rules, workers):
                self.print_problems(encoded)
                self.partial.add(encoded.tokens, encoded.ends, encoded.text_bytes, encoded.left_out)
                bar.update(encoded.input_bytes)
        return (progress.text_bytes - done_bytes) / (time.monotonic() - start)

    def print_problems(self, encoded: EncodedBatch) -> None:
        """Print the problems of a batch that are among the first of their kind in the whole input."""
        counts = Counter(self.partial.progress.left_out)
        for kind, message in encoded.problems:
            counts[kind] += 1
            if counts[kind] <= REPORTED_PROBLEMS:
                tqdm.write(f"warning: {message}; left out", file=sys.stderr)

    def totals(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the numbers of the record. Raises ``DataError`` if no document is left."""
        progress = self.partial.progress
        if not progress.num_documents:
            left_out = ", ".join(f"{count} {kind}" for kind, count in progress.left_out.items()) or "nothing"
            raise DataError(f"--input: no text in it (left out: {left_out}); give another")
        return {
            "vocab_size": vocab_size(tokenizer),
            "end_of_text_id": end_of_text_id(tokenizer),
            "documents": progress.num_documents,
            "tokens": progress.num_tokens,
            "text_bytes": progress.text_bytes,
            "left_out": progress.left_out,
        }

    def input_bytes(self) -> int:
        """Return the size of all input files."""
        return sum(path.stat().st_size for path in self.files)

    def progress_bar(self, work: str) -> Any:
        """Return a progress bar over the bytes of all input files."""
        return tqdm(desc=work, total=self.input_bytes(), unit="B", unit_scale=True, file=sys.stderr, mininterval=0.5)
