"""Prepare a corpus: write ``PREFIX.bin``, ``PREFIX.idx``, ``PREFIX.tokenizer.json`` and ``PREFIX.json`` from text files."""

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
from seqlen_curriculum.data.document_end import choose_end
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
    file_facts,
    splits_at_spaces,
    vocab_size,
)
from seqlen_curriculum.errors import ConfigError, DataError, printable
from seqlen_curriculum.files import writable_folder

__all__ = ["Request", "prepare", "usable_cores"]


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Request:
    """The inputs, outputs and options of a preparation."""

    output_prefix: str
    """Path of the outputs without suffix."""
    tokenizer: TokenizerChoice
    inputs: Sequence[Path] = ()
    """Files of text, JSON lines and tables, and folders of them."""
    stdlib: bool = False
    """Read the ``.py`` files of the running Python, one document each."""
    rules: Rules = field(default_factory=Rules)
    """The rules that turn inputs into documents; ``cut_text`` is set by the tokenizer."""
    workers: int = field(default_factory=usable_cores)
    """Number of encoding processes. The result is the same for any number."""
    overwrite: bool = False
    """Replace outputs that were made from other inputs or settings."""

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

    def read_tokenizer(self) -> tuple[Tokenizer | None, str | None]:
        """Return the tokenizer, None if it will be trained, and the token that ends a document. Raises ``ConfigError``."""
        choice, given = self.tokenizer, self.rules.eod_token
        if choice.train_vocab is not None:
            return None, given or END_OF_TEXT
        tokenizer, path = build_tokenizer(choice, ()), choice.tokenizer_file or choice.vocab_file
        assert path is not None
        return tokenizer, choose_end(given, path, tokenizer, self.rules.append_eod)

    def facts(self, files: Iterable[Path], end: str | None) -> dict[str, Any]:
        """Return everything that determines the outputs, to compare with a finished corpus."""
        settings = {
            "end_of_text": end,
            "append_eod": self.rules.append_eod,
            "json_keys": list(self.rules.json_keys),
            "max_line_bytes": self.rules.max_line_bytes,
            "tokenizer": self.tokenizer.facts(),
        }
        return {"settings": settings, "inputs": [file_facts(path, DataError) for path in files]}


def prepare(request: Request) -> PreparedCorpus:
    """Tokenize the inputs into a corpus, unless it already exists with the same inputs and settings.

    The outputs appear together at the end, or not at all. After an interruption, the same call resumes. Raises
    ``ConfigError`` for options and tokenizer files, and ``DataError`` for inputs, for outputs made from other inputs
    without ``overwrite``, and while another process prepares the same corpus.
    """
    request.check()
    prefix = corpus_prefix(request.output_prefix)
    # A folder of inputs may contain the outputs of an earlier preparation.
    files = find_files(request.inputs, [Path(prefix + suffix) for suffix in OUTPUTS])
    files += stdlib_files() if request.stdlib else []
    tokenizer, end = request.read_tokenizer()
    facts = request.facts(files, end)
    # Move a corpus that a killed process had finished, even with overwrite: it was about to replace the outputs.
    if publish_finished(prefix) or not request.overwrite:
        record = find_prepared(prefix, facts, request.overwrite, request.rules.stops_at)
        if record is not None:
            return PreparedCorpus(prefix, True, record)
    writable_folder("--out", Path(prefix).resolve().parent)
    # Progress is counted in batches, so resuming needs the same batch size and the same library.
    reader = {"piece_bytes": PIECE_BYTES, "tokenizers": tokenizers.__version__}
    with PartialCorpus(prefix, {**facts, **reader}, request.rules.stops_at) as partial:
        job = _Job(replace(request, rules=replace(request.rules, eod_token=end)), files, partial)
        tokenizer = tokenizer or job.trained_tokenizer()
        speed = job.encode_with(tokenizer)
        record = {**job.totals(tokenizer), **facts}
        partial.finish(tokenizer.to_str(pretty=True), record)
    return PreparedCorpus(prefix, False, record, speed)


@dataclass(frozen=True)
class _Job:
    """The steps that make one corpus: train its tokenizer if requested, encode, count."""

    request: Request
    files: Sequence[Path]
    partial: PartialCorpus

    def trained_tokenizer(self) -> Tokenizer:
        """Train the tokenizer, or return the one trained by an interrupted call."""
        trained = self.partial.trained()
        if trained is not None:
            return Tokenizer.from_str(trained)
        tokenizer = build_tokenizer(self.request.tokenizer, self.texts(), self.request.rules.eod_token or END_OF_TEXT)
        self.partial.keep_trained(tokenizer.to_str())
        return tokenizer

    def texts(self) -> Iterator[str]:
        """Yield the text of every document, long ones in parts, to train a tokenizer."""
        rules = self.request.rules
        with self.progress_bar("training the tokenizer") as bar:
            for batch in batches(self.files, rules):
                tally = Tally(rules)  # printed later, when the same batch is encoded
                for piece in batch:
                    for part in text_parts(piece, rules, tally):
                        yield part.text
                bar.update(sum(piece.input_bytes for piece in batch))

    def encode_with(self, tokenizer: Tokenizer) -> float:
        """Encode and append all remaining documents; return the bytes of text encoded per second."""
        rules = replace(self.request.rules, cut_text=splits_at_spaces(tokenizer))
        max_batches = -(-self.input_bytes() // PIECE_BYTES)  # 600,000 bytes: 3 pieces of 256 KiB, so 3 workers
        workers = min(self.request.workers, max_batches or 1)
        progress = self.partial.progress
        done_bytes, start = progress.text_bytes, time.monotonic()
        self.partial.open(vocab_size(tokenizer))
        stream = batches(self.files, rules)
        with self.progress_bar("encoding") as bar:
            # Finished batches are read again to find the start of the next one, which costs little.
            for batch in islice(stream, progress.batches):
                bar.update(sum(piece.input_bytes for piece in batch))
            for encoded in encode(stream, tokenizer.to_str(), rules, workers):
                self.print_problems(encoded)
                self.partial.add(encoded.tokens, encoded.ends, encoded.text_bytes, encoded.left_out)
                bar.update(encoded.input_bytes)
        return (progress.text_bytes - done_bytes) / max(time.monotonic() - start, 1e-3)  # a clock may tick rarely

    def print_problems(self, encoded: EncodedBatch) -> None:
        """Print those problems of a batch that are among the first of their kind in the whole input."""
        counts = Counter(self.partial.progress.left_out)
        for kind, message in encoded.problems:
            counts[kind] += 1
            if counts[kind] <= REPORTED_PROBLEMS:
                tqdm.write(f"warning: {printable(message)}; left out", file=sys.stderr)

    def totals(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the counts for the record. Raises ``DataError`` if there is no document."""
        progress, end = self.partial.progress, self.request.rules.eod_token
        if not progress.num_documents:
            left_out = ", ".join(f"{count} {kind}" for kind, count in progress.left_out.items()) or "nothing"
            raise DataError(f"--input: contains no text (left out: {left_out}); give another")
        return {
            "vocab_size": vocab_size(tokenizer),
            "end_of_text_id": tokenizer.token_to_id(end) if end is not None else None,
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
        return tqdm(
            desc=work,
            total=self.input_bytes(),
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            mininterval=0.5,
            disable=None,
        )
