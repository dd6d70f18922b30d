"""``PREFIX.json``, the record of a corpus's inputs and settings, which identifies a complete, up-to-date corpus."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.errors import ConfigError, DataError

__all__ = ["OUTPUTS", "PreparedCorpus", "check_prefix", "find_prepared", "read_record", "require_record"]

OUTPUTS = (".bin", ".idx", ".tokenizer.json", ".json")


@dataclass(frozen=True)
class PreparedCorpus:
    """A complete corpus and its record."""

    prefix: str
    already: bool
    """True if the corpus was complete before this call."""
    record: dict[str, Any]
    """The content of ``PREFIX.json``."""
    bytes_per_second: float | None = None
    """Bytes of text encoded per second by this process."""

    def __str__(self) -> str:
        state = "already prepared" if self.already else "prepared"
        size = "{documents:,} documents, {tokens:,} tokens of {text_bytes:,} bytes, vocabulary {vocab_size:,}"
        speed = "" if self.bytes_per_second is None else f", {self.bytes_per_second / 1e6:.2f} MB/s"
        summary = f"{state}: {self.prefix} ({size.format(**self.record)}{speed})"
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in self.record["left_out"].items())
        return f"{summary}; left out: {left_out}" if left_out else summary


def find_prepared(
    prefix: str, facts: Mapping[str, Any], overwrite: bool, stops_at: Callable[[str], bool]
) -> dict[str, Any] | None:
    """Return the record of a complete corpus that was made from ``facts``, or ``None`` if the corpus must be made.

    A corpus that skipped a kind of input that ``stops_at`` refuses counts as made with other settings. Raises
    ``DataError`` if there are other outputs and ``overwrite`` is false, and for a damaged pair.
    """
    outputs = [prefix + suffix for suffix in OUTPUTS if os.path.lexists(prefix + suffix)]
    if not outputs:
        return None
    record = read_record(prefix)
    same_facts = all(record.get(key) == value for key, value in facts.items())
    if len(outputs) == len(OUTPUTS) and same_facts and not any(map(stops_at, record["left_out"])):
        IndexedCorpus(prefix)  # raises for a damaged pair
        return record
    if overwrite:
        return None
    raise DataError(
        f"{outputs[0]}: exists and was not made from these inputs and settings; give --overwrite to replace it, "
        "or another --out"
    )


def read_record(prefix: str) -> dict[str, Any]:
    """Return the content of ``PREFIX.json``, an empty dict if it can't be read."""
    try:
        record = json.loads(Path(prefix + ".json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def require_record(prefix: str) -> dict[str, Any]:
    """Return the record of a finished corpus. Raises ``DataError`` for a damaged pair and for a missing record."""
    IndexedCorpus(prefix)  # raises for a damaged pair
    record = read_record(prefix)
    if not {"settings", "inputs", "left_out"} <= record.keys() or not os.path.exists(prefix + ".tokenizer.json"):
        raise DataError(f"{prefix}: no {prefix}.json and .tokenizer.json of slw prepare; prepare its text again")
    return record


def check_prefix(prefix: str) -> None:
    """Raise ``ConfigError`` unless ``prefix`` ends in the name of a file."""
    if not prefix or prefix.endswith(("/", os.sep)):
        raise ConfigError(f"--out: {prefix!r} has no file name; add one, as in corpus/text")
