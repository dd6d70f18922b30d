"""Progress of a run: a bar in a terminal, and one line every ``LINE_SECONDS`` in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from deepspeed import comm as dist
from tqdm import tqdm

from seqlen_curriculum.schedule.timeline import Timeline

__all__ = ["LINE_SECONDS", "Progress", "log_rank0"]

LINE_SECONDS = 30.0


def log_rank0(message: str) -> None:
    """Print a message to stderr on rank 0: above the bar in a terminal, otherwise with a time stamp."""
    if dist.get_rank() == 0:
        _print(message)


def _print(message: str) -> None:
    time_of_day = "" if sys.stderr.isatty() else f"{datetime.now():%Y-%m-%d %H:%M:%S} "
    tqdm.write(time_of_day + message, file=sys.stderr)


class Progress:
    """Display of the newest step, the throughput, the time left, and the utilization of the machine."""

    def __init__(self, done_steps: int, timeline: Timeline) -> None:
        self._train_tokens = timeline.train_tokens
        self._bar = tqdm(
            total=timeline.steps,
            initial=done_steps,
            unit="step",
            disable=not sys.stderr.isatty(),
            mininterval=0.5,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}]{postfix}",
        )
        self._steps, self._due = timeline.steps, 0.0
        self._recent = {"tokens": 0.0, "seconds": 0.0, "data_seconds": 0.0, "busy": 0.0}

    def follow(self, timeline: Timeline) -> None:
        """Set the total to the steps of ``timeline``."""
        self._bar.total = self._steps = timeline.steps

    def step(self, record: Mapping[str, Any], tokens: int) -> None:
        """Show a step of ``tokens`` tokens."""
        # Steps take longer as the sequence length grows, so the time left is estimated from tokens, not from steps. Weights
        # decay by 0.9 per step: the throughput is that of about the last 1 / (1 - 0.9) = 10 steps.
        newest = {"tokens": tokens, "busy": (record.get("mfu") or 0) * record["seconds"], **record}
        self._recent = {key: 0.9 * value + newest.get(key, 0) for key, value in self._recent.items()}
        if not self._bar.disable:
            self._bar.set_postfix_str(self._describe(record), refresh=False)
            self._bar.update()
        elif record["step"] == self._steps or time.monotonic() >= self._due:
            _print(f"step {record['step']}/{self._steps}, {self._describe(record)}")
            self._due = time.monotonic() + LINE_SECONDS

    def skip(self) -> None:
        """Count a step that was skipped."""
        self._bar.update()

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()

    def _describe(self, record: Mapping[str, Any]) -> str:
        recent, consumed = self._recent, record["consumed_tokens"]
        speed = recent["tokens"] / recent["seconds"]
        left = max(self._train_tokens - consumed, 0) / speed
        parts = [
            f"seqlen {record['seqlen']}, tokens {consumed:.3g}/{self._train_tokens:.3g}, loss {record['loss']:.3f}",
            f"lr {record['lr']:.2e}, {speed:,.0f} tokens/s, {tqdm.format_interval(left)} left",
        ]
        if record.get("mfu") is not None:
            parts.append(f"MFU {recent['busy'] / recent['seconds']:.0%}")
        if record.get("peak_memory_bytes") is not None:
            parts.append(f"{record['peak_memory_bytes'] / 2**30:.1f} GiB")
        if record.get("data_seconds") is not None:
            parts.append(f"data {recent['data_seconds'] / recent['seconds']:.0%}")
        return ", ".join(parts)
