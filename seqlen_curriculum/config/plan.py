"""One run by arithmetic: the length, rows, tokens and rate of every step, and what each rank does of it. Needs no torch.

``RunConfig.plan`` derives it from the configuration once; whatever trains is handed the plan and never asks the
configuration again.
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
from seqlen_curriculum.schedule.token_lr import TokenCosine, TokenCosineParams

if TYPE_CHECKING:
    from seqlen_curriculum.config.run import RunConfig

__all__ = ["RunPlan"]


@dataclass(frozen=True)
class RunPlan:
    """What a run is. Steps are 1-based; tokens are target tokens over all ranks.

    ``timeline`` answers for lengths, rows and tokens of any step, ``scheduler`` is the engine's view of the same lengths.
    """

    scheduler: CurriculumScheduler
    timeline: Timeline
    global_batch: GlobalBatch
    """Samples of every step over all ranks, their warmup or their growth."""
    lr_params: TokenCosineParams | None
    """``scheduler.params`` of a ``TokenCosineLR``; None where the rate is DeepSpeed's own."""
    max_lr: float | None
    """``optimizer.params.lr``."""
    data_ranks: int
    """Ranks that read rows of their own; 1 until the number of ranks is known (``RunConfig.for_ranks``)."""
    micro_batch: int
    """Rows of a rank's micro-batch at full length."""
    balanced: bool
    """Whether micro-batches have more rows at short lengths."""
    least_micro_batches: int
    """The stages of a pipeline, 1 without one: fewer micro-batches leave stages idle, more were slower at short lengths."""
    eval_interval: int
    """Steps between evaluations; 0: never."""
    held: tuple[int, ...] = ()
    """Steps after whose evaluation an ``adaptive`` schedule holds its lengths until the next one: state of a run, in no
    file."""

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
            # Known once the ranks are: 512 rows = 8 ranks x 16 micro-batches of 4 rows.
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

    def learning_rate(self, max_lr: float | None = None) -> TokenCosine | None:
        """Return the rate of every step, None where it is DeepSpeed's own; ``max_lr`` of a user's own optimizer.

        Raises ConfigError where neither the file nor ``max_lr`` gives the rate to warm up to.
        """
        if self.lr_params is None:
            return None
        peak = max_lr or self.max_lr
        if peak is None:
            raise ConfigError("optimizer.params.lr: required, but not given; TokenCosineLR warms up to it")
        return TokenCosine(self.timeline, self.lr_params, peak)

    def samples_of_rank(self, step: int, data_rank: int) -> tuple[int, int]:
        """Return (first, count) of the samples of ``step`` that this rank reads."""
        count = self.timeline.samples(step) // self.data_ranks
        return data_rank * count, count

    def micro_batch_rows(self, rows: int, row_tokens: int) -> int:
        """Return the rows of a micro-batch where a rank's step has ``rows`` rows of ``row_tokens`` tokens."""
        if not self.balanced:
            return self.micro_batch
        return balanced_rows(rows, self.micro_batch, self.shortening.seq_length, row_tokens, self.least_micro_batches)

    def largest_micro_batch(self) -> tuple[int, int]:
        """Return (rows, tokens of a row) of the micro-batch of most tokens, evaluation's too; of equals the longest rows."""
        shapes = [
            (self.micro_batch_rows(rows // self.data_ranks, tokens), tokens) for rows, tokens in self.timeline.shapes()
        ]
        if self.eval_interval:
            shapes.append((self.micro_batch, self.shortening.seq_length))
        return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]))

    def holds_at(self, step: int, perplexity_ratio: float) -> bool:
        """Return whether an ``adaptive`` schedule holds its lengths after an evaluation at ``step``.

        ``perplexity_ratio`` is that of the evaluation to the best one before it. Never once full length is reached.
        """
        curriculum, settles_at = self.scheduler.config, self.timeline.pacing.settles_at
        if not isinstance(curriculum, AdaptiveCurriculum) or (settles_at is not None and step >= settles_at):
            return False
        return perplexity_ratio > curriculum.schedule_config.perplexity_ratio

    def holding(self, *steps: int) -> RunPlan:
        """Return the plan whose lengths also wait for ``eval_interval`` steps after each of ``steps``."""
        if not steps:
            return self
        held, scheduler = (*self.held, *steps), copy.copy(self.scheduler)
        scheduler.hold(held, self.eval_interval)
        timeline = Timeline(scheduler.pacing, self.global_batch, self.timeline.train_tokens, self.shortening)
        return replace(self, scheduler=scheduler, timeline=timeline, held=held)
