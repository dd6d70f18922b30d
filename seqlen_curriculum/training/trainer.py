"""The training loop: one length per optimizer step, evaluation at full length, stop by tokens.

Shapes: ``B`` rows of a rank in a step, ``S`` today's seqlen.
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

from seqlen_curriculum.config.run import TrainingConfig
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.data.training_data import TrainingData
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.run_log import RunLog
from seqlen_curriculum.schedule.micro_batch import balanced_rows
from seqlen_curriculum.schedule.piecewise import IntArray
from seqlen_curriculum.schedule.timeline import Timeline
from seqlen_curriculum.training.adam_moments import adam_moments
from seqlen_curriculum.training.engine import begin_step, skip_step
from seqlen_curriculum.training.executor import Executor
from seqlen_curriculum.training.preflight import preflight
from seqlen_curriculum.training.spike_guard import SpikeGuard
from seqlen_curriculum.training.telemetry import Telemetry, log_rank0

__all__ = ["StopSignals", "Trainer", "row_seed"]


def row_seed(seed: int, step: int, row: int) -> int:
    """The random seed of the micro-batch that starts at global row ``row`` of ``step``.

    Dropout is keyed by what is trained on, not by who trains it, so a resume needs no random state and draws the same
    masks on another number of ranks wherever the micro-batches are the same.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass
class Trainer:
    """Trains ``engine`` along ``timeline``; every step's data, length and rate follow from the step alone."""

    executor: Executor
    timeline: Timeline
    train_data: TrainingData
    valid_samples: Samples | None
    micro_batch: int
    settings: TrainingConfig
    telemetry: Telemetry
    guard: SpikeGuard
    signals: StopSignals
    save: Callable[[int, Evaluations], None]  # checkpoint of a step, called on all ranks
    evaluations: Evaluations  # those so far
    sample_log: RunLog | None = None
    set_window: Callable[[int | None], None] = lambda _: None  # today's window of attention; None for whole rows
    until_step: int | None = None  # stop after it, saved
    adapt: Callable[[Trainer, int, float], int | None] | None = None  # judges (step, perplexity over the best before)

    @property
    def engine(self) -> Any:
        """DeepSpeed's."""
        return self.executor.engine

    def train(self, first_step: int) -> bool:
        """Run from ``first_step`` to the budget. True when it is reached, False when a signal or ``until_step`` came first.

        Raises DivergenceError, and RollbackRequested where the guard is to go back.
        """
        if self.settings.preflight and first_step <= self.timeline.steps:
            preflight(self.executor, *self._largest_micro_batch())
        step, stop = first_step - 1, False
        while step < self._end and not stop:
            step += 1
            stop = self._step(step, self.signals.received)
            if self._due(step, self.settings.eval_interval):
                self._evaluate(step)
            asked_for = stop or step in (self._end, *self.settings.save_steps)
            if asked_for or self._due(step, self.settings.save_interval):
                self.save(step, self.evaluations)
        if step >= self.timeline.steps:
            log_rank0(f"finished: {step} steps, {self.timeline.consumed_tokens(step):,} tokens")
            return True
        if step < first_step:
            log_rank0(f"nothing to do: step {step} is done, and --until-step asks for no later one")
            return False
        why = "by a signal" if stop else "as --until-step asks"
        log_rank0(f"stopped after step {step} {why}, and saved; the same command continues")
        return False

    @property
    def _end(self) -> int:
        """The last step to train now."""
        return min(self.timeline.steps, self.until_step or self.timeline.steps)

    def _due(self, step: int, interval: int) -> bool:
        """Every ``interval`` steps and at the run's last one; never for 0."""
        return bool(interval) and (step % interval == 0 or step == self.timeline.steps)

    def _step(self, step: int, stop: bool) -> bool:
        """One optimizer step. Returns whether any rank was asked to stop."""
        started = time.perf_counter()
        begin_step(self.engine)
        seqlen, rate = self.engine.curriculum_scheduler.get_current_difficulty(), self.engine.get_lr()[0]
        if not self.guard.begin(step, seqlen, rate):
            return self._skip_step(step, stop)
        micro_batches, seeds = self._micro_batches(step)
        self.set_window(seqlen)
        result = self.executor.train(micro_batches, seeds)
        norm = self._checked(result.grad_norm)
        loss, (stop, broken) = self._reduce_over_ranks(result.loss, stop, norm is not None and not math.isfinite(norm))
        told = self.guard.judge(loss, f"the gradient norm is {norm}" if broken else None)
        if told:
            log_rank0(told)
        due = self._due(step, self.settings.variance_interval)
        moments = adam_moments(self.executor) if due else {}
        record = {
            "step": step,
            "seqlen": seqlen,
            "rows": self.timeline.rows(step),
            "consumed_tokens": self.timeline.consumed_tokens(step),
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            **moments,
            "seconds": time.perf_counter() - started,
        }
        self.telemetry.step(record)
        return stop

    def _skip_step(self, step: int, stop: bool) -> bool:
        """Count the step begun as done: its tokens are consumed, nothing is trained on them. Returns as ``_step``."""
        rows = self.timeline.rows(step)
        skip_step(self.engine, rows // self.executor.data_ranks * self.engine.dp_world_size)
        record = {
            "step": step,
            "seqlen": self.timeline.seqlen(step),
            "rows": rows,
            "consumed_tokens": self.timeline.consumed_tokens(step),
            "skipped": True,
        }
        self.telemetry.skipped_step(record)
        return self._reduce_over_ranks(torch.zeros((), device=self.engine.device), stop)[1][0]

    def _micro_batches(self, step: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[int]]:
        """This rank's (inputs, targets), both (micro rows, S), of ``step``, and the seed of each."""
        count = self.timeline.samples(step) // self.executor.data_ranks
        first = self.executor.data_rank * count
        if self.sample_log is not None:
            sample_ids = np.stack(self.train_data.sample_ids(step, first, count), 1).tolist()
            self.sample_log.write({"step": step, "first_sample": first, "samples": sample_ids})
        inputs, targets = (self._on_device(tokens) for tokens in self.train_data.read(step, first, count))  # (B, S)
        rows, row_tokens = inputs.shape
        first_row, micro_rows = self.executor.data_rank * rows, self._micro_rows(rows, row_tokens)
        seeds = [row_seed(self.settings.seed, step, row) for row in range(first_row, first_row + rows, micro_rows)]
        return list(zip(torch.split(inputs, micro_rows), torch.split(targets, micro_rows), strict=True)), seeds

    def _micro_rows(self, rows: int, row_tokens: int) -> int:
        """Rows of a micro-batch of rows of so many tokens, where this rank's step has ``rows``."""
        if self.settings.micro_batch == "fixed":
            return self.micro_batch
        full, least = self.timeline.shortening.seq_length, self.executor.least_micro_batches
        return balanced_rows(rows, self.micro_batch, full, row_tokens, least)

    def _largest_micro_batch(self) -> tuple[int, int]:
        """(rows, tokens of a row) of the run's micro-batch of most tokens, evaluation's too; of several the longest rows."""
        ranks = self.executor.data_ranks
        shapes = [(self._micro_rows(rows // ranks, tokens), tokens) for rows, tokens in self.timeline.shapes()]
        if self.valid_samples is not None:
            shapes.append((self.micro_batch, self.valid_samples.seq_length))
        return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]))

    def _reduce_over_ranks(self, loss: torch.Tensor, *asked: bool) -> tuple[float, list[bool]]:
        """The loss averaged over ranks and what any rank asked for, in one reduction."""
        shared = torch.stack([loss, *(torch.tensor(float(one), dtype=loss.dtype, device=loss.device) for one in asked)])
        dist.all_reduce(shared)
        return float(shared[0]) / dist.get_world_size(), (shared[1:] > 0).tolist()

    def _checked(self, norm: float | None) -> float | None:
        """None also where fp16 overflowed and DeepSpeed skipped the step."""
        return None if norm is not None and not math.isfinite(norm) and self.engine.fp16_enabled() else norm

    def _evaluate(self, step: int) -> None:
        """Full-length loss on the same validation rows each time, every row once however many ranks share them."""
        started = time.perf_counter()
        samples = self.valid_samples
        assert samples is not None
        rows = min(self.settings.eval_rows, samples.num_samples)
        ids = np.arange(rows, dtype=np.int64) * samples.num_samples // rows  # evenly over the split
        total = torch.zeros((), device=self.engine.device, dtype=torch.float64)
        self.set_window(None)
        for chunk, weight in _eval_chunks(ids, self.executor.data_rank, self.executor.data_ranks, self.micro_batch):
            tokens = self._on_device(samples.read(chunk, samples.seq_length))
            total += self.executor.evaluate((tokens[:, :-1], tokens[:, 1:])) * weight
        valid_loss = self._reduce_over_ranks(total)[0] / rows
        if not math.isfinite(valid_loss):
            self.guard.stop_or_roll_back(f"the validation loss is {valid_loss}")
        ratio = self.evaluations.ratio(valid_loss)
        self.telemetry.evaluation(
            {
                "step": step,
                "consumed_tokens": self.timeline.consumed_tokens(step),
                "valid_loss": valid_loss,
                "valid_ppl": math.exp(min(20.0, valid_loss)),
                "seconds": time.perf_counter() - started,
            }
        )
        self.guard.judge_perplexity(ratio)
        held = self.adapt(self, step, ratio) if self.adapt is not None else None
        self.evaluations = self.evaluations.then(valid_loss, held)

    def _on_device(self, tokens: npt.NDArray[Any]) -> torch.Tensor:
        # Not every device knows the 16 bits without sign that tokens are stored in.
        return torch.from_numpy(tokens.astype(np.int64)).to(self.engine.device, non_blocking=True)


class StopSignals:
    """Notes SIGTERM and SIGINT instead of dying, so that the step is finished and saved; a second SIGINT kills."""

    def __init__(self) -> None:
        self.received = self._interrupted = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _frame: object) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.received = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _eval_chunks(ids: IntArray, rank: int, ranks: int, most_rows: int) -> Iterator[tuple[IntArray, int]]:
    """A rank's (ids to read together, rows that their loss, averaged over ranks, stands for).

    All ranks get equally many chunks of equal size, as engines want whose forward is a joint work. Rows that don't divide
    over the ranks are read by each of them.
    """
    shared = len(ids) // ranks * ranks
    mine, rest = ids[:shared][rank::ranks], ids[shared:]
    for start in range(0, len(mine), most_rows):
        chunk = mine[start : start + most_rows]
        yield chunk, len(chunk) * ranks
    for start in range(0, len(rest), most_rows):
        chunk = rest[start : start + most_rows]
        yield chunk, len(chunk)
