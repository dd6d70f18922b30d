"""``PREFIX.json``, the record of what a corpus was made from, and whether it is complete and still up to date."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.errors import ConfigError, DataError
from seqlen_curriculum.files import writable_folder

__all__ = ["OUTPUTS", "Prepared", "check_folder", "existing", "read_record"]

OUTPUTS = (".bin", ".idx", ".tokenizer.json", ".json")


@dataclass(frozen=True)
class Prepared:
    """What ``PREFIX.json`` records, and whether it was there before."""

    prefix: str
    already: bool
    record: dict[str, Any]
    bytes_per_second: float | None = None
    """Bytes of text encoded a second, of this process."""

    def __str__(self) -> str:
        state = "already prepared" if self.already else "prepared"
        numbers = {key: self.record[key] for key in ("documents", "tokens", "text_bytes", "vocab_size")}
        told = "{documents:,} documents, {tokens:,} tokens of {text_bytes:,} bytes, vocabulary {vocab_size:,}"
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in self.record["left_out"].items())
        speed = "" if self.bytes_per_second is None else f", {self.bytes_per_second / 1e6:.2f} MB/s"
        told = f"{state}: {self.prefix} ({told.format(**numbers)}{speed})"
        return f"{told}; left out: {left_out}" if left_out else told


def existing(
    prefix: str, facts: Mapping[str, Any], overwrite: bool, stops_at: Callable[[str], bool]
) -> dict[str, Any] | None:
    """The record of a complete corpus made from ``facts`` that left out nothing ``stops_at`` refuses, or ``None``.

    Raises ``DataError`` for outputs of something else without ``overwrite``, and for a damaged pair.
    """
    found = [prefix + suffix for suffix in OUTPUTS if os.path.lexists(prefix + suffix)]
    if not found:
        return None
    record = read_record(prefix)
    same = all(record.get(key) == value for key, value in facts.items())
    if len(found) == len(OUTPUTS) and same and not any(map(stops_at, record["left_out"])):
        IndexedCorpus(prefix)  # raises if the pair was damaged since
        return record
    if overwrite:
        return None
    raise DataError(
        f"{found[0]}: exists and was not made from these inputs and settings; give --overwrite to replace it, "
        "or another --output-prefix"
    )


def read_record(prefix: str) -> dict[str, Any]:
    """``PREFIX.json``, empty if it can't be read."""
    try:
        record = json.loads(Path(prefix + ".json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def check_folder(prefix: str) -> None:
    """Tell of a folder that can't be written before minutes of work; it is made if it isn't there."""
    if not prefix or prefix.endswith(("/", os.sep)):
        raise ConfigError(f"--output-prefix: {prefix!r} names no file; add one, as in corpus/text")
    writable_folder("--output-prefix", Path(prefix).resolve().parent)
