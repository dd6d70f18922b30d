"""The ``adaptive`` schedule in a run: its lengths wait after an evaluation that fluctuates, and the plan waits with them."""

from __future__ import annotations

from dataclasses import replace

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.schedule.curriculum_config import AdaptiveCurriculum
from seqlen_curriculum.training.lr_scheduler import TokenCosineLR
from seqlen_curriculum.training.telemetry import log_rank0
from seqlen_curriculum.training.trainer import Trainer

__all__ = ["Adaptive"]


class Adaptive:
    """Decides by what all ranks have agreed on, so all of them decide alike. ``config`` has what was held so far."""

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.curriculum, AdaptiveCurriculum)
        self._config, self._ratio = config, config.curriculum.schedule_config.perplexity_ratio

    def __call__(self, trainer: Trainer, step: int, ratio: float) -> int | None:
        """``step`` if its perplexity, ``ratio`` times the best before, holds the lengths from now on; else None."""
        settles_at = trainer.timeline.pacing.settles_at
        if ratio <= self._ratio or (settles_at is not None and step >= settles_at):  # then nothing is left to hold
            return None
        self._config = replace(self._config, held=(*self._config.held, step))
        self.follow(trainer)
        interval = trainer.settings.eval_interval
        log_rank0(
            f"step {step}: the perplexity is {ratio:.3f} times its best before; lengths stay for {interval} steps"
        )
        return step

    def follow(self, trainer: Trainer) -> None:
        """Put the schedule in force for the steps to come; of those done it says what it said before."""
        timeline, engine = self._config.timeline(), trainer.engine
        trainer.timeline, trainer.train_data = timeline, trainer.train_data.along(timeline)
        trainer.telemetry.follow(timeline)
        engine.curriculum_scheduler = self._config.curriculum_scheduler()
        if isinstance(engine.lr_scheduler, TokenCosineLR):
            rate = self._config.learning_rate(timeline, max_lr=engine.lr_scheduler.rate.max_lr)
            assert rate is not None
            engine.lr_scheduler.rate = rate
