"""What is a spike of the training loss, and what is done about it. No engine.

The loss ratio of a step is its training loss over the least of all earlier steps (Section 3 of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from seqlen_curriculum.config.run import TrainingConfig
from seqlen_curriculum.errors import DivergenceError
from seqlen_curriculum.run_folder.rollbacks import Rollback, is_skipped

__all__ = ["MOST_ROLLBACKS", "REMEDIES", "LossesSoFar", "RollbackRequested", "Spike", "SpikeGuard"]

REMEDIES = (
    "Lower optimizer.params.lr, lengthen the curriculum, raise its min_difficulty or check the precision settings, then "
    "train into another --save"
)
MOST_ROLLBACKS = 10
"""Of a run. What spikes again and again is no accident of the data, and each rollback costs what it repeats."""


class LossesSoFar(NamedTuple):
    """What of the losses of all earlier steps it takes to judge the next one."""

    least: float = math.inf
    spiking: bool = False
    """Whether the last of them is a spike."""

    @classmethod
    def of(cls, losses: Iterable[float], spike_ratio: float) -> LossesSoFar:
        """Of finite ``losses`` in their order."""
        so_far = cls()
        for loss in losses:
            so_far = so_far.then(loss, spike_ratio)
        return so_far

    def then(self, loss: float, spike_ratio: float) -> LossesSoFar:
        """With one more."""
        return LossesSoFar(min(self.least, loss), loss > spike_ratio * self.least)

    def ratio(self, loss: float) -> float | None:
        """The loss ratio of a step of this ``loss``; None for the first one, and where it is not finite."""
        ratio = loss / self.least if 0 < self.least < math.inf else math.nan
        return ratio if math.isfinite(ratio) else None


class Spike(NamedTuple):
    """A step whose loss, gradient or validation loss is not what training may go on from. ``what`` says which, and how."""

    step: int
    seqlen: int
    lr: float
    loss: float
    ratio: float | None
    what: str
    is_finite: bool
    """All of it, so that training could go on."""

    @property
    def told(self) -> str:
        """In words."""
        return f"step {self.step}: {self.what}, at seqlen {self.seqlen} and lr {self.lr:.3g}"

    def to_rollback(self, returned_to: int, skipped: tuple[int, int], seconds: float = 0.0) -> Rollback:
        """The record of a return to the checkpoint of a step."""
        loss = self.loss if math.isfinite(self.loss) else None
        return Rollback(
            step=self.step,
            loss=loss,
            ratio=self.ratio,
            seqlen=self.seqlen,
            lr=self.lr,
            returned_to=returned_to,
            skipped=skipped,
            seconds=seconds,
        )


class RollbackRequested(Exception):  # noqa: N818 - no error: the loop above goes on from an earlier checkpoint
    """The course of training since some checkpoint is given up because of ``spike``."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(spike.told)
        self.spike = spike


class SpikeGuard:
    """Judges each step of a course by what all ranks have agreed on, so all of them judge alike."""

    def __init__(self, settings: TrainingConfig, rollbacks: Sequence[Rollback], so_far: LossesSoFar) -> None:
        self._settings, self._rollbacks, self._so_far = settings, rollbacks, so_far
        self._now = (0, 0, 0.0)

    def begin(self, step: int, seqlen: int, lr: float) -> bool:
        """Note where training stands. Returns whether ``step`` is to be trained, not passed over."""
        self._now = step, seqlen, lr
        return not is_skipped(self._rollbacks, step)

    def judge(self, loss: float, broken: str | None = None) -> str | None:
        """A line to say, if there is one, of the step's ``loss``; ``broken`` tells what else forbids to go on.

        Raises DivergenceError or RollbackRequested, as ``training.on_spike`` asks.
        """
        broken = broken if math.isfinite(loss) else f"the loss is {loss}"
        if broken is not None:
            self.stop_or_roll_back(broken, loss)
        before, threshold = self._so_far, self._settings.spike_ratio
        self._so_far = before.then(loss, threshold)
        if not self._so_far.spiking:
            return None
        what = (
            f"the loss {loss:.4f} is {loss / before.least:.3f} times"
            if before.least
            else f"the loss {loss:.4f} is above"
        )
        what += f" the least before it, {before.least:.4f} (training.spike_ratio {threshold})"
        if self._settings.on_spike != "log":
            self.stop_or_roll_back(what, loss, is_finite=True)
        return None if before.spiking else self._spike(what, loss, is_finite=True).told

    def judge_perplexity(self, ratio: float) -> None:
        """Raises DivergenceError for an evaluation whose perplexity is ``ratio`` times the best one before, if asked to."""
        most = self._settings.stop_perplexity_ratio
        if most is not None and ratio > most:
            step, seqlen, lr = self._now
            raise DivergenceError(
                f"step {step}: the validation perplexity is {ratio:.3f} times the best before it "
                f"(training.stop_perplexity_ratio {most}), at seqlen {seqlen} and lr {lr:.3g}; training stops, this step is "
                f"not saved. {REMEDIES}"
            )

    def stop_or_roll_back(self, what: str, loss: float = math.nan, is_finite: bool = False) -> None:
        """Don't go on from this step. Raises RollbackRequested where rollbacks are asked for, else DivergenceError."""
        spike = self._spike(what, loss, is_finite)
        if self._settings.on_spike == "rollback":
            raise RollbackRequested(spike)
        or_go_on = ' or "log", which only tells of it' if is_finite else ""
        raise DivergenceError(
            f"{spike.told}; training stops, this step is not saved and the last checkpoint is intact. {REMEDIES}; or set "
            'training.on_spike to "rollback", which goes back and passes over the steps before the spike'
            f"{or_go_on}, and give the same command"
        )

    def _spike(self, what: str, loss: float, is_finite: bool) -> Spike:
        step, seqlen, lr = self._now
        return Spike(step, seqlen, lr, loss, self._so_far.ratio(loss), what, is_finite)
