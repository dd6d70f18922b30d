"""The records of a throughput measurement as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_throughput", "throughput_table"]


def throughput_table(records: Sequence[dict[str, Any]]) -> str:
    """One Markdown row a length; tokens/s, and in brackets their ratio to full length with fixed micro-batches."""
    rows = ["| seqlen | rows, fixed | tokens/s, fixed | rows, balanced | tokens/s, balanced |", "| --- " * 5 + "|"]
    for fixed, balanced in zip(records[::2], records[1::2], strict=True):
        cells = [f"{one['micro_batch_rows']} | {_speed(one)}" for one in (fixed, balanced)]
        rows.append(f"| {fixed['seqlen']} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def _speed(record: dict[str, Any]) -> str:
    peak = record["peak_memory_bytes"]
    memory = "" if peak is None else f", {peak / 2**30:.2f} GiB"
    return f"{record['tokens_per_second']:,.0f} ({record['of_full_length']:.2f}{memory})"


def draw_throughput(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens/s relative to full length against seqlen, a line a kind; a picture by suffix."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for kind in ("fixed", "balanced"):
        ours = [record for record in records if record["kind"] == kind]
        axis.plot([one["seqlen"] for one in ours], [one["of_full_length"] for one in ours], marker="o", label=kind)
    axis.axhline(1, color="grey", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set(xlabel="seqlen (tokens)", ylabel="tokens/s of full length")
    axis.grid(alpha=0.3)
    axis.legend(title="micro-batches")
    figure.savefig(path, dpi=120)
