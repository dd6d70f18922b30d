"""Reporting of a run by rank 0: to the terminal, the run log, and DeepSpeed's monitors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seqlen_curriculum.run_folder.run_log import MACHINE_KEYS, RunLog
from seqlen_curriculum.schedule.timeline import Timeline
from seqlen_curriculum.training.monitors import Monitors
from seqlen_curriculum.training.progress import Progress, log_rank0
from seqlen_curriculum.training.utilization import Utilization, peak_memory_bytes

__all__ = ["Telemetry", "log_rank0"]

_MOMENTS = ("variance_norm", "variance_max", "momentum_norm", "momentum_max")
_VALUES = {
    "Train": ("loss", "lr", "seqlen", "grad_norm", *_MOMENTS, *MACHINE_KEYS),
    "Valid": ("valid_loss", "valid_ppl"),
}
"""The values of a record that are sent to monitors, by group."""


class Telemetry:
    """Writer of records to the terminal, run log and monitors. Does nothing on ranks other than 0 (``log`` None)."""

    def __init__(
        self, log: Path | None, monitor: Any, done_steps: int, timeline: Timeline, utilization: Utilization
    ) -> None:
        self._log = RunLog(log) if log else None
        self._monitors = Monitors(monitor, list(_VALUES)) if log and monitor.enabled else None
        self._progress = Progress(done_steps, timeline) if log else None
        self._utilization = utilization
        self._consumed = timeline.consumed_tokens(done_steps)
        self._checkpoint_seconds: float | None = None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure how long a checkpoint blocks training: ``checkpoint_seconds`` in the record of the next step."""
        started = time.perf_counter()
        yield
        self._checkpoint_seconds = (self._checkpoint_seconds or 0.0) + time.perf_counter() - started

    def step(self, record: dict[str, Any]) -> None:
        """Report a training record, with the utilization of the machine."""
        if self._log is None or self._progress is None:
            return
        tokens, self._consumed = record["consumed_tokens"] - self._consumed, record["consumed_tokens"]
        record = {**record, **self._of_machine(record, tokens)}
        self._log.write(record)
        self._to_monitors("Train", record)
        self._progress.step(record, tokens)

    def _of_machine(self, record: dict[str, Any], tokens: int) -> dict[str, Any]:
        saving, self._checkpoint_seconds = self._checkpoint_seconds, None
        return {
            "mfu": self._utilization.mfu(record["seqlen"], tokens, record["seconds"]),
            "peak_memory_bytes": peak_memory_bytes(),
            **({} if saving is None else {"checkpoint_seconds": saving}),
        }

    def skipped_step(self, record: dict[str, Any]) -> None:
        """Report the record of a skipped step, which takes almost no time."""
        if self._log is None or self._progress is None:
            return
        self._log.write(record)
        self._consumed = record["consumed_tokens"]
        self._progress.skip()

    def evaluation(self, record: dict[str, Any]) -> None:
        """Report an evaluation record."""
        if self._log is None:
            return
        self._log.write(record)
        self._to_monitors("Valid", record)
        values = f"{record['valid_loss']:.4f}", f"{record['valid_ppl']:.2f}"
        # Masked tokens are predicted from both sides, so this is no perplexity of a text.
        names = ("loss of masked tokens", "pseudo-perplexity") if "objective" in record else ("loss", "perplexity")
        loss, perplexity = (f"{name} {value}" for name, value in zip(names, values, strict=True))
        log_rank0(f"step {record['step']}: validation {loss}, {perplexity}")

    def follow(self, timeline: Timeline) -> None:
        """Set the total of the bar to the steps of ``timeline``."""
        if self._progress is not None:
            self._progress.follow(timeline)

    def close(self) -> None:
        """Close the bar, the log and the monitors."""
        for part in (self._progress, self._monitors, self._log):
            if part is not None:
                part.close()

    def _to_monitors(self, group: str, record: dict[str, Any]) -> None:
        if self._monitors is not None:
            values = {name: record[name] for name in _VALUES[group] if record.get(name) is not None}
            self._monitors.write(group, values, record["step"], record["consumed_tokens"])
