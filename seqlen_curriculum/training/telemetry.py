"""Where rank 0 reports a run: a progress bar, the run log, and DeepSpeed's monitor (TensorBoard, W&B, CSV)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from tqdm import tqdm

from seqlen_curriculum.run_folder.run_log import RunLog
from seqlen_curriculum.schedule.timeline import Timeline

__all__ = ["Telemetry", "log_rank0"]

_TRAIN_VALUES = ("loss", "lr", "seqlen", "grad_norm", "seconds")
_MOMENTS = ("variance_norm", "variance_max", "momentum_norm", "momentum_max")
_VALID_VALUES = ("valid_loss", "valid_ppl")


def log_rank0(message: str) -> None:
    """Print one line to the terminal, above the bar; on rank 0 only."""
    if dist.get_rank() == 0:
        tqdm.write(message, file=sys.stderr)


class Telemetry:
    """Writes each record everywhere it belongs. On ranks other than 0 (``log`` None) it does nothing."""

    def __init__(self, log: Path | None, monitor: Any, done_steps: int, timeline: Timeline) -> None:
        self._log = RunLog(log) if log else None
        self._monitor = monitor
        self._train_tokens = timeline.train_tokens
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=timeline.steps,
            initial=done_steps,
            unit="step",
            disable=log is None,
            mininterval=0.5 if terminal else 15,  # a log file wants few lines
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}]{postfix}",
        )
        self._seconds = self._tokens = 0.0
        self._consumed = timeline.consumed_tokens(done_steps)

    def step(self, record: dict[str, Any]) -> None:
        """Report a training record."""
        if self._log is None:
            return
        self._log.write(record)
        self._to_monitor("Train", record, (*_TRAIN_VALUES, *_MOMENTS))
        self._bar.set_postfix_str(self._progress(record), refresh=False)
        self._bar.update()

    def skipped_step(self, record: dict[str, Any]) -> None:
        """Report the record of a skipped step, which takes next to no time."""
        if self._log is None:
            return
        self._log.write(record)
        self._consumed = record["consumed_tokens"]
        self._bar.update()

    def evaluation(self, record: dict[str, Any]) -> None:
        """Report an evaluation record."""
        if self._log is None:
            return
        self._log.write(record)
        self._to_monitor("Valid", record, _VALID_VALUES)
        log_rank0(
            f"step {record['step']}: validation loss {record['valid_loss']:.4f}, perplexity {record['valid_ppl']:.2f}"
        )

    def follow(self, timeline: Timeline) -> None:
        """Make the bar end with the last step of ``timeline``."""
        self._bar.total = timeline.steps

    def close(self) -> None:
        """Close the bar and the log."""
        self._bar.close()
        if self._log is not None:
            self._log.close()

    def _progress(self, record: dict[str, Any]) -> str:
        """The text beside the bar."""
        # Steps take longer as the sequence length grows, so the time left follows from tokens, not from steps. A step's
        # weight falls by 0.9 with each later one: the speed is that of the last 1 / (1 - 0.9) = 10 steps or so.
        self._tokens = 0.9 * self._tokens + record["consumed_tokens"] - self._consumed
        self._consumed = record["consumed_tokens"]
        self._seconds = 0.9 * self._seconds + record["seconds"]
        speed = self._tokens / self._seconds
        left = max(self._train_tokens - record["consumed_tokens"], 0) / speed
        return (
            f"seqlen {record['seqlen']}, tokens {record['consumed_tokens']:.3g}/{self._train_tokens:.3g}, "
            f"loss {record['loss']:.3f}, lr {record['lr']:.2e}, {speed:,.0f} tokens/s, {tqdm.format_interval(left)} left"
        )

    def _to_monitor(self, group: str, record: dict[str, Any], names: tuple[str, ...]) -> None:
        """Each value twice: against steps and against consumed tokens."""
        if not self._monitor.enabled:
            return
        values = [(name, record[name]) for name in names if record.get(name) is not None]
        against_steps = [(f"{group}/{name}", value, record["step"]) for name, value in values]
        against_tokens = [(f"{group}-by-tokens/{name}", value, record["consumed_tokens"]) for name, value in values]
        self._monitor.write_events(against_steps + against_tokens)
