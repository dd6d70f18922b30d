"""The training loop: one length per optimizer step, evaluation at full length, stop by tokens.

Shapes: ``B`` rows of a rank in a step, ``S`` the step's seqlen.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from seqlen_curriculum.config.plan import RunPlan
from seqlen_curriculum.config.training import TrainingConfig
from seqlen_curriculum.data.objective import NextToken, Objective
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.data.training_data import RunData
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.run_log import RunLog
from seqlen_curriculum.training.adam_moments import MomentsMeter
from seqlen_curriculum.training.documents import DocumentBatches
from seqlen_curriculum.training.engine import begin_step, follow_plan, skip_step
from seqlen_curriculum.training.eval_chunks import eval_chunks
from seqlen_curriculum.training.executor import Executor, StepResult
from seqlen_curriculum.training.outcome import share_outcome
from seqlen_curriculum.training.prefetch import Prefetcher, StepData, to_device
from seqlen_curriculum.training.preflight import preflight
from seqlen_curriculum.training.seeding import row_seed
from seqlen_curriculum.training.spike_guard import SpikeGuard
from seqlen_curriculum.training.telemetry import Telemetry, log_rank0
from seqlen_curriculum.training.watchdog import Watchdog

__all__ = ["Ending", "StopSignals", "Trainer"]

Ending: TypeAlias = Literal["finished", "until_step", "signal"]
"""The reason why training ended: the token budget or ``until_step`` was reached, or a signal arrived."""


@dataclass
class Trainer:
    """Training loop of the executor's engine; data, length and learning rate of a step depend only on the step."""

    executor: Executor
    plan: RunPlan
    train_data: RunData
    valid_samples: Samples | None
    settings: TrainingConfig
    telemetry: Telemetry
    watchdog: Watchdog
    guard: SpikeGuard
    signals: StopSignals
    save: Callable[[int, Evaluations], None]
    """Writes the checkpoint of a step, or starts to; called on all ranks."""
    wait_for_checkpoint: Callable[[], None]
    """Waits until started checkpoints are complete; called on all ranks."""
    evaluations: Evaluations
    """The summary of earlier evaluations."""
    sample_log: RunLog | None = None
    set_window: Callable[[int | None], None] | None = None
    """Sets the attention window of a step, None for whole rows. None for models without windows."""
    has_dropout: bool = True
    """False for a model that uses no random numbers in training, which needs no seeds."""
    objective: Objective = field(default_factory=NextToken)
    """The tokens that the model predicts in each row."""
    documents: DocumentBatches | None = None
    """The parts of documents that attention and positions stop at; None for attention in whole rows."""
    until_step: int | None = None
    """Save and stop after this step."""

    def __post_init__(self) -> None:
        self._data = Prefetcher(self.read, self.engine.device)
        self._moments = MomentsMeter(self.executor)
        self._follow(self.plan)

    def _follow(self, plan: RunPlan) -> None:
        """Use ``plan`` for the next steps; everything that depends on its timeline is set here."""
        self._data.discard()  # it was read along the previous plan
        self.plan = plan
        self.train_data = self.train_data.along(plan.timeline)
        self.telemetry.follow(plan.timeline)
        follow_plan(self.executor.engine, plan)

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine."""
        return self.executor.engine

    def train(self, first_step: int) -> Ending:
        """Train from ``first_step`` to the budget, ``until_step`` or a signal; return which came first.

        Raises DivergenceError, and RollbackRequested if the spike guard requests a rollback.
        """
        if self.settings.preflight and first_step <= self.plan.steps:
            shape = self.plan.largest_micro_batch()
            parts = self.documents.largest(*shape, self.engine.device) if self.documents else None
            preflight(self.executor, *shape, self.objective.target_shape(*shape), parts)
        step, stop = first_step - 1, False
        while step < self._last_step and not stop:
            step += 1
            with self.watchdog.step(step, self.guard.skips(step)):
                stop = self.step(step, self.signals.received)
            if self._is_due(step, self.settings.eval_interval):
                self._evaluate(step)
            # An evaluation may pause the ramp, which makes the run longer, so the last step is recomputed.
            asked_for = stop or step in (self._last_step, *self.settings.save_steps)
            if asked_for or self._is_due(step, self.settings.save_interval):
                with self.telemetry.saving():
                    self.save(step, self.evaluations)
        self.wait_for_checkpoint()
        return self._report_end(step, first_step, stop)

    def _report_end(self, step: int, first_step: int, stop: bool) -> Ending:
        if step >= self.plan.steps:
            log_rank0(f"finished: {step} steps, {self.plan.timeline.consumed_tokens(step):,} tokens")
            return "finished"
        if step < first_step:
            log_rank0(f"nothing to do: step {step} is already done, and --until-step is not above it")
        else:
            reason = "by a signal" if stop else "because of --until-step"
            log_rank0(f"stopped after step {step} {reason}, and saved; rerun the same command to resume")
        return "signal" if stop else "until_step"

    @property
    def _last_step(self) -> int:
        return min(self.plan.steps, self.until_step or self.plan.steps)

    def _is_due(self, step: int, interval: int) -> bool:
        """Return whether ``step`` is a multiple of ``interval`` or the run's last; never for 0."""
        return bool(interval) and (step % interval == 0 or step == self.plan.steps)

    def step(self, step: int, stop: bool) -> bool:
        """Train one optimizer step. Return whether any rank was signalled to stop."""
        started, cpu_started = time.perf_counter(), time.process_time()
        seqlen = self.plan.timeline.seqlen(step)
        begin_step(self.engine, seqlen)
        rate = self.engine.get_lr()[0]
        if not self.guard.begin(step, seqlen, rate):
            return self._skip_step(step, stop)
        following = step + 1 if step < self._last_step and not stop and not self.guard.skips(step + 1) else None
        data, data_seconds = self._data.take(step, following)
        if self.sample_log is not None:
            first, _ = self.plan.samples_of_rank(step, self.executor.data_rank)
            self.sample_log.write({"step": step, "first_sample": first, "samples": data.sample_ids})
        if self.set_window is not None:
            self.set_window(seqlen)
        result = self.executor.train(data.micro_batches, data.seeds)
        done = share_outcome(result, stop, self.engine.fp16_enabled())
        broken = f"the gradient norm is {done.grad_norm}" if done.is_broken else None
        spike_line = self.guard.judge(done.loss, broken)
        if spike_line:
            log_rank0(spike_line)
        moments = self._moments.measure() if self._is_due(step, self.settings.variance_interval) else {}
        record = {
            "step": step,
            "seqlen": seqlen,
            "rows": self.plan.timeline.rows(step),
            "consumed_tokens": self.plan.timeline.consumed_tokens(step),
            "loss": done.loss,
            "lr": rate,
            "grad_norm": done.grad_norm,
            **data.facts,
            **moments,
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "data_seconds": data_seconds,
        }
        self.telemetry.step(record)
        return done.stop

    def _skip_step(self, step: int, stop: bool) -> bool:
        """Count the started ``step`` as done: its tokens are consumed but not trained on. Returns the same as ``step``."""
        timeline = self.plan.timeline
        rows = timeline.rows(step)
        skip_step(self.engine, rows // self.executor.data_ranks * self.engine.dp_world_size)
        record = {
            "step": step,
            "seqlen": timeline.seqlen(step),
            "rows": rows,
            "consumed_tokens": timeline.consumed_tokens(step),
            "skipped": True,
        }
        self.telemetry.skipped_step(record)
        nothing = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        return share_outcome(StepResult(nothing, None), stop).stop

    def read(self, step: int) -> StepData:
        """Read this rank's data of ``step``, as micro-batches on the device."""
        first, count = self.plan.samples_of_rank(step, self.executor.data_rank)
        ids = None
        if self.sample_log is not None:
            ids = np.stack(self.train_data.sample_ids(step, first, count), 1).tolist()
        tokens = self.train_data.read(step, first, count)  # (B, S) each
        rows, row_tokens = tokens[0].shape
        first_row = self.executor.data_rank * rows
        inputs, targets = (
            to_device(part, self.engine.device) for part in self.objective.of_step(*tokens, step, first_row)
        )
        micro_rows, seeds = self.plan.micro_batch_rows(rows, row_tokens), []
        if self.has_dropout:
            seeds = [row_seed(self.settings.seed, step, first_row + row) for row in range(0, rows, micro_rows)]
        micro_batches: list[Any] = list(
            zip(torch.split(inputs, micro_rows), torch.split(targets, micro_rows), strict=True)
        )
        if self.documents is None:
            return StepData(micro_batches, seeds, ids)
        found, own = self.train_data.document_rows(step), slice(first_row, first_row + rows)
        parts = self.documents.of_step(found, own, micro_rows, self.plan, step, self.engine.device)
        micro_batches = [(*pair, 0, of_pair) for pair, of_pair in zip(micro_batches, parts, strict=True)]
        return StepData(micro_batches, seeds, ids, {"document_starts": found.num_first_targets})

    def _evaluate(self, step: int) -> None:
        """Evaluate at full length on the same validation rows each time; each row counts once for any number of ranks."""
        started = time.perf_counter()
        samples = self.valid_samples
        assert samples is not None
        rows = min(self.settings.eval_rows, samples.num_samples)
        ids = np.arange(rows, dtype=np.int64) * samples.num_samples // rows  # evenly over the split
        total = torch.zeros((), device=self.engine.device, dtype=torch.float64)
        if self.set_window is not None:
            self.set_window(None)
        for chunk, weight in eval_chunks(ids, self.executor.data_rank, self.executor.data_ranks, self.plan.micro_batch):
            rows_of_chunk = self.objective.of_samples(samples.read(chunk, samples.seq_length), chunk)
            rows_on_device: tuple[Any, ...] = tuple(to_device(part, self.engine.device) for part in rows_of_chunk)
            if self.documents is not None:
                rows_on_device += (0, self.documents.of_samples(samples, ids, chunk, self.engine.device))
            total += self.executor.evaluate(rows_on_device) * weight
        valid_loss = share_outcome(StepResult(total, None)).loss / rows
        if not math.isfinite(valid_loss):
            self.guard.stop_or_roll_back(f"the validation loss is {valid_loss}")
        ratio = self.evaluations.ratio(valid_loss)
        self.telemetry.evaluation(
            {
                "step": step,
                "consumed_tokens": self.plan.timeline.consumed_tokens(step),
                "valid_loss": valid_loss,
                "valid_ppl": math.exp(min(20.0, valid_loss)),
                **self.objective.facts,
                **(self.documents.facts if self.documents else {}),
                "seconds": time.perf_counter() - started,
            }
        )
        self.guard.judge_perplexity(ratio)
        self.evaluations = self.evaluations.then(valid_loss, self._hold_lengths(step, ratio))

    def _hold_lengths(self, step: int, perplexity_ratio: float) -> int | None:
        """Pause the ramp of an ``adaptive`` schedule if the perplexity fluctuates and return ``step``, else None.

        All ranks have the same ratio, so all ranks decide the same.
        """
        if not self.plan.holds_at(step, perplexity_ratio):
            return None
        self._follow(self.plan.holding(step))
        log_rank0(
            f"step {step}: the validation perplexity is {perplexity_ratio:.3f} times the best before it; the ramp pauses "
            f"for {self.settings.eval_interval} steps"
        )
        return step

    def close(self) -> None:
        """Close the logs and the progress bar, and end the prefetch and watchdog threads."""
        self.watchdog.close()
        self._data.close()
        self.telemetry.close()
        if self.sample_log is not None:
            self.sample_log.close()


class StopSignals:
    """Handler of SIGTERM and SIGINT that lets the run finish and save its step first. A second SIGINT kills."""

    def __init__(self) -> None:
        self.received = self._interrupted = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def stop(self) -> None:
        """Stop the run as a signal does."""
        self.received = True

    def _note(self, number: int, _frame: object) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.received = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
