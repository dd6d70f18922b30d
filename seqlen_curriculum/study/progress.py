"""Train the runs of a study, and print one line for each that ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from seqlen_curriculum.analysis.formats import duration
from seqlen_curriculum.study.execute import Slot, train_all
from seqlen_curriculum.study.plan import PlannedRun
from seqlen_curriculum.study.results import Trained
from seqlen_curriculum.study.run_folders import StudyRun
from seqlen_curriculum.tuning.cost import Cost

__all__ = ["Progress", "train"]


class Progress:
    """Lines on stderr: the number of runs that have ended, the newest result, and the time left.

    The time left is estimated from the tokens of the runs that ended since this command has started.
    """

    def __init__(self, runs: Sequence[PlannedRun], costs: Mapping[str, Cost]) -> None:
        self._costs = costs
        self._runs, self._ended = len(runs), 0
        self._tokens_left = sum(costs[run.arm.name].tokens for run in runs)
        self._trained_tokens, self._started = 0, time.monotonic()

    def skip(self, run: StudyRun) -> None:
        """Count a run that an earlier command has trained."""
        self._ended += 1
        self._tokens_left -= self._costs[run.planned.arm.name].tokens

    def leave_out(self, runs: Sequence[PlannedRun]) -> None:
        """Don't expect ``runs`` any more."""
        self._runs -= len(runs)
        self._tokens_left -= sum(self._costs[run.arm.name].tokens for run in runs)

    def show(self, run: StudyRun, trained: Trained) -> None:
        """Print the line of a run that has ended."""
        self.skip(run)
        self._trained_tokens += self._costs[run.planned.arm.name].tokens
        loss = trained.final_loss
        result = "diverged" if loss is None else f"final validation loss {loss:.4f}"
        seconds = (time.monotonic() - self._started) / self._trained_tokens * self._tokens_left
        left = f"about {duration(seconds / 3600)} left" if self._tokens_left else "all done"
        print(f"{self._ended}/{self._runs}  {run.planned.name}: {result}; {left}", file=sys.stderr, flush=True)


def train(
    folder: Path, planned: Sequence[PlannedRun], slots: Sequence[Slot], progress: Progress
) -> dict[tuple[str, float | None, int], Trained]:
    """Train ``planned`` in the study's ``folder``, and return them by arm, rate and seed. Raises CheckpointError."""
    runs = [StudyRun(folder, run) for run in planned]
    trained = {}

    def read(run: StudyRun, is_new: bool) -> None:
        key = run.planned.arm.name, run.planned.rate, run.planned.seed
        # Runs that differ only in their seed get one curve and one line in the tables.
        trained[key] = Trained(run.read(f"{run.planned.arm.name} seed {run.planned.seed}"))
        progress.show(run, trained[key]) if is_new else progress.skip(run)

    ended = [run for run in runs if not run.is_running and run.has_ended]
    for run in ended:
        read(run, is_new=False)
    train_all([run for run in runs if run not in ended], slots, lambda run: read(run, is_new=True))
    return trained
