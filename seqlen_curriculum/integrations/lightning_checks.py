"""Checks of a Lightning ``Trainer`` against a plan. They only read its attributes, so Lightning is not imported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from inspect import signature
from typing import Any

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunLoader, RunRows
from seqlen_curriculum.training.lr_scheduler import TokenLR

__all__ = ["data_problems", "data_ranks", "rate_problems", "recount_batches", "trainer_problems"]


def data_ranks(trainer: Any) -> tuple[int, int]:
    """Return (rank, ranks) among the ranks that read different data."""
    ranks = getattr(trainer, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
    return ranks["rank"], ranks["num_replicas"]


def trainer_problems(trainer: Any, module: Any, given: int | None, last_step: int) -> Iterator[str]:
    """Yield one line for each setting that no warmup can work with.

    ``given`` is the ``accumulate_grad_batches`` of the callback, ``last_step`` the last ``global_step`` of the plan.
    """
    if trainer.max_steps > last_step:
        yield (
            f"max_steps: {trainer.max_steps}, but the token budget ends with step {last_step}; leave it out, or raise "
            "training.train_tokens"
        )
    if trainer.overfit_batches:
        yield f"overfit_batches: {trainer.overfit_batches} would train the same batches again and again; leave it out"
    if "dataloader_iter" in signature(module.training_step).parameters:
        yield "training_step: reads batches by itself from dataloader_iter, so they can't be cut; take batch instead"
    if given is None and not module.automatic_optimization:
        yield (
            "accumulate_grad_batches: unknown under manual optimization; give SequenceLengthWarmup the number of batches in "
            "which each optimizer steps once (1 without accumulation)"
        )
    if given is not None and module.automatic_optimization and given != trainer.accumulate_grad_batches:
        yield (
            f"accumulate_grad_batches: {given} given to SequenceLengthWarmup, but the trainer has "
            f"{trainer.accumulate_grad_batches}; leave it out under automatic optimization"
        )


def rate_problems(trainer: Any, plan: TrainerPlan) -> Iterator[str]:
    """Yield one line for each rate or scheduler of ``configure_optimizers`` that contradicts the plan's rate."""
    if plan.learning_rate is None:
        return
    for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
        if not isinstance(scheduler, TokenLR):
            yield (
                f"configure_optimizers: returns a {type(scheduler).__name__}, but the file's scheduler sets the rate; "
                "return the optimizer alone, or remove the file's scheduler"
            )
    for optimizer in trainer.optimizers[:1]:
        lr, max_lr = float(optimizer.defaults["lr"]), plan.learning_rate.max_lr
        if lr != max_lr:
            yield (
                f"optimizer.params.lr: {max_lr} in the plan, but the optimizer of configure_optimizers has {lr}; make them "
                "equal"
            )


def data_problems(trainer: Any, plan: TrainerPlan, accumulation: int, optimizers: int) -> Iterator[str]:
    """Yield one line for each property of the training data that contradicts the plan."""
    loader = trainer.train_dataloader
    if isinstance(loader, dict | list | tuple):
        yield f"train_dataloader: {len(loader)} loaders, but the rows of a step must come from one; give a single loader"
        return
    yield from _row_problems(loader, plan)
    rows, ranks = getattr(loader, "batch_size", None), data_ranks(trainer)[1]
    if rows is not None and rows * ranks * accumulation != plan.global_batch:
        yield (
            f"global_batch: {plan.global_batch}, but the trainer has {rows * ranks * accumulation} rows per optimizer step "
            f"(batches of {rows} x {accumulation} accumulate_grad_batches x {ranks} ranks); make them equal"
        )
    yield from _epoch_problems(trainer, plan.steps, accumulation, optimizers)


def _row_problems(loader: Any, plan: TrainerPlan) -> Iterator[str]:
    """Yield a line if ``loader`` reads ``RunRows`` in another order, or those of another plan."""
    rows = getattr(loader, "dataset", None)
    if not isinstance(rows, RunRows):
        return
    if not isinstance(loader, RunLoader):
        yield (
            f"train_dataloader: a {type(loader).__name__} reads RunRows in an order of its own and can't resume within an "
            "epoch; use RunDataModule or RunLoader"
        )
    if rows.plan.state()["settings"] != plan.state()["settings"]:
        yield (
            f"train_dataloader: its RunRows were made for another plan (global batch {rows.plan.global_batch}, the callback "
            f"has {plan.global_batch}); give RunDataModule the plan of SequenceLengthWarmup"
        )


def _epoch_problems(trainer: Any, steps: int, accumulation: int, optimizers: int) -> Iterator[str]:
    """Yield a line if epochs end within a step, or if there are too few of them."""
    batches = trainer.num_training_batches
    if trainer.max_steps != -1:
        steps = min(steps, trainer.max_steps // optimizers)
    needed = steps * accumulation
    if batches == math.inf:
        if accumulation > 1:
            yield (
                "train_dataloader: its length is unknown, so an epoch may end within a step; give it a __len__, set "
                f"limit_train_batches to a multiple of {accumulation} (accumulate_grad_batches), or use RunDataModule"
            )
        return
    if batches < needed and isinstance(trainer.train_dataloader, RunLoader):
        yield f"limit_train_batches: leaves {batches} of the run's {needed} batches; leave it out, or set max_steps"
    elif batches < needed and batches % accumulation:
        yield (
            f"train_dataloader: an epoch of {batches} batches ends within a step of {accumulation} "
            f"(accumulate_grad_batches); set limit_train_batches={batches - batches % accumulation}"
        )
    elif -1 < trainer.max_epochs * batches < needed:
        yield (
            f"max_epochs: {trainer.max_epochs} epochs of {batches} batches end before step {steps}, the last of the token "
            "budget; set max_epochs=-1"
        )


def recount_batches(checkpoint: dict[str, Any], saved: int, accumulation: int) -> None:
    """Rewrite the counts of batches in a checkpoint, saved with ``saved`` batches per step, for ``accumulation`` of them.

    Raises CheckpointError if the checkpoint was made within a step, whose gradients it doesn't have.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"]
        if ready % saved:
            raise CheckpointError(
                f"the checkpoint was made after {ready % saved} of the {saved} batches of a step (accumulate_grad_batches); "
                "resume from one that was made at the end of a step"
            )
        # From 4 batches per step to 2: 40 ready and 39 completed, as while step 10 ends, are 20 and 19.
        counts |= {name: ready // saved * accumulation - (ready - count) for name, count in counts.items()}
