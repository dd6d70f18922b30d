"""Merge finished corpora. The result equals one preparation of all their texts."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from seqlen_curriculum.config.data import corpus_prefix
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.data.preparation.corpus_record import (
    PreparedCorpus,
    check_prefix,
    find_prepared,
    require_record,
)
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.files import writable_folder

__all__ = ["merge", "merge_records"]


def merge(prefixes: Sequence[str | os.PathLike[str]], output_prefix: str, overwrite: bool = False) -> PreparedCorpus:
    """Concatenate the corpora ``prefixes``; all files equal those of one preparation of all texts.

    Settings that differ are listed in the record, one value per corpus. Raises ``DataError`` for corpora with different
    vocabularies, tokenizers or document ends, for a corpus given twice, and for a corpus without its record.
    """
    prefix, given = corpus_prefix(output_prefix), [corpus_prefix(path) for path in prefixes]
    paths = [os.path.realpath(path) for path in [*given, prefix]]
    if len(set(paths)) < len(paths):
        raise DataError(f"{', '.join(given)} to {prefix}: a corpus is given twice; give each corpus once")
    records = [require_record(path) for path in given]
    _check_alike(given, records)
    record = merge_records(records)
    facts = {key: record[key] for key in ("settings", "inputs")}
    if not overwrite:
        prepared = find_prepared(prefix, facts, overwrite, lambda _: False)
        if prepared is not None:
            return PreparedCorpus(prefix, True, prepared)
    check_prefix(prefix)
    writable_folder("--out", Path(prefix).resolve().parent)
    total_bytes = sum(os.path.getsize(path + ".bin") for path in given)
    bar = tqdm(desc="merging", total=total_bytes, unit="B", unit_scale=True, file=sys.stderr, disable=None)
    with bar, CorpusWriter(prefix, record["vocab_size"]) as writer:
        for path in given:
            writer.add_corpus(path)
            bar.update(os.path.getsize(path + ".bin"))
        writer.add_file(".tokenizer.json", Path(given[0] + ".tokenizer.json").read_bytes())
        writer.add_file(".json", json.dumps(record, indent=2).encode() + b"\n")
    return PreparedCorpus(prefix, False, record)


def _check_alike(prefixes: Sequence[str], records: Sequence[dict[str, Any]]) -> None:
    """Raise ``DataError`` if a corpus differs from the first one, naming it and each difference."""
    identities = []
    for prefix, record in zip(prefixes, records, strict=True):
        identity = {"dtype": IndexedCorpus(prefix).dtype.name}
        identity |= {key: record[key] for key in ("vocab_size", "end_of_text_id")}
        identity["append_eod"] = record["settings"]["append_eod"]
        # Two tokenizers of the same size may give different ids, so their files are compared; the message shows 8 digits.
        tokenizer = Path(prefix + ".tokenizer.json").read_bytes()
        identity["tokenizer"] = hashlib.blake2b(tokenizer, digest_size=4).hexdigest()
        identities.append(identity)
    first = identities[0]
    for prefix, identity in zip(prefixes[1:], identities[1:], strict=True):
        differing = [f"{key} ({first[key]} and {identity[key]})" for key in first if first[key] != identity[key]]
        if differing:
            raise DataError(
                f"{prefixes[0]} and {prefix}: differ in {', '.join(differing)}; prepare them with the same settings"
            )


def merge_records(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of the merged corpus.

    Counts are added. A setting with the same value in all corpora is kept. Any other becomes a list with one value per
    corpus: json_keys ``["text"]`` and ``["body"]`` give ``[["text"], ["body"]]``.
    """
    merged = dict(records[0])
    for key in ("documents", "tokens", "text_bytes"):
        merged[key] = sum(record[key] for record in records)
    left_out: Counter[str] = Counter()
    for record in records:
        left_out.update(record["left_out"])
    merged["left_out"] = dict(left_out)
    merged["settings"] = {}
    for key, value in records[0]["settings"].items():
        values = [record["settings"][key] for record in records]
        merged["settings"][key] = value if all(other == value for other in values) else values
    merged["inputs"] = [path for record in records for path in record["inputs"]]
    return merged
