"""Host time of the training loop compared with a minimal DeepSpeed loop, on the first steps of a run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from tqdm import tqdm

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.data.from_config import open_training_data, with_buckets
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.causal_lm import build_model
from seqlen_curriculum.run_folder.evaluations import Evaluations
from seqlen_curriculum.run_folder.run_log import read_run_log
from seqlen_curriculum.training.accumulate import set_accumulation
from seqlen_curriculum.training.build import build_executor
from seqlen_curriculum.training.compile import compile_model
from seqlen_curriculum.training.documents import DocumentBatches
from seqlen_curriculum.training.prefetch import StepData
from seqlen_curriculum.training.spike_guard import LossesSoFar, SpikeGuard
from seqlen_curriculum.training.start import choose_attention, join_ranks
from seqlen_curriculum.training.telemetry import Telemetry
from seqlen_curriculum.training.trainer import StopSignals, Trainer
from seqlen_curriculum.training.utilization import utilization_of
from seqlen_curriculum.training.watchdog import Watchdog

__all__ = ["build_trainer", "measure_loop"]


class _Time(NamedTuple):
    cpu: float
    """CPU seconds of all threads of this process."""
    wall: float


def measure_loop(config: RunConfig, folder: Path, steps: int, pairs: int) -> dict[str, Any]:
    """Train the first steps of a run twice, alternating every ``steps`` steps: with ``Trainer`` and with a bare loop.

    The bare loop has its batches on the device in advance. Per step it sets the learning rate, runs forward and backward of
    each micro-batch, calls ``engine.step()`` and reads the loss. Both start from the same weights and get the same result.
    Evaluations and checkpoints are excluded. The run log is written to ``folder``. Needs one rank, a GPT-2 without dropout,
    a token-wise ``scheduler``, and the model, data and training sections. Raises ConfigError.

    Returns ``parameters``, ``step_tokens`` and ``micro_batches`` (means per step), and medians over ``pairs``: ``cpu_ratio``
    and ``ratio`` (CPU seconds and seconds of our loop relative to the bare one), ``cpu_milliseconds`` per step of the bare
    loop, and ``more_cpu_milliseconds`` of ours. ``loss_difference`` is the largest difference of the losses in any step. The
    first pair is a warmup.
    """
    assert config.model is not None
    if config.model.dropout or not config.model.is_gpt2 or config.scheduler is None or config.keys.model_cuts:
        raise ConfigError(
            "model.dropout: the comparison needs a GPT-2 on one rank without dropout, because the loops draw different "
            "masks, and a token-wise scheduler; set it to 0, and scheduler.type to TokenCosineLR"
        )
    join_ranks(config.deepspeed)
    choose_attention(config.shortening.seq_length)
    config = with_buckets(config).for_ranks(1)
    trainer, bare, rate = build_trainer(config, folder), _BareLoop(config), config.plan.learning_rate()
    assert rate is not None
    ours: list[_Time] = []
    theirs: list[_Time] = []
    micro_batches: list[tuple[Any, ...]] = []
    for turn in tqdm(range(pairs + 1), unit="pair", disable=None):
        numbers = range(turn * steps + 1, (turn + 1) * steps + 1)
        data, rates = [trainer.read(step) for step in numbers], [rate(step) for step in numbers]
        for is_ours in (True, False) if turn % 2 else (False, True):  # alternate which loop is first
            if is_ours:
                ours.append(_timed(lambda: [trainer.step(step, False) for step in numbers]))  # noqa: B023
            else:
                theirs.append(_timed(lambda: bare.train(data, rates)))  # noqa: B023
        micro_batches += [micro_batch for one in data for micro_batch in one.micro_batches] if turn else []
    trainer.close()
    losses = [record["loss"] for record in read_run_log(folder / "runlog.jsonl")]
    both = list(zip(ours, theirs, strict=True))[1:]  # the first is a warmup
    return {
        "parameters": sum(weight.numel() for weight in bare.engine.module.parameters()),
        "step_tokens": sum(micro_batch[0].numel() for micro_batch in micro_batches) / (pairs * steps),
        "micro_batches": len(micro_batches) / (pairs * steps),
        "cpu_ratio": statistics.median(one.cpu / other.cpu for one, other in both),
        "ratio": statistics.median(one.wall / other.wall for one, other in both),
        "cpu_milliseconds": 1e3 * statistics.median(other.cpu / steps for _, other in both),
        "more_cpu_milliseconds": 1e3 * statistics.median((one.cpu - other.cpu) / steps for one, other in both),
        "loss_difference": max(abs(one - other) for one, other in zip(losses, bare.losses, strict=True)),
    }


def build_trainer(config: RunConfig, folder: Path) -> Trainer:
    """Build the model of a run on one rank, and its trainer without evaluations and checkpoints; it logs to ``folder``."""
    assert config.training is not None
    assert config.model is not None
    torch.manual_seed(config.training.seed)  # the same weights for both loops
    plan, model = config.plan, build_model(config.model)
    rate = plan.learning_rate if plan.lr_params is not None else None
    executor, _ = build_executor(config.keys, config.deepspeed, model, plan.scheduler, rate)
    compile_model(config, model, executor.engine.device)
    utilization = utilization_of(executor.engine, config.model)
    return Trainer(
        executor=executor,
        plan=plan,
        train_data=open_training_data(config),
        valid_samples=None,
        settings=config.training,
        telemetry=Telemetry(folder / "runlog.jsonl", executor.engine.monitor, 0, plan.timeline, utilization),
        watchdog=Watchdog(config.training.hang_seconds, plan.timeline.consumed_tokens),
        guard=SpikeGuard(config.training, (), LossesSoFar()),
        signals=StopSignals(),
        save=lambda *_: None,
        wait_for_checkpoint=lambda: None,
        evaluations=Evaluations(),
        has_dropout=False,
        documents=DocumentBatches.of(config),
    )


class _BareLoop:
    """A minimal DeepSpeed training loop, without measurements, logs and checks."""

    def __init__(self, config: RunConfig) -> None:
        assert config.training is not None
        assert config.model is not None
        torch.manual_seed(config.training.seed)
        model = build_model(config.model)
        keys = {**config.deepspeed, **config.keys.fp32_gradients}
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=keys)
        compile_model(config, model, self.engine.device)
        self.losses: list[float] = []

    def train(self, data: Sequence[StepData], rates: Sequence[float]) -> None:
        """Train one step on each item of ``data``, at its learning rate."""
        for one, rate in zip(data, rates, strict=True):
            # DeepSpeed doesn't detect the number of rows in the micro-batches of this step.
            set_accumulation(self.engine, len(one.micro_batches[0][0]), len(one.micro_batches))
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate
            total = 0.0
            for number, micro_batch in enumerate(one.micro_batches):
                self.engine.set_gradient_accumulation_boundary(number == len(one.micro_batches) - 1)
                loss = self.engine(*micro_batch)
                self.engine.backward(loss)
                self.engine.step()
                total += loss.detach().double()
            self.losses.append(float(total) / len(one.micro_batches))


def _timed(work: Callable[[], object]) -> _Time:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return _Time(time.process_time() - cpu, time.perf_counter() - wall)
