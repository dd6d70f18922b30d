"""The training loop: one length per optimizer step, evaluation at full length, stop by tokens.

Shapes: ``B`` rows of a rank in a step, ``S`` the step's seqlen.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from deepspeed import comm as dist

from seqlen_curriculum.config.plan import RunPlan
from seqlen_curriculum.config.training import TrainingConfig
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.data.training_data import TrainingData
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.run_log import RunLog
from seqlen_curriculum.schedule.piecewise import IntArray
from seqlen_curriculum.training.adam_moments import adam_moments
from seqlen_curriculum.training.engine import begin_step, follow_plan, skip_step
from seqlen_curriculum.training.executor import Executor
from seqlen_curriculum.training.preflight import preflight
from seqlen_curriculum.training.spike_guard import SpikeGuard
from seqlen_curriculum.training.telemetry import Telemetry, log_rank0

__all__ = ["StopSignals", "Trainer", "row_seed"]


def row_seed(seed: int, step: int, row: int) -> int:
    """Return the random seed of the micro-batch that starts at global row ``row`` of ``step``.

    Dropout is keyed by what is trained on, not by who trains it, so a resume needs no random state and draws the same
    masks on another number of ranks wherever the micro-batches are the same.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass
class Trainer:
    """Trains the executor's engine along ``plan``; every step's data, length and rate follow from the step alone."""

    executor: Executor
    plan: RunPlan
    train_data: TrainingData
    valid_samples: Samples | None
    settings: TrainingConfig
    telemetry: Telemetry
    guard: SpikeGuard
    signals: StopSignals
    save: Callable[[int, Evaluations], None]
    """Writes the checkpoint of a step, or begins to; called on all ranks."""
    wait_for_checkpoint: Callable[[], None]
    """Waits until the checkpoints that were begun are complete; called on all ranks."""
    evaluations: Evaluations
    """What earlier evaluations decided."""
    sample_log: RunLog | None = None
    set_window: Callable[[int | None], None] | None = None
    """Sets the attention window of the step, None for whole rows; None for models without windows."""
    until_step: int | None = None
    """Save and stop after this step."""

    def __post_init__(self) -> None:
        self._follow(self.plan)

    def _follow(self, plan: RunPlan) -> None:
        """Put ``plan`` in force for the steps to come: all that depends on its timeline is set here."""
        self.plan = plan
        self.train_data = self.train_data.along(plan.timeline)
        self.telemetry.follow(plan.timeline)
        follow_plan(self.executor.engine, plan)

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine."""
        return self.executor.engine

    def train(self, first_step: int) -> bool:
        """Train from ``first_step`` to the budget: True when it is reached, False if a signal or ``until_step`` came first.

        Raises DivergenceError, and RollbackRequested where the spike guard asks to return to a checkpoint.
        """
        if self.settings.preflight and first_step <= self.plan.steps:
            preflight(self.executor, *self.plan.largest_micro_batch())
        step, stop = first_step - 1, False
        while step < self._last_step and not stop:
            step += 1
            stop = self._step(step, self.signals.received)
            if self._is_due(step, self.settings.eval_interval):
                self._evaluate(step)
            # An evaluation may hold the lengths, which makes the run longer: the last step is asked anew.
            asked_for = stop or step in (self._last_step, *self.settings.save_steps)
            if asked_for or self._is_due(step, self.settings.save_interval):
                self.save(step, self.evaluations)
        self.wait_for_checkpoint()
        return self._report_end(step, first_step, stop)

    def _report_end(self, step: int, first_step: int, stop: bool) -> bool:
        if step >= self.plan.steps:
            log_rank0(f"finished: {step} steps, {self.plan.timeline.consumed_tokens(step):,} tokens")
            return True
        if step < first_step:
            log_rank0(f"nothing to do: step {step} is done, and --until-step asks for no later one")
        else:
            reason = "by a signal" if stop else "as --until-step asks"
            log_rank0(f"stopped after step {step} {reason}, and saved; rerun the same command to resume")
        return False

    @property
    def _last_step(self) -> int:
        return min(self.plan.steps, self.until_step or self.plan.steps)

    def _is_due(self, step: int, interval: int) -> bool:
        """Return whether ``step`` is a multiple of ``interval`` or the run's last; never for 0."""
        return bool(interval) and (step % interval == 0 or step == self.plan.steps)

    def _step(self, step: int, stop: bool) -> bool:
        """Do one optimizer step. Return whether any rank was asked to stop."""
        started = time.perf_counter()
        begin_step(self.engine)
        seqlen, rate = self.engine.curriculum_scheduler.get_current_difficulty(), self.engine.get_lr()[0]
        if not self.guard.begin(step, seqlen, rate):
            return self._skip_step(step, stop)
        micro_batches, seeds = self._micro_batches(step)
        if self.set_window is not None:
            self.set_window(seqlen)
        result = self.executor.train(micro_batches, seeds)
        norm = result.grad_norm
        if norm is not None and not math.isfinite(norm) and self.engine.fp16_enabled():
            norm = None  # fp16 overflowed and DeepSpeed skipped the step
        loss, (stop, broken) = self._reduce_over_ranks(result.loss, stop, norm is not None and not math.isfinite(norm))
        spike_line = self.guard.judge(loss, f"the gradient norm is {norm}" if broken else None)
        if spike_line:
            log_rank0(spike_line)
        due = self._is_due(step, self.settings.variance_interval)
        moments = adam_moments(self.executor) if due else {}
        record = {
            "step": step,
            "seqlen": seqlen,
            "rows": self.plan.timeline.rows(step),
            "consumed_tokens": self.plan.timeline.consumed_tokens(step),
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            **moments,
            "seconds": time.perf_counter() - started,
        }
        self.telemetry.step(record)
        return stop

    def _skip_step(self, step: int, stop: bool) -> bool:
        """Count ``step``, already begun, as done: its tokens are consumed but not trained on. Return as ``_step``."""
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
        return self._reduce_over_ranks(torch.zeros((), device=self.engine.device), stop)[1][0]

    def _micro_batches(self, step: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[int]]:
        """Return this rank's (inputs, targets), both (micro rows, S), of ``step``, and the seed of each."""
        first, count = self.plan.samples_of_rank(step, self.executor.data_rank)
        if self.sample_log is not None:
            sample_ids = np.stack(self.train_data.sample_ids(step, first, count), 1).tolist()
            self.sample_log.write({"step": step, "first_sample": first, "samples": sample_ids})
        inputs, targets = (self._on_device(tokens) for tokens in self.train_data.read(step, first, count))  # (B, S)
        rows, row_tokens = inputs.shape
        first_row, micro_rows = self.executor.data_rank * rows, self.plan.micro_batch_rows(rows, row_tokens)
        seeds = [row_seed(self.settings.seed, step, row) for row in range(first_row, first_row + rows, micro_rows)]
        return list(zip(torch.split(inputs, micro_rows), torch.split(targets, micro_rows), strict=True)), seeds

    def _reduce_over_ranks(self, loss: torch.Tensor, *flags: bool) -> tuple[float, list[bool]]:
        """Return the loss averaged over ranks, and for each flag whether any rank set it: one reduction for all."""
        shared = torch.stack(
            [loss, *(torch.tensor(float(flag), dtype=loss.dtype, device=loss.device) for flag in flags)]
        )
        dist.all_reduce(shared)
        return float(shared[0]) / dist.get_world_size(), (shared[1:] > 0).tolist()

    def _evaluate(self, step: int) -> None:
        """Evaluate at full length on the same validation rows each time, every row once however many ranks share them."""
        started = time.perf_counter()
        samples = self.valid_samples
        assert samples is not None
        rows = min(self.settings.eval_rows, samples.num_samples)
        ids = np.arange(rows, dtype=np.int64) * samples.num_samples // rows  # evenly over the split
        total = torch.zeros((), device=self.engine.device, dtype=torch.float64)
        if self.set_window is not None:
            self.set_window(None)
        for chunk, weight in _eval_chunks(
            ids, self.executor.data_rank, self.executor.data_ranks, self.plan.micro_batch
        ):
            tokens = self._on_device(samples.read(chunk, samples.seq_length))
            total += self.executor.evaluate((tokens[:, :-1], tokens[:, 1:])) * weight
        valid_loss = self._reduce_over_ranks(total)[0] / rows
        if not math.isfinite(valid_loss):
            self.guard.stop_or_roll_back(f"the validation loss is {valid_loss}")
        ratio = self.evaluations.ratio(valid_loss)
        self.telemetry.evaluation(
            {
                "step": step,
                "consumed_tokens": self.plan.timeline.consumed_tokens(step),
                "valid_loss": valid_loss,
                "valid_ppl": math.exp(min(20.0, valid_loss)),
                "seconds": time.perf_counter() - started,
            }
        )
        self.guard.judge_perplexity(ratio)
        self.evaluations = self.evaluations.then(valid_loss, self._hold_lengths(step, ratio))

    def _hold_lengths(self, step: int, perplexity_ratio: float) -> int | None:
        """Hold the lengths of an ``adaptive`` schedule where the perplexity fluctuates: return ``step``, else None.

        All ranks have the same ratio, so all of them decide the same.
        """
        if not self.plan.holds_at(step, perplexity_ratio):
            return None
        self._follow(self.plan.holding(step))
        log_rank0(
            f"step {step}: the perplexity is {perplexity_ratio:.3f} times its best before; lengths stay for "
            f"{self.settings.eval_interval} steps"
        )
        return step

    def _on_device(self, tokens: npt.NDArray[Any]) -> torch.Tensor:
        # Tokens are stored as unsigned 16-bit integers, which not every device supports.
        return torch.from_numpy(tokens.astype(np.int64)).to(self.engine.device, non_blocking=True)

    def close(self) -> None:
        """Close the logs and the progress bar."""
        self.telemetry.close()
        if self.sample_log is not None:
            self.sample_log.close()


class StopSignals:
    """Records SIGTERM and SIGINT, so that the step is finished and saved before the run stops; a second SIGINT kills."""

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


def _eval_chunks(ids: IntArray, rank: int, ranks: int, most_rows: int) -> Iterator[tuple[IntArray, int]]:
    """Yield a rank's (ids to read together, rows that their loss, averaged over ranks, stands for).

    All ranks get equally many chunks of equal size, as engines need whose forward is collective. Rows that don't divide
    over the ranks are read by each of them.
    """
    # 10 rows on 4 ranks: rows 0-7 are shared, 2 a rank, each standing for 2 x 4 of the 10; rows 8 and 9 are read by all
    # four, whose mean stands for 2. 8 + 2 = 10.
    shared = len(ids) // ranks * ranks
    mine, rest = ids[:shared][rank::ranks], ids[shared:]
    for start in range(0, len(mine), most_rows):
        chunk = mine[start : start + most_rows]
        yield chunk, len(chunk) * ranks
    for start in range(0, len(rest), most_rows):
        chunk = rest[start : start + most_rows]
        yield chunk, len(chunk)
