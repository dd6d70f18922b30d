"""The training loop: one length per optimizer step, evaluation at full length, stop by tokens.

Shapes: ``B`` rows of a rank in a step, ``S`` today's seqlen.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist

from seqlen_curriculum.config import TrainingConfig
from seqlen_curriculum.data.samples import Samples
from seqlen_curriculum.errors import DivergenceError
from seqlen_curriculum.microbatch import balanced_rows
from seqlen_curriculum.runlog import RunLog
from seqlen_curriculum.timeline import Timeline
from seqlen_curriculum.training.accumulate import accumulate
from seqlen_curriculum.training.telemetry import Telemetry, say

__all__ = ["Trainer", "row_seed"]


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

    engine: Any
    timeline: Timeline
    train_samples: Samples
    valid_samples: Samples | None
    rows_per_rank: int
    micro_batch: int
    settings: TrainingConfig
    telemetry: Telemetry
    save: Callable[[int], None]  # checkpoint of a step, called on all ranks
    sample_log: RunLog | None = None

    def train(self, first_step: int) -> bool:
        """Run from ``first_step`` to the budget. True when it is reached, False when a signal stopped it earlier."""
        last_step = self.timeline.steps
        with _StopSignals() as signals:
            for step in range(first_step, last_step + 1):
                stop = self._step(step, signals.received)
                if _due(step, self.settings.eval_interval, last_step):
                    self._evaluate(step)
                if stop or _due(step, self.settings.save_interval or last_step, last_step):
                    self.save(step)
                if stop and step < last_step:
                    say(f"stopped after step {step} by a signal, and saved; the same command continues")
                    return False
        say(f"finished: {last_step} steps, {self.timeline.consumed_tokens(last_step):,} tokens")
        return True

    def _step(self, step: int, stop: bool) -> bool:
        """One optimizer step. Returns whether any rank was asked to stop."""
        started = time.perf_counter()
        engine, seqlen = self.engine, self.engine.curriculum_scheduler.update_difficulty(step)
        loss, stop = self._agree(self._forward_backward(step, seqlen), stop, step, seqlen)
        unsharded_norm = self._unsharded_grad_norm()
        rate = engine.get_lr()[0]  # of this step: engine.step() puts the next one's in force
        engine.step()
        grad_norm = self._checked(engine.get_global_grad_norm() if unsharded_norm is None else unsharded_norm, step)
        record = {
            "step": step,
            "seqlen": seqlen,
            "rows": self.timeline.rows(step),
            "consumed_tokens": self.timeline.consumed_tokens(step),
            "loss": loss,
            "lr": rate,
            "grad_norm": grad_norm,
            "seconds": time.perf_counter() - started,
        }
        self.telemetry.step(record)
        return stop

    def _forward_backward(self, step: int, seqlen: int) -> torch.Tensor:
        """This rank's mean loss of ``step``, an fp64 scalar; its gradients are accumulated and averaged over ranks."""
        first_row = dist.get_rank() * self.rows_per_rank
        ids = self.train_samples.order(self.timeline.consumed_rows(step - 1) + first_row, self.rows_per_rank)
        if self.sample_log is not None:
            self.sample_log.write({"step": step, "first_row": first_row, "samples": ids.tolist()})
        tokens = self._on_device(self.train_samples.read(ids, seqlen))  # (B, S + 1)
        micro_batches = [(rows[:, :-1], rows[:, 1:]) for rows in torch.split(tokens, self._micro_rows(seqlen))]
        starts = range(first_row, first_row + self.rows_per_rank, self._micro_rows(seqlen))
        return accumulate(self.engine, micro_batches, [row_seed(self.settings.seed, step, row) for row in starts])

    def _micro_rows(self, seqlen: int) -> int:
        """Rows of a micro-batch at today's length."""
        if self.settings.micro_batch == "fixed":
            return self.micro_batch
        return balanced_rows(self.rows_per_rank, self.micro_batch, self.train_samples.seq_length, seqlen)

    def _agree(self, loss: torch.Tensor, stop: bool, step: int, seqlen: int) -> tuple[float, bool]:
        """The loss averaged over ranks and whether any rank must stop, in one reduction."""
        shared = torch.stack([loss, torch.tensor(float(stop), dtype=loss.dtype, device=loss.device)])
        dist.all_reduce(shared)
        loss_value = float(shared[0]) / dist.get_world_size()
        if not math.isfinite(loss_value):
            raise _diverged(step, f"the loss is {loss_value} at seqlen {seqlen}")
        return loss_value, bool(shared[1] > 0)

    def _checked(self, grad_norm: Any, step: int) -> float | None:
        """The norm as a number; None where there is none, or where fp16 overflowed and DeepSpeed skipped the step."""
        norm = None if grad_norm is None else float(grad_norm)
        if norm is None or math.isfinite(norm):
            return norm
        if not self.engine.fp16_enabled():  # the weights are broken by now: nothing of them may be saved
            raise _diverged(step, f"the gradient norm is {norm}")
        return None

    def _unsharded_grad_norm(self) -> torch.Tensor | None:
        """The gradient norm where DeepSpeed keeps none: fp32 without ZeRO. Gradients are averaged by now."""
        engine = self.engine
        if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])

    def _evaluate(self, step: int) -> None:
        """Full-length loss on the same validation rows each time, every row once however many ranks share them."""
        started = time.perf_counter()
        samples = self.valid_samples
        assert samples is not None
        rows = min(self.settings.eval_rows, samples.num_samples)
        ids = np.arange(rows, dtype=np.int64) * samples.num_samples // rows  # evenly over the split
        mine = ids[dist.get_rank() :: dist.get_world_size()]
        total = torch.zeros((), device=self.engine.device, dtype=torch.float64)
        self.engine.eval()
        with torch.no_grad():
            # Every rank makes the same number of forward calls (ZeRO-3 gathers weights in each); a rank that has run out
            # of rows repeats one with weight 0.
            for start in range(0, -(-rows // dist.get_world_size()), self.micro_batch):
                chunk = mine[start : start + self.micro_batch]
                tokens = self._on_device(samples.read(chunk if len(chunk) else ids[:1], samples.seq_length))
                total += self.engine(tokens[:, :-1], tokens[:, 1:]).detach() * len(chunk)
        self.engine.train()
        dist.all_reduce(total)
        valid_loss = float(total) / rows
        if not math.isfinite(valid_loss):
            raise _diverged(step, f"the validation loss is {valid_loss}")
        self.telemetry.evaluation(
            {
                "step": step,
                "consumed_tokens": self.timeline.consumed_tokens(step),
                "valid_loss": valid_loss,
                "valid_ppl": math.exp(min(20.0, valid_loss)),
                "seconds": time.perf_counter() - started,
            }
        )

    def _on_device(self, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(tokens).to(self.engine.device, non_blocking=True)


class _StopSignals:
    """Notes SIGTERM and SIGINT instead of dying, so that the step is finished and saved; a second SIGINT kills."""

    def __init__(self) -> None:
        self.received = self._interrupted = False

    def __enter__(self) -> _StopSignals:
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


def _diverged(step: int, what: str) -> DivergenceError:
    return DivergenceError(
        f"step {step}: {what}; training stops and the last checkpoint is intact. Lower optimizer.params.lr, lengthen the "
        "curriculum, raise its min_difficulty or check the precision settings, then train into another --save"
    )


def _due(step: int, interval: int, last_step: int) -> bool:
    """Every ``interval`` steps and at the last one; never for 0."""
    return bool(interval) and (step % interval == 0 or step == last_step)
