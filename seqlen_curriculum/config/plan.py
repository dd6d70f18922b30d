"""The plan of a run: length, rows, tokens and learning rate of every step, and each rank's share. Needs no torch.

``RunConfig.plan`` derives it from the configuration once. Training reads only the plan, not the configuration.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.curriculum_config import AdaptiveCurriculum
from seqlen_curriculum.schedule.global_batch import GlobalBatch
from seqlen_curriculum.schedule.micro_batch import balanced_rows
from seqlen_curriculum.schedule.scheduler import CurriculumScheduler
from seqlen_curriculum.schedule.shortening import Shortening
from seqlen_curriculum.schedule.timeline import Timeline
from seqlen_curriculum.schedule.token_lr import TokenRate, TokenRateParams

if TYPE_CHECKING:
    from seqlen_curriculum.config.run import RunConfig

__all__ = ["RunPlan"]


@dataclass(frozen=True)
class RunPlan:
    """The values of every step of a run. Steps are 1-based; tokens are target tokens over all ranks.

    ``timeline`` returns the length, rows and tokens of any step. ``scheduler`` provides the same lengths to the engine.
    """

    scheduler: CurriculumScheduler
    timeline: Timeline
    global_batch: GlobalBatch
    """Samples per step over all ranks: a constant, a warmup or a growth."""
    lr_params: TokenRateParams | None
    """``scheduler.params`` of a token-wise ``scheduler``; None if DeepSpeed schedules the rate."""
    max_lr: float | None
    """``optimizer.params.lr``."""
    data_ranks: int
    """Number of data-parallel ranks; 1 until the number of ranks is known (``RunConfig.for_ranks``)."""
    micro_batch: int
    """Rows per micro-batch at full length."""
    balanced: bool
    """True if micro-batches have more rows at short lengths."""
    least_micro_batches: int
    """Number of pipeline stages, 1 without a pipeline. Fewer micro-batches per step leave stages idle; more were slower at
    short lengths."""
    eval_interval: int
    """Steps between evaluations; 0: never."""
    held: tuple[int, ...] = ()
    """Steps after whose evaluation the ramp of an ``adaptive`` schedule pauses until the next evaluation. They are state of
    the run, not part of its configuration."""

    @classmethod
    def of(cls, config: RunConfig) -> RunPlan:
        """Derive the plan of ``config``. Raises ConfigError without ``train_batch_size`` or ``training.train_tokens``."""
        training, keys = config.training, config.keys
        if training is None:
            raise ConfigError("training: section required, but not given")
        scheduler = config.curriculum_scheduler()
        return cls(
            scheduler=scheduler,
            timeline=Timeline(scheduler.pacing, config.rows, training.train_tokens, config.shortening),
            global_batch=config.rows,
            lr_params=config.scheduler.params if config.scheduler else None,
            max_lr=keys.lr,
            data_ranks=config.data_ranks,
            # Final once the number of ranks is known: 512 rows = 8 ranks x 16 micro-batches of 4 rows.
            micro_batch=keys.train_micro_batch_size_per_gpu or config.global_batch,
            balanced=training.micro_batch == "balanced",
            least_micro_batches=keys.pipeline_stages,
            eval_interval=training.eval_interval,
        )

    @property
    def steps(self) -> int:
        """Return the number of the run's last step."""
        return self.timeline.steps

    @property
    def shortening(self) -> Shortening:
        """Return how a sample is shortened to a step's seqlen."""
        return self.timeline.shortening

    def learning_rate(self, max_lr: float | None = None) -> TokenRate | None:
        """Return the learning rate schedule, None if DeepSpeed schedules the rate.

        ``max_lr`` overrides ``optimizer.params.lr``, for an optimizer that the user made. Raises ConfigError if neither
        gives the peak rate.
        """
        if self.lr_params is None:
            return None
        peak = max_lr or self.max_lr
        if peak is None:
            raise ConfigError(
                "optimizer.params.lr: required, but not given; the schedule of scheduler.type warms up to it"
            )
        return TokenRate(self.timeline, self.lr_params, peak)

    def samples_of_rank(self, step: int, data_rank: int) -> tuple[int, int]:
        """Return (first, count) of the samples that ``data_rank`` reads at ``step``."""
        count = self.timeline.samples(step) // self.data_ranks
        return data_rank * count, count

    def micro_batch_rows(self, rows: int, row_tokens: int) -> int:
        """Return the rows per micro-batch if a rank has ``rows`` rows of ``row_tokens`` tokens per step."""
        if not self.balanced:
            return self.micro_batch
        return balanced_rows(rows, self.micro_batch, self.shortening.seq_length, row_tokens, self.least_micro_batches)

    def largest_micro_batch(self) -> tuple[int, int]:
        """Return (rows, tokens per row) of the micro-batch with most tokens, evaluation included; of equals, the longest."""
        shapes = [
            (self.micro_batch_rows(rows // self.data_ranks, tokens), tokens) for rows, tokens in self.timeline.shapes()
        ]
        if self.eval_interval:
            shapes.append((self.micro_batch, self.shortening.seq_length))
        return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]))

    def holds_at(self, step: int, perplexity_ratio: float) -> bool:
        """Return whether the ramp of an ``adaptive`` schedule pauses after an evaluation at ``step``.

        ``perplexity_ratio`` is the perplexity divided by that of the best earlier evaluation. False at full length.
        """
        curriculum, settles_at = self.scheduler.config, self.timeline.pacing.settles_at
        if not isinstance(curriculum, AdaptiveCurriculum) or (settles_at is not None and step >= settles_at):
            return False
        return perplexity_ratio > curriculum.schedule_config.perplexity_ratio

    def holding(self, *steps: int) -> RunPlan:
        """Return the plan whose ramp also pauses for ``eval_interval`` steps after each of ``steps``."""
        if not steps:
            return self
        held, scheduler = (*self.held, *steps), copy.copy(self.scheduler)
        scheduler.hold(held, self.eval_interval)
        timeline = Timeline(scheduler.pacing, self.global_batch, self.timeline.train_tokens, self.shortening)
        return replace(self, scheduler=scheduler, timeline=timeline, held=held)
