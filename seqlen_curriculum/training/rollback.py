"""Return a run to a checkpoint from before a spike, on all ranks. ``spike_guard.py`` decides when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seqlen_curriculum.errors import DivergenceError
from seqlen_curriculum.run_folder import ROLLBACKS
from seqlen_curriculum.run_folder.checkpoint_manifest import Checkpoint
from seqlen_curriculum.run_folder.rollbacks import Rollback, skipped_window
from seqlen_curriculum.run_folder.run_log import losses, records_after
from seqlen_curriculum.training.checkpoint import Checkpoints
from seqlen_curriculum.training.ranks import on_rank_0
from seqlen_curriculum.training.spike_guard import MOST_ROLLBACKS, REMEDIES, LossesSoFar, Spike
from seqlen_curriculum.training.telemetry import log_rank0

__all__ = ["log_skipped_steps", "read_losses", "roll_back", "seconds_after"]

_LOG_INSTEAD = 'training.on_spike to "log", which only reports it'


def read_losses(log: Path, spike_ratio: float) -> LossesSoFar:
    """Return the summary of the losses in the run log, the same on all ranks."""

    def read() -> LossesSoFar:
        return LossesSoFar.of(losses(log) if log.exists() else (), spike_ratio)

    return on_rank_0(read)


def log_skipped_steps(rollbacks: Sequence[Rollback], done_steps: int) -> None:
    """Log the steps after ``done_steps`` that will be skipped, if any."""
    windows = [(max(first, done_steps + 1), last) for first, last in (rollback.skipped for rollback in rollbacks)]
    ahead = ", ".join(f"{first} to {last}" for first, last in windows if first <= last)
    if ahead:
        log_rank0(f"steps to skip, from {ROLLBACKS} or the checkpoint: {ahead}")


def roll_back(checkpoints: Checkpoints, log: Path, spike: Spike) -> Checkpoint:
    """Skip the steps up to ``spike`` and return the checkpoint to resume from, the same on all ranks.

    ``log`` is the run log, including the discarded steps. Raises DivergenceError if there is no checkpoint from before the
    skipped steps, or after MOST_ROLLBACKS.
    """
    checkpoints.wait()
    done, (first, last) = checkpoints.rollbacks or (), skipped_window(spike.step, checkpoints.skip_steps)
    if len(done) >= MOST_ROLLBACKS:
        or_log = f"; or set {_LOG_INSTEAD}, and rerun the same command" if spike.is_finite else ""
        raise DivergenceError(
            f"{spike.message}; training stops after {MOST_ROLLBACKS} rollbacks (see {checkpoints.save_folder / ROLLBACKS}), "
            f"because the data of single steps is not the cause. {REMEDIES}{or_log}"
        )
    kept = on_rank_0(checkpoints.complete)
    newest = checkpoints.newest_whole([checkpoint for checkpoint in kept if checkpoint.step < first])
    if newest is None:
        raise DivergenceError(
            f"{spike.message}; a rollback skips steps {first} to {last}, but there is no checkpoint from before them. "
            + _ways_on(spike, kept)
        )
    log_rank0(f"{spike.message}; returning to step {newest.step}, to skip steps {first} to {last}")
    seconds = on_rank_0(lambda: seconds_after(log, newest.step))
    # Once rollbacks.json contains the rollback, a kill is harmless, because the next launch repeats the rest.
    checkpoints.discard_newer_than([*done, spike.to_rollback(newest.step, (first, last), seconds)], newest)
    return newest


def _ways_on(spike: Spike, kept: Sequence[Checkpoint]) -> str:
    """Return the settings to change if no checkpoint is old enough."""
    # With a spike at step 25 and the oldest checkpoint at 18, at most 25 - 18 = 7 steps can be skipped, 19 to 25.
    most = spike.step - kept[0].step if kept else 0
    ways = [f"training.spike_skip_steps to {most} or less"] if most > 0 else []
    ways += [_LOG_INSTEAD] if spike.is_finite else []
    return f"Set {', or '.join(ways)}, and rerun the same command" if ways else REMEDIES


def seconds_after(log: Path, step: int) -> float:
    """Return the seconds spent on the steps and evaluations logged after ``step``."""
    return float(sum(record.get("seconds", 0.0) for record in records_after(log, step)))
