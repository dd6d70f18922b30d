"""The records of a throughput measurement as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw_throughput", "throughput_table"]


def throughput_table(records: Sequence[dict[str, Any]]) -> str:
    """One Markdown row a length; tokens/s, and in brackets their ratio to the first kind at full length."""
    kinds = _kinds(records)
    rows = [
        "| seqlen |" + "".join(f" rows, {kind} | tokens/s, {kind} |" for kind in kinds),
        "| --- " * (1 + 2 * len(kinds)) + "|",
    ]
    for start in range(0, len(records), len(kinds)):
        cells = "".join(f" {one['micro_batch_rows']} | {_speed(one)} |" for one in records[start : start + len(kinds)])
        rows.append(f"| {records[start]['seqlen']} |{cells}")
    shares = [record["moments_of_step"] for record in records]
    told = f"{shares[-len(kinds)]:.2%} of a step at full length, at most {max(shares):.2%} of one"
    return "\n".join([*rows, "", f"measuring Adam's variance and momentum once: {told}"])


def _kinds(records: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(record["kind"] for record in records))


def _speed(record: dict[str, Any]) -> str:
    peak = record["peak_memory_bytes"]
    memory = "" if peak is None else f", {peak / 2**30:.2f} GiB"
    return f"{record['tokens_per_second']:,.0f} ({record['of_full_length']:.2f}{memory})"


def draw_throughput(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens/s relative to full length against seqlen, a line a kind; a picture by suffix."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for kind in _kinds(records):
        ours = [record for record in records if record["kind"] == kind]
        axis.plot([one["seqlen"] for one in ours], [one["of_full_length"] for one in ours], marker="o", label=kind)
    axis.axhline(1, color="grey", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set(xlabel="seqlen (tokens)", ylabel="tokens/s of full length")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
