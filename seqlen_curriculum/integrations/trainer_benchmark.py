"""Throughput of Hugging Face's Trainer with a warmup at every length, on random tokens: plain and balanced micro-batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from seqlen_curriculum.config.deepspeed import batch_shape
from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.integrations.transformers import SequenceLengthWarmupTrainer
from seqlen_curriculum.models.causal_lm import build_model
from seqlen_curriculum.schedule.micro_batch import balanced_rows
from seqlen_curriculum.training.facts import device_name, package_version, usable_cores

__all__ = ["measure_trainer"]


class _Case(NamedTuple):
    seqlen: int
    balance: bool


class _Time(NamedTuple):
    wall: float
    cpu: float
    """CPU seconds of all threads of this process."""


def measure_trainer(
    config: RunConfig, lengths: Sequence[int], rounds: int, steps: int, folder: Path, device: str = "auto"
) -> dict[str, Any]:
    """Train one run whose length changes every ``steps`` steps, with plain and with balanced micro-batches by turns.

    Its rows are random tokens of full length, which the trainer cuts as it cuts a user's own dataset. The model is that of
    the model section with torch's SDPA. ``device`` is ``auto`` (a GPU if torch sees one) or ``cpu``. The trainer writes
    nothing, but needs a ``folder``. Needs one rank, and the model and data sections.

    Returns ``device``, ``precision``, ``parameters``, ``versions`` and ``trainer``: one record per length and kind with
    ``seqlen, kind, micro_batch_rows``, ``tokens_per_second`` (median over ``rounds``), ``of_full_length`` (relative to plain
    micro-batches at full length) and ``cpu_seconds_per_million_tokens`` of this process (median). Every round measures all
    cases, so that drift of the machine affects all of them. The first round is a warmup.
    """
    config = config.for_ranks(1)
    assert config.model is not None
    assert config.data is not None
    full, (rows, micro_batch, accumulation) = config.data.seq_length, batch_shape(config.keys, 1)
    cases = [_Case(seqlen, balance) for seqlen in sorted({*lengths, full}) for balance in (False, True)]
    total = (rounds + 1) * steps * len(cases)
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        learning_rate=1e-4,
        bf16="bf16" in config.keys.enabled_precisions,
        fp16="fp16" in config.keys.enabled_precisions,
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    model: Any = build_model(config.model).lm
    model.set_attn_implementation("sdpa")  # as in a script of transformers, instead of this package's causal kernel
    model.loss_type = "ForCausalLM"
    clock = _Clock(cases, steps)
    trainer = SequenceLengthWarmupTrainer(
        model=model,
        args=arguments,
        train_dataset=_RandomRows(rows * total, full, config.model.vocab_size),
        curriculum=_alternating(cases, rows, full, rounds, steps),
        callbacks=[clock],
    )
    assert trainer.plan.steps == total
    clock.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # standard output has only the result
    trainer.train()
    return {
        "device": f"CPU, {torch.get_num_threads()} threads on {usable_cores()} cores" if use_cpu else device_name(0),
        "precision": next(iter(config.keys.enabled_precisions), "fp32"),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "versions": {package: package_version(package) for package in ("torch", "transformers", "accelerate")},
        "trainer": _records(cases, clock.blocks(rounds), rows * steps, micro_batch, rows, full),
    }


def _alternating(cases: Sequence[_Case], rows: int, full: int, rounds: int, steps: int) -> dict[str, Any]:
    """Return the settings of a run that trains each case for ``steps`` steps, in ``rounds`` rounds after a warmup."""
    lengths = [case.seqlen for case in cases]
    return {
        "curriculum_learning": {
            "enabled": True,
            "curriculum_type": "seqlen",
            "min_difficulty": min(lengths),
            "max_difficulty": full,
            "schedule_type": "fixed_mixed",
            "schedule_config": {"difficulty": lengths, "steps": [steps] * len(lengths)},
        },
        "training": {"train_tokens": (rounds + 1) * steps * rows * sum(lengths)},
    }


class _RandomRows(Dataset[dict[str, Tensor]]):
    """Rows of full length, (S,) each; the same 256 again and again."""

    def __init__(self, rows: int, full: int, vocab_size: int) -> None:
        self._rows = rows
        self._tokens = torch.randint(vocab_size, (256, full), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._tokens[index % len(self._tokens)]
        return {"input_ids": tokens, "labels": tokens}


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Selects the micro-batches of each case, and takes the time after each block of steps of one case."""

    trainer: SequenceLengthWarmupTrainer

    def __init__(self, cases: Sequence[_Case], steps: int) -> None:
        self._cases, self._steps = cases, steps
        self._ends: list[_Time] = []
        self._progress = tqdm(unit="step", disable=None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the callbacks' signature
        case = self._cases[state.global_step // self._steps % len(self._cases)]
        self.trainer.balances = case.balance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._progress.update()
        if state.global_step % self._steps == 0:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self._ends.append(_Time(time.perf_counter(), time.process_time()))

    def blocks(self, rounds: int) -> list[list[_Time]]:
        """Return the durations of each case's blocks, one per round after the warmup."""
        self._progress.close()
        number = len(self._cases)
        pairs = [
            _Time(end.wall - start.wall, end.cpu - start.cpu)
            for start, end in zip(self._ends[number - 1 :], self._ends[number:], strict=False)
        ]
        assert len(pairs) == rounds * number
        return [pairs[case::number] for case in range(number)]


def _records(
    cases: Sequence[_Case], blocks: Sequence[Sequence[_Time]], block_rows: int, micro_batch: int, rows: int, full: int
) -> list[dict[str, Any]]:
    """Return the records; ``block_rows`` rows are trained in one block of a case, ``rows`` in one step."""
    walls = [statistics.median(time.wall for time in times) for times in blocks]
    cpus = [statistics.median(time.cpu for time in times) for times in blocks]
    tokens = [block_rows * case.seqlen for case in cases]
    speeds = [count / wall for count, wall in zip(tokens, walls, strict=True)]
    return [
        {
            "seqlen": case.seqlen,
            "kind": "balanced" if case.balance else "plain",
            "micro_batch_rows": balanced_rows(rows, micro_batch, full, case.seqlen) if case.balance else micro_batch,
            "tokens_per_second": speed,
            "of_full_length": speed / speeds[cases.index(_Case(full, False))],
            "cpu_seconds_per_million_tokens": cpu / count * 1e6,
        }
        for case, speed, cpu, count in zip(cases, speeds, cpus, tokens, strict=True)
    ]
