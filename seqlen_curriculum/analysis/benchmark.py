"""Throughput measurements as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["describe_documents", "describe_loop", "describe_trainer", "draw_throughput", "throughput_table"]


def throughput_table(records: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table with one row per length: tokens/s, and in brackets the ratio to full length.

    The ratio is to the first kind at full length. ``records`` are sorted by length, then by kind. The last length is full
    length.
    """
    kinds = list(dict.fromkeys(record["kind"] for record in records))
    lines = [
        "| seqlen |" + "".join(f" rows, {kind} | tokens/s, {kind} |" for kind in kinds),
        "| --- " * (1 + 2 * len(kinds)) + "|",
    ]
    for start in range(0, len(records), len(kinds)):
        line = f"| {records[start]['seqlen']} |"
        for record in records[start : start + len(kinds)]:
            peak = record["peak_memory_bytes"]
            memory = "" if peak is None else f", {peak / 2**30:.2f} GiB"
            speed = f"{record['tokens_per_second']:,.0f} ({record['of_full_length']:.2f}{memory})"
            line += f" {record['micro_batch_rows']} | {speed} |"
        lines.append(line)
    return "\n".join([*lines, "", _cost_of_moments(records, len(kinds))])


def _cost_of_moments(records: Sequence[dict[str, Any]], kinds: int) -> str:
    shares = [record["moments_of_step"] for record in records]
    cost = f"{shares[-kinds]:.2%} of a full-length step, at most {max(shares):.2%} of a step at any length"
    return f"measuring Adam's variance and momentum once: {cost}"


def describe_trainer(result: dict[str, Any]) -> str:
    """Return the result of ``measure_trainer`` as text: the machine, and a Markdown table with one row per length.

    In brackets is the ratio to plain micro-batches at full length.
    """
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    lines = [
        f"{result['device']}, {result['precision']}, {result['parameters']:,} parameters, {versions}",
        "",
        "| seqlen | rows, plain | tokens/s, plain | CPU s per million | rows, balanced | tokens/s, balanced | "
        "CPU s per million |",
        "| --- " * 7 + "|",
    ]
    records = result["trainer"]
    for plain, balanced in zip(records[::2], records[1::2], strict=True):
        cells = [f"| {plain['seqlen']} |"]
        for record in (plain, balanced):
            speed = f"{record['tokens_per_second']:,.0f} ({record['of_full_length']:.2f})"
            cells.append(f" {record['micro_batch_rows']} | {speed} | {record['cpu_seconds_per_million_tokens']:.1f} |")
        lines.append("".join(cells))
    return "\n".join(lines)


def draw_throughput(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot tokens/s relative to full length against seqlen, one line per kind, in the format of the suffix of ``path``."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for kind in dict.fromkeys(record["kind"] for record in records):
        points = [(record["seqlen"], record["of_full_length"]) for record in records if record["kind"] == kind]
        axis.plot([seqlen for seqlen, _ in points], [speed for _, speed in points], marker="o", label=kind)
    axis.axhline(1, color="grey", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set(xlabel="sequence length (tokens)", ylabel="throughput relative to full length")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def describe_loop(record: dict[str, Any]) -> str:
    """Return the record of ``measure_loop`` as text for a terminal."""
    return (
        f"{record['parameters']:,} parameters, {record['step_tokens']:,.0f} tokens in {record['micro_batches']:.1f} "
        f"micro-batches per step:\n{record['cpu_ratio']:.3f} times the CPU time of a bare loop ({record['ratio']:.3f} times "
        f"its time), {record['more_cpu_milliseconds']:.2f} ms more than\nits {record['cpu_milliseconds']:.1f} ms per step; "
        f"losses differ by at most {record['loss_difference']:.1g}"
    )


def describe_documents(record: dict[str, Any]) -> str:
    """Return the record of ``measure_documents`` as a Markdown table for a terminal."""
    lines = [
        f"{record['steps']:,} steps of {record['step_tokens']:,} tokens, {record['parts_per_row']:.1f} parts per row",
        "",
        "| rows | CPU s per million tokens | s per million tokens | tokens/CPU s | tokens/s |",
        "| --- " * 5 + "|",
    ]
    columns = ("cpu_seconds", "seconds", "cpu_throughput", "throughput")
    for name, way in record["ways"].items():
        lines.append(f"| {name} | " + " | ".join(f"{way[column]:.3f}" for column in columns) + " |")
    return "\n".join([*lines, "", "tokens/CPU s and tokens/s are relative to data.attention row"])
