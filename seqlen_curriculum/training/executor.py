"""One optimizer step and one evaluation of an engine: data, tensor or sequence parallel, or a pipeline.

Shapes: ``B`` rows of a micro-batch, ``S`` seqlen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceGrads, ReduceTiedGrads, TrainSchedule
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import groups
from torch.nn import Parameter

from seqlen_curriculum.training.accumulate import accumulate, set_accumulation
from seqlen_curriculum.training.seeding import seed_generators
from seqlen_curriculum.training.tensor_parallel import check_sharded, is_sharded

__all__ = ["DataParallel", "Executor", "Pipeline", "SequenceParallel", "StepResult", "TensorParallel"]

MicroBatch = tuple[Any, ...]  # what the model's forward takes


class StepResult(NamedTuple):
    """The result of a step. ``loss``: fp64 scalar, to be averaged over ranks. ``grad_norm``: before clipping or None.

    Both stay on the device, because reading them would synchronize the host.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor | float | None


class DataParallel:
    """Data parallel: every rank has the whole model (or gathers it) and its own rows."""

    leads = True

    def __init__(self, engine: Any) -> None:
        self.engine, self.data_rank, self.data_ranks = engine, dist.get_rank(), engine.dp_world_size
        self.replica = self.data_rank  # the replica of the weights on this rank, where ZeRO doesn't shard them
        self._parameters = list(engine.module.parameters())  # listing them takes 0.1 ms even for a small model
        self._unsharded_norm: torch.Tensor | None = None
        self._clips_unsharded = not _keeps_norm(engine) and engine.gradient_clipping() > 0
        if self._clips_unsharded:
            engine.clip_fp32_gradients = self._clip  # DeepSpeed's, which forgets the norm

    def unique_parameters(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """Return the ``parameters`` that this rank counts, so that each element is counted once per replica."""
        return list(parameters)

    def train(self, micro_batches: Sequence[MicroBatch], seeds: Sequence[int]) -> StepResult:
        """Run an optimizer step on equal ``micro_batches`` of (inputs, targets), (B, S); ``seeds`` seed dropout."""
        loss = accumulate(self.engine, micro_batches, seeds)
        if _keeps_norm(self.engine):
            self.engine.step()
            return StepResult(loss, self.engine.get_global_grad_norm())
        if not self._clips_unsharded:
            self._unsharded_norm = self._norm(self._parameters)  # of averaged gradients
        self.engine.step()
        return StepResult(loss, self._unsharded_norm)

    def evaluate(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Return this rank's mean loss of (inputs, targets), without dropout and gradients."""
        self.engine.eval()
        with torch.no_grad():
            loss: torch.Tensor = self.engine(*micro_batch)
        self.engine.train()
        return loss

    def dry_run(self, micro_batch: MicroBatch) -> None:
        """Run forward and backward of the loss multiplied by zero, without a step."""
        self.engine.set_gradient_accumulation_boundary(False)
        self.engine.backward(self.engine(*micro_batch) * 0)
        self.engine.set_gradient_accumulation_boundary(None)  # DeepSpeed counts it again

    def _clip(self) -> None:
        """Clip fp32 gradients without ZeRO, as DeepSpeed does, and store their norm before clipping."""
        engine = self.engine
        self._unsharded_norm = clip_grad_norm_(self._parameters, engine.gradient_clipping(), mpu=engine.mpu)

    def _norm(self, parameters: Sequence[Parameter]) -> torch.Tensor:
        # get_total_norm is bit-identical, but on a CPU it dispatches the norm of each gradient from Python.
        norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm


class TensorParallel(DataParallel):
    """Tensor parallel: each rank has a shard of every block. Ranks of a model read the same rows and use the same seeds."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        check_sharded(engine)
        self.data_rank, self.leads = groups.get_data_parallel_rank(), groups.get_tensor_model_parallel_rank() == 0
        self.replica = self.data_rank

    def unique_parameters(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """Return the sharded parameters of this rank, and on the first rank also the replicated ones."""
        return [p for p in parameters if self.leads or is_sharded(p)]

    def _norm(self, parameters: Sequence[Parameter]) -> torch.Tensor:
        """Return the norm over the shards of all ranks."""
        square = super()._norm(self.unique_parameters(parameters)).square()
        dist.all_reduce(square, group=groups.get_tensor_model_parallel_group())
        return square.sqrt()


class SequenceParallel(DataParallel):
    """Sequence parallel: ranks of ``group`` share rows, and rank *p* of the group has part *p* of every sequence."""

    def __init__(self, engine: Any, group: Any) -> None:
        super().__init__(engine)
        self.part, self.parts = dist.get_rank(group), dist.get_world_size(group)
        self.data_rank, self.data_ranks = dist.get_rank() // self.parts, dist.get_world_size() // self.parts
        self.leads = self.part == 0

    def train(self, micro_batches: Sequence[MicroBatch], seeds: Sequence[int]) -> StepResult:
        """Run an optimizer step on equal ``micro_batches`` of whole rows; each part has its own dropout masks."""
        return super().train([self._own(rows) for rows in micro_batches], [seed ^ self.part for seed in seeds])

    def evaluate(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Return the mean loss of this rank's part of (inputs, targets)."""
        return super().evaluate(self._own(micro_batch))

    def dry_run(self, micro_batch: MicroBatch) -> None:
        """Run forward and backward of the loss multiplied by zero, without a step."""
        super().dry_run(self._own(micro_batch))

    def _own(self, micro_batch: MicroBatch) -> MicroBatch:
        """Return (inputs, targets, first position) of this rank's part, of S / parts tokens."""
        inputs, targets = micro_batch[:2]
        length = inputs.shape[1] // self.parts
        own = slice(self.part * length, (self.part + 1) * length)
        return inputs[:, own], targets[:, own], self.part * length


class Pipeline:
    """Pipeline parallel: each rank has one stage."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.stage = engine, engine.stage_id
        self.data_rank, self.data_ranks = engine.grid.get_data_parallel_id(), engine.grid.data_parallel_size
        self.replica = self.data_rank
        self.leads = engine.is_first_stage()  # the rank that logs the rows which several ranks read
        self._unsharded_norm: torch.Tensor | None = None
        if not _keeps_norm(engine):
            # Replaced on the engine, because it has no hook between the reduction of gradients and the step.
            engine._take_model_step = self._measured(engine._take_model_step)

    def train(self, micro_batches: Sequence[MicroBatch], seeds: Sequence[int]) -> StepResult:
        """Run an optimizer step on equal ``micro_batches`` of (inputs, targets), (B, S); ``seeds`` seed dropout."""
        set_accumulation(self.engine, len(micro_batches[0][0]), len(micro_batches))
        if seeds:
            seed_generators(self.engine.device, seeds[0] ^ self.stage)
        loss = self.engine.train_batch(iter(micro_batches))
        norm = self.engine.get_global_grad_norm() if self._unsharded_norm is None else self._unsharded_norm
        return StepResult(loss.double(), norm)

    def evaluate(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Return the mean loss of (inputs, targets), the same on all stages."""
        averages, self.engine.is_data_parallel = (
            self.engine.is_data_parallel,
            False,
        )  # else it also averages over the replicas
        try:
            loss: torch.Tensor = self.engine.eval_batch(iter([micro_batch]), num_micro_batches=1)
        finally:
            self.engine.is_data_parallel = averages
        return loss.squeeze()

    def unique_parameters(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """Return the ``parameters`` of this stage that aren't shared with an earlier stage."""
        return [p for p in parameters if not p.ds_pipe_replicated]  # type: ignore[attr-defined]

    def _measured(self, take_step: Callable[..., None]) -> Callable[..., None]:
        """Return ``take_step`` that first computes the gradient norm over all stages."""

        def step(*args: Any, **kwargs: Any) -> None:
            own = self.unique_parameters(list(self.engine.module.parameters()))
            square = torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]).square()
            dist.all_reduce(square, group=self.engine.grid.get_pipe_parallel_group())
            self._unsharded_norm = square.sqrt()
            take_step(*args, **kwargs)

        return step

    def dry_run(self, micro_batch: MicroBatch) -> None:
        """Run forward and backward of losses multiplied by zero, one micro-batch per stage in flight, without a step."""
        engine, loss_fn, stages = self.engine, self.engine.module.loss_fn, self.engine.num_stages
        set_accumulation(engine, len(micro_batch[0]), stages)
        engine.reset_activation_shape()
        engine.set_dataiterator(iter([micro_batch] * stages))
        engine.module.train()
        engine.module.loss_fn = lambda outputs, targets: loss_fn(outputs, targets) * 0
        engine.total_loss, engine.total_additional_losses, engine._compute_loss = None, None, True
        try:
            engine._exec_schedule(_WithoutUpdate(stages, stages, engine.stage_id))
        finally:
            engine.module.loss_fn = loss_fn


class _WithoutUpdate(TrainSchedule):  # type: ignore[misc]
    """DeepSpeed's training schedule without the optimizer step."""

    def steps(self) -> Iterator[list[Any]]:
        for instructions in super().steps():
            yield [i for i in instructions if not isinstance(i, (ReduceTiedGrads, ReduceGrads, OptimizerStep))]


Executor = DataParallel | Pipeline


def _keeps_norm(engine: Any) -> bool:
    """Return whether DeepSpeed stores a gradient norm, which it doesn't in fp32 without ZeRO."""
    return bool(engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled())
