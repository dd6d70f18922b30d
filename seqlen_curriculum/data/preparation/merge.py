"""Puts finished corpora together, as if their texts had been prepared in one."""

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
from seqlen_curriculum.data.preparation.corpus_record import Prepared, check_folder, existing, read_record
from seqlen_curriculum.data.writer import CorpusWriter
from seqlen_curriculum.errors import DataError

__all__ = ["merge"]


def merge(prefixes: Sequence[str | os.PathLike[str]], output_prefix: str, overwrite: bool = False) -> Prepared:
    """Write the corpora behind each other; .bin, .idx and tokenizer are what one preparation of all texts gives.

    So is the record, where all were prepared by the same settings. Raises ``DataError`` for corpora of different
    vocabularies, tokenizers or ends of documents, for one given twice, and for one without its record.
    """
    prefix, given = corpus_prefix(output_prefix), [corpus_prefix(path) for path in prefixes]
    paths = [os.path.realpath(path) for path in [*given, prefix]]
    if len(set(paths)) < len(paths):
        raise DataError(f"{', '.join(given)} to {prefix}: one is given twice; name each corpus once")
    records = [_record(path) for path in given]
    _check_same(given, records)
    record = _merged(records)
    facts = {key: record[key] for key in ("settings", "inputs")}
    if not overwrite and (found := existing(prefix, facts, overwrite, lambda _: False)) is not None:
        return Prepared(prefix, True, found)
    check_folder(prefix)
    _copy(given, prefix, record)
    return Prepared(prefix, False, record)


def _record(prefix: str) -> dict[str, Any]:
    IndexedCorpus(prefix)  # raises for a damaged pair
    record = read_record(prefix)
    if not {"settings", "inputs", "left_out"} <= record.keys() or not os.path.exists(prefix + ".tokenizer.json"):
        raise DataError(f"{prefix}: no {prefix}.json and .tokenizer.json of prepare_data.py; prepare its text again")
    return record


def _check_same(prefixes: Sequence[str], records: Sequence[dict[str, Any]]) -> None:
    """Raise ``DataError`` naming the first corpus that differs from the first one, and in what."""
    first, *others = (_identity(prefix, record) for prefix, record in zip(prefixes, records, strict=True))
    for prefix, other in zip(prefixes[1:], others, strict=True):
        differing = [f"{key} ({first[key]} and {other[key]})" for key in first if first[key] != other[key]]
        if differing:
            raise DataError(f"{prefixes[0]} and {prefix}: differ in {', '.join(differing)}; prepare them alike")


def _identity(prefix: str, record: dict[str, Any]) -> dict[str, Any]:
    tokenizer = hashlib.blake2b(Path(prefix + ".tokenizer.json").read_bytes(), digest_size=4).hexdigest()
    known = {key: record[key] for key in ("vocab_size", "end_of_text_id")}
    append_eod = record["settings"]["append_eod"]
    return {"dtype": IndexedCorpus(prefix).dtype.name, **known, "append_eod": append_eod, "tokenizer": tokenizer}


def _merged(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The record of all together; settings that differ are listed."""
    left_out: Counter[str] = Counter()
    for record in records:
        left_out.update(record["left_out"])
    totals = {key: sum(record[key] for record in records) for key in ("documents", "tokens", "text_bytes")}
    settings = {
        key: value if all(record["settings"][key] == value for record in records) else _listed(records, key)
        for key, value in records[0]["settings"].items()
    }
    inputs = [given for record in records for given in record["inputs"]]
    return {**records[0], **totals, "left_out": dict(left_out), "settings": settings, "inputs": inputs}


def _listed(records: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [record["settings"][key] for record in records]


def _copy(given: Sequence[str], prefix: str, record: dict[str, Any]) -> None:
    total = sum(os.path.getsize(path + ".bin") for path in given)
    bar = tqdm(desc="merging", total=total, unit="B", unit_scale=True, file=sys.stderr)
    with bar, CorpusWriter(prefix, record["vocab_size"]) as writer:
        for path in given:
            writer.add_corpus(path)
            bar.update(os.path.getsize(path + ".bin"))
        writer.add_file(".tokenizer.json", Path(given[0] + ".tokenizer.json").read_bytes())
        writer.add_file(".json", json.dumps(record, indent=2).encode() + b"\n")
