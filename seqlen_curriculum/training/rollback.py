"""Back to a checkpoint from before a spike, on all ranks; see guard.py for what is decided and why."""

from __future__ import annotations

from pathlib import Path

from seqlen_curriculum.errors import DivergenceError
from seqlen_curriculum.runlog import read_runlog
from seqlen_curriculum.training.checkpoint import Checkpoint, Checkpoints, on_rank_0
from seqlen_curriculum.training.guard import LEDGER, MOST_ROLLBACKS, REMEDIES, LossesSoFar, Spike, skipped_window
from seqlen_curriculum.training.telemetry import say

__all__ = ["losses_so_far", "roll_back"]


def losses_so_far(log: Path, spike_ratio: float) -> LossesSoFar:
    """What the run log tells of the losses up to now, the same on all ranks."""

    def read() -> LossesSoFar:
        records = read_runlog(log) if log.exists() else ()
        return LossesSoFar.of((record["loss"] for record in records if "loss" in record), spike_ratio)

    return on_rank_0(read)


def roll_back(checkpoints: Checkpoints, spike: Spike, skip_steps: int) -> Checkpoint:
    """Pass over the ``skip_steps`` steps up to ``spike``: the checkpoint to continue from, the same on all ranks.

    Once it is written down nothing else need be done: a kill at any later moment makes no difference. Raises
    DivergenceError if no checkpoint from before these steps is kept, or there were MOST_ROLLBACKS.
    """
    done, (first, last) = checkpoints.rollbacks or (), skipped_window(spike.step, skip_steps)
    told = f"step {spike.step}: {spike.what}, at seqlen {spike.seqlen} and lr {spike.lr:.3g}"
    if len(done) >= MOST_ROLLBACKS:
        raise DivergenceError(
            f"{told}; after {MOST_ROLLBACKS} rollbacks, see {checkpoints.save_folder / LEDGER}, the guard gives up: it is "
            f"not the data of single steps. {REMEDIES}"
        )
    old_enough = on_rank_0(lambda: [found for found in checkpoints.complete() if found.step < first])
    if not old_enough:
        raise DivergenceError(
            f"{told}; a rollback skips steps {first} to {last}, and no checkpoint from before them is kept. Raise "
            "training.keep_last, save less often or lower training.spike_skip_steps, and train into another --save"
        )
    newest = old_enough[-1]
    say(f"{told}; going back to step {newest.step}, to skip steps {first} to {last}")
    checkpoints.abandon_for([*done, spike.to_rollback(newest.step, (first, last))], newest)
    return newest
