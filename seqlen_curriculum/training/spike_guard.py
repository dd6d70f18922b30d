"""Detection of spikes of the training loss, and the reaction to them. Independent of the engine.

The loss ratio of a step is its training loss over the lowest loss of all earlier steps (Section 3 of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from seqlen_curriculum.config.run import TrainingConfig
from seqlen_curriculum.errors import DivergenceError
from seqlen_curriculum.run_folder.ratios import loss_ratio
from seqlen_curriculum.run_folder.rollbacks import Rollback, is_skipped

__all__ = ["MOST_ROLLBACKS", "REMEDIES", "LossesSoFar", "RollbackRequested", "Spike", "SpikeGuard"]

REMEDIES = (
    "Lower optimizer.params.lr, lengthen the curriculum, raise its min_difficulty or check the precision settings, then "
    "train into another --save"
)
MOST_ROLLBACKS = 10
"""Maximum rollbacks of a run. Repeated spikes aren't caused by the data, and each rollback repeats steps."""


class LossesSoFar(NamedTuple):
    """A summary of all earlier losses, sufficient to judge the next one."""

    least: float = math.inf
    spiking: bool = False
    """True if the last loss is a spike."""

    @classmethod
    def of(cls, losses: Iterable[float], spike_ratio: float) -> LossesSoFar:
        """Return the summary of finite ``losses``, in order."""
        # Same as calling ``then`` for each, but ten times as fast, because a resume reads up to millions of losses.
        least, last = math.inf, None
        for loss in losses:
            if last is not None and last < least:
                least = last
            last = loss
        return cls() if last is None else cls(least).then(last, spike_ratio)

    def then(self, loss: float, spike_ratio: float) -> LossesSoFar:
        """Return the summary with one more loss."""
        # Losses 4, 5, 2, 2.4 with a spike_ratio of 1.2: 5 > 1.2 x 4 is a spike, 2.4 = 1.2 x 2 is not.
        return LossesSoFar(min(self.least, loss), loss > spike_ratio * self.least)

    def ratio(self, loss: float) -> float | None:
        """Return the loss ratio of a step with this ``loss``; None for the first step and if it is not finite."""
        return loss_ratio(loss, self.least)


class Spike(NamedTuple):
    """A step whose loss, gradient norm or validation loss is a spike or not finite, described by ``what``."""

    step: int
    seqlen: int
    lr: float
    loss: float
    ratio: float | None
    what: str
    is_finite: bool
    """False if training can't continue because the weights may be NaN."""

    @property
    def message(self) -> str:
        """The step, the problem, and the length and learning rate of the step."""
        return f"step {self.step}: {self.what}, at seqlen {self.seqlen} and lr {self.lr:.3g}"

    def to_rollback(self, returned_to: int, skipped: tuple[int, int], seconds: float = 0.0) -> Rollback:
        """Return the record of a rollback to the checkpoint of step ``returned_to``."""
        return Rollback(
            step=self.step,
            loss=self.loss if math.isfinite(self.loss) else None,
            ratio=self.ratio,
            seqlen=self.seqlen,
            lr=self.lr,
            returned_to=returned_to,
            skipped=skipped,
            seconds=seconds,
        )


class RollbackRequested(Exception):  # noqa: N818 - not an error: the caller resumes from an earlier checkpoint
    """Raised to discard the steps since a checkpoint because of ``spike``."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(spike.message)
        self.spike = spike


class SpikeGuard:
    """Detector of spikes that uses only values reduced over all ranks, so that all ranks decide the same."""

    def __init__(self, settings: TrainingConfig, rollbacks: Sequence[Rollback], so_far: LossesSoFar) -> None:
        self._settings, self._rollbacks, self._so_far = settings, rollbacks, so_far
        self._step, self._seqlen, self._lr = 0, 0, 0.0

    def begin(self, step: int, seqlen: int, lr: float) -> bool:
        """Start ``step``. Return whether to train it; otherwise a rollback skips it."""
        self._step, self._seqlen, self._lr = step, seqlen, lr
        return not self.skips(step)

    def skips(self, step: int) -> bool:
        """Return whether a rollback skips ``step``."""
        return is_skipped(self._rollbacks, step)

    def judge(self, loss: float, broken: str | None = None) -> str | None:
        """Check the step's ``loss`` and return a message if a spike starts; ``broken`` names another non-finite value.

        Raises DivergenceError or RollbackRequested, depending on ``training.on_spike``.
        """
        # NaN compares as false with everything, so it is checked before any ratio.
        broken = broken if math.isfinite(loss) else f"the loss is {loss}"
        if broken is not None:
            self.stop_or_roll_back(broken, loss)
        before, threshold = self._so_far, self._settings.spike_ratio
        self._so_far = before.then(loss, threshold)
        if not self._so_far.spiking:
            return None
        height = f"{loss / before.least:.3f} times" if before.least else "above"
        what = f"the loss {loss:.4f} is {height} the lowest before it, {before.least:.4f} (training.spike_ratio {threshold})"
        if self._settings.on_spike != "log":
            self.stop_or_roll_back(what, loss, is_finite=True)
        # A spike of 50 steps is one event: only its first step is reported.
        return None if before.spiking else self._spike(what, loss, is_finite=True).message

    def judge_perplexity(self, ratio: float) -> None:
        """Raise DivergenceError if the perplexity exceeds ``stop_perplexity_ratio`` x the best so far (``ratio``)."""
        most = self._settings.stop_perplexity_ratio
        if most is not None and ratio > most:
            raise DivergenceError(
                f"step {self._step}: the validation perplexity is {ratio:.3f} times the best before it "
                f"(training.stop_perplexity_ratio {most}), at seqlen {self._seqlen} and lr {self._lr:.3g}; training stops, "
                f"this step is not saved. {REMEDIES}"
            )

    def stop_or_roll_back(self, what: str, loss: float = math.nan, is_finite: bool = False) -> None:
        """Raise RollbackRequested where ``training.on_spike`` is "rollback", else DivergenceError."""
        spike = self._spike(what, loss, is_finite)
        if self._settings.on_spike == "rollback":
            raise RollbackRequested(spike)
        or_log = ' or "log", which only reports it' if is_finite else ""
        raise DivergenceError(
            f"{spike.message}; training stops, this step is not saved and the last checkpoint is intact. {REMEDIES}; or set "
            f'training.on_spike to "rollback", which returns to a checkpoint and skips the steps before the spike{or_log}, '
            "and rerun the same command"
        )

    def _spike(self, what: str, loss: float, is_finite: bool) -> Spike:
        return Spike(self._step, self._seqlen, self._lr, loss, self._so_far.ratio(loss), what, is_finite)
