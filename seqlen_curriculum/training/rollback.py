"""Back to a checkpoint from before a spike, on all ranks; see guard.py for what is decided and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seqlen_curriculum.errors import DivergenceError
from seqlen_curriculum.run_folder.checkpoint_manifest import Checkpoint
from seqlen_curriculum.run_folder.rollbacks import ROLLBACKS, Rollback, skipped_window
from seqlen_curriculum.run_folder.run_log import read_run_log
from seqlen_curriculum.training.checkpoint import Checkpoints, on_rank_0
from seqlen_curriculum.training.spike_guard import MOST_ROLLBACKS, REMEDIES, LossesSoFar, Spike
from seqlen_curriculum.training.telemetry import log_rank0

__all__ = ["log_skipped_steps", "read_losses", "roll_back", "seconds_after"]


def read_losses(log: Path, spike_ratio: float) -> LossesSoFar:
    """What the run log tells of the losses up to now, the same on all ranks."""

    def read() -> LossesSoFar:
        records = read_run_log(log) if log.exists() else ()
        return LossesSoFar.of((record["loss"] for record in records if "loss" in record), spike_ratio)

    return on_rank_0(read)


def log_skipped_steps(rollbacks: Sequence[Rollback], done_steps: int) -> None:
    """Say which steps after ``done_steps`` will be passed over, if any."""
    ahead = [(max(first, done_steps + 1), last) for first, last in (one.skipped for one in rollbacks)]
    ranges = ", ".join(f"{first} to {last}" for first, last in ahead if first <= last)
    if ranges:
        log_rank0(f"steps that will be passed over, as {ROLLBACKS} or the checkpoint tells: {ranges}")


def roll_back(checkpoints: Checkpoints, log: Path, spike: Spike) -> Checkpoint:
    """Pass over the steps up to ``spike``: the checkpoint to continue from, the same on all ranks.

    ``log`` is the run log, of the course given up. Once the rollback is written down nothing else need be done: a kill at
    any later moment makes no difference. Raises DivergenceError if no checkpoint from before these steps is kept, or there
    were MOST_ROLLBACKS.
    """
    done, (first, last) = checkpoints.rollbacks or (), skipped_window(spike.step, checkpoints.skip_steps)
    if len(done) >= MOST_ROLLBACKS:
        or_go_on = '; or set training.on_spike to "log", which only tells of it, and give the same command'
        raise DivergenceError(
            f"{spike.told}; after {MOST_ROLLBACKS} rollbacks, see {checkpoints.save_folder / ROLLBACKS}, the guard stops: "
            f"it is not the data of single steps. {REMEDIES}{or_go_on if spike.is_finite else ''}"
        )
    kept = on_rank_0(checkpoints.complete)
    old_enough = [found for found in kept if found.step < first]
    if not old_enough:
        raise DivergenceError(
            f"{spike.told}; a rollback skips steps {first} to {last}, and no checkpoint from before them is kept. "
            + _ways_on(spike, kept)
        )
    newest = old_enough[-1]
    log_rank0(f"{spike.told}; going back to step {newest.step}, to skip steps {first} to {last}")
    seconds = on_rank_0(lambda: seconds_after(log, newest.step))
    checkpoints.discard_newer_than([*done, spike.to_rollback(newest.step, (first, last), seconds)], newest)
    return newest


def _ways_on(spike: Spike, kept: Sequence[Checkpoint]) -> str:
    """What to change where no checkpoint is old enough; back to one at step c, at most spike - c steps can be skipped."""
    most = spike.step - kept[0].step if kept else 0
    ways = [f"training.spike_skip_steps to {most} or less"] if most > 0 else []
    ways += ['training.on_spike to "log", which only tells of it'] if spike.is_finite else []
    return f"Set {', or '.join(ways)}, and give the same command" if ways else REMEDIES


def seconds_after(log: Path, step: int) -> float:
    """Spent on the steps and evaluations logged after ``step``."""
    return float(sum(record.get("seconds", 0.0) for record in read_run_log(log) if record["step"] > step))
