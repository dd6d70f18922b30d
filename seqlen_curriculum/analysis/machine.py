"""How a run used the machine: model FLOPs utilization, memory, and time spent on data and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seqlen_curriculum.analysis import formats

__all__ = ["COLUMNS", "describe_machine", "machine_use"]

COLUMNS = {
    "mfu": ("MFU", formats.share),
    "peak_memory_bytes": ("Peak memory", formats.gibibytes),
    "data_share": ("Waiting for data", formats.share),
    "checkpoint_share": ("Saving checkpoints", formats.share),
}
"""The title and the format of each number."""


def machine_use(records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the time-weighted mean ``mfu``, the largest ``peak_memory_bytes``, and two shares of time.

    ``data_share`` and ``checkpoint_share`` are fractions of the time of training, evaluation and checkpoints together. A
    number is None if no record has it.
    """
    # A step of 1 s at 0.2 and one of 3 s at 0.4 are 4 s at 0.35: the mean is over time, not over steps.
    peaks = [one["peak_memory_bytes"] for one in records if one.get("peak_memory_bytes") is not None]
    timed = [(one["mfu"], one["seconds"]) for one in records if one.get("mfu") is not None]
    time = sum(seconds for _, seconds in timed)
    data, saving = _total(records, "data_seconds"), _total(records, "checkpoint_seconds")
    whole = (_total(records, "seconds") or 0.0) + (saving or 0.0)
    return {
        "mfu": sum(mfu * seconds for mfu, seconds in timed) / time if time else None,
        "peak_memory_bytes": max(peaks, default=None),
        "data_share": data / whole if data is not None and whole else None,
        "checkpoint_share": saving / whole if saving is not None and whole else None,
    }


def _total(records: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [one[key] for one in records if one.get(key) is not None]
    return float(sum(values)) if values else None


def describe_machine(use: dict[str, float | None]) -> str:
    """Return the known numbers as text for a terminal; empty if there are none."""
    known = [(title, text(value)) for key, (title, text) in COLUMNS.items() if (value := use[key]) is not None]
    return ", ".join(f"{title if title.isupper() else title.lower()} {text}" for title, text in known)
