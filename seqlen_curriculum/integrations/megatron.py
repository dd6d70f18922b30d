"""Sequence length warmup in Megatron-LM: the lines that go into a ``pretrain_gpt.py`` of your own.

``warm_up`` plans the run from Megatron's arguments, ``cut_tensors`` cuts a micro-batch in ``get_batch``, and ``token_rate``
replaces the learning rate, which Megatron schedules by samples. ``MegatronRows`` is the data of ``train_gpt2.py``.

The step is ``args.curr_iteration + 1``, so lengths don't depend on the loader, its workers or a resume. Nothing here imports
Megatron. Shapes: B rows of a micro-batch, S full length, s the step's length, N document bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from seqlen_curriculum.batch import set_batch_sequence_length
from seqlen_curriculum.errors import ConfigError, DataError
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunRows

__all__ = ["MegatronRows", "cut_tensors", "token_rate", "warm_up"]

_ROWS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def warm_up(args: Any, curriculum: str | Path | Mapping[str, Any]) -> TrainerPlan:
    """Plan the run of Megatron's ``args``, and set those that follow from the plan; call it before ``pretrain``.

    ``curriculum`` is a file with our sections, or its content. It sets ``train_iters`` to the last step of the token budget
    and ``variable_seq_lengths`` for a pipeline, whose stages otherwise expect ``seq_length``. It adds
    ``sequence_length_warmup``, which Megatron saves with all arguments in each checkpoint: ``TrainerPlan.check`` refuses the
    one of another schedule. Raises ConfigError for all contradictions at once, also for a length of any step that the
    parallelism can't divide.
    """
    plan = TrainerPlan.of(curriculum, global_batch=args.global_batch_size, max_lr=args.lr)
    sequence_parallel = args.tensor_model_parallel_size if args.sequence_parallel else 1
    lengths = sorted({seqlen for _, seqlen in plan.timeline.shapes()})
    problems = [*_contradictions(args, plan), *_undivided(lengths, sequence_parallel, args.context_parallel_size)]
    if problems:
        raise ConfigError(problems)
    args.train_iters = plan.steps
    args.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    args.sequence_length_warmup = plan.state()
    return plan


def cut_tensors(batch: Mapping[str, Any], seqlen: int, tp: int = 1, cp: int = 1) -> dict[str, Any]:
    """Return Megatron's batch with the first ``seqlen`` tokens of each row; call it before the context-parallel slice.

    ``batch`` is that of ``get_batch_on_this_tp_rank``: ``tokens``, ``labels``, ``loss_mask`` and ``position_ids`` (B, S) and
    ``attention_mask`` (B, 1, S, S), of which a pipeline stage has some and None for the others. Documents in one row,
    ``cu_seqlens`` (B, N) with ``max_seqlen`` (B), end at ``seqlen``; cut them before ``flatten_batch_for_packed_sequences``.

    ``tp``: ranks of tensor parallelism with ``--sequence-parallel``, else 1. ``cp``: ranks of context parallelism. Raises
    ConfigError for a length that they don't divide. Raises DataError for ``cu_seqlens_padded`` and ``local_cp_size``, whose
    documents are padded one by one.
    """
    full = _full_length(batch)
    if full is None or seqlen >= full:
        return dict(batch)
    problems = _undivided([seqlen], tp, cp)
    if problems:
        raise ConfigError(problems)
    rows = {name: batch[name] for name in _ROWS if batch.get(name) is not None}
    if rows:  # position ids that restart at a document don't make a batch padding-free: only cu_seqlens do
        rows = set_batch_sequence_length(rows, seqlen, padding_free=False, count_targets=False)[0]
    return {**batch, **rows, **_cut_documents(batch, seqlen)}


def token_rate(plan: TrainerPlan) -> Callable[[Any, Mapping[str, Any]], float]:
    """Return a ``get_lr`` for Megatron's ``OptimizerParamScheduler`` whose rate follows the plan's consumed tokens.

    Assign it before ``pretrain``: ``OptimizerParamScheduler.get_lr = token_rate(plan)``. The step is derived from the
    samples that the scheduler counts and saves. Megatron doesn't count a step that fp16 skips, so that the rate lags by it,
    as with Megatron's own schedules. A group with a ``max_lr`` of its own gets its share. Raises ConfigError without a
    token-wise ``scheduler``.
    """
    rate = plan.learning_rate
    if rate is None:
        raise ConfigError(
            "scheduler: TokenCosineLR, TokenLinearLR or TokenWSDLR is required, but not given; add it, or keep Megatron's "
            "rate"
        )

    def get_lr(scheduler: Any, param_group: Mapping[str, Any]) -> float:
        step = scheduler.num_steps // plan.global_batch + 1
        share = float(param_group.get("max_lr", rate.max_lr)) / rate.max_lr
        return float(rate(step) * share)

    return get_lr


class MegatronRows(Dataset[dict[str, Tensor]]):
    """The samples that ``train_gpt2.py`` reads, each at the length of its step, as a data set of Megatron's ``GPTDataset``.

    An item has ``tokens``, ``labels`` (already shifted), ``loss_mask`` and ``position_ids``, (s,) each. Return it as the
    training set of ``train_valid_test_datasets_provider``, with ``--dataloader-type single``. Where tensor-parallel ranks
    receive the batch, give ``get_batch_on_this_tp_rank`` the step's ``seq_length``.
    """

    def __init__(self, plan: TrainerPlan) -> None:
        """Open the corpora of the plan. Raises ConfigError for ``method: "segment"``, which makes several rows of one."""
        if plan.config.shortening.method == "segment":
            raise ConfigError(
                'curriculum_learning.method: "segment" gives several rows per sample, but Megatron stacks samples; set '
                '"truncate"'
            )
        self._rows = RunRows(plan)

    def __len__(self) -> int:
        """Return the samples of the whole run."""
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return sample ``index`` (0-based) of the run."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several samples; neighbours are read together."""
        return [
            {
                "tokens": item["input_ids"],
                "labels": item["labels"],
                "loss_mask": torch.ones(len(item["labels"])),
                "position_ids": torch.arange(len(item["labels"])),
            }
            for item in self._rows.__getitems__(indices)
        ]


def _contradictions(args: Any, plan: TrainerPlan) -> list[str]:
    """Return one line for each of Megatron's arguments that contradicts the plan."""
    checks = {
        f"--seq-length: {args.seq_length}, but the run ends with length {plan.full_length}; make them equal": (
            args.seq_length != plan.full_length
        ),
        "--rampup-batch-size: steps would have fewer rows than the plan counts; leave it out": (
            getattr(args, "rampup_batch_size", None) is not None
        ),
        "--train-samples: the plan sets the last step from its token budget; give --train-iters instead": (
            getattr(args, "train_samples", None) is not None
        ),
        "--cuda-graph-impl: a captured graph has one length; set it to none": (
            getattr(args, "cuda_graph_impl", "none") not in (None, "none")
        ),
        # Megatron checks this for every model, and "allgather" is its default.
        "--moe-token-dispatcher-type: allgather refuses variable lengths in pipelines, even without experts; set alltoall": (
            args.pipeline_model_parallel_size > 1
            and getattr(args, "moe_token_dispatcher_type", "allgather") == "allgather"
        ),
    }
    return [problem for problem, is_wrong in checks.items() if is_wrong]


def _undivided(lengths: Sequence[int], tp: int, cp: int) -> list[str]:
    """Return a line if the parallelism can't divide some of ``lengths``."""
    # Context parallelism gives each rank 2 of 2 * cp chunks, (s / cp) tokens, which sequence parallelism divides by tp.
    # tp 4 and cp 2 need multiples of 2 * lcm(2, 4) = 8: at s = 4 a rank would have 2 tokens for 4 ranks.
    multiple = cp * math.lcm(2, tp) if cp > 1 else tp
    bad = [seqlen for seqlen in lengths if seqlen % multiple]
    if not bad:
        return []
    below = bad[0] - bad[0] % multiple
    nearest = f"{below} and {below + multiple}" if below else f"{multiple}"
    more = f" and {len(bad) - 1} other lengths are" if len(bad) > 1 else " is"
    return [
        f"curriculum_learning: length {bad[0]}{more} not a multiple of {multiple}, which sequence parallelism on {tp} and "
        f"context parallelism on {cp} ranks need (nearest to {bad[0]}: {nearest}); make min_difficulty, max_difficulty and "
        f"schedule_config.difficulty_step multiples of {multiple}"
    ]


def _full_length(batch: Mapping[str, Any]) -> int | None:
    """Return S; None for the empty batch of a middle stage."""
    for name in ("tokens", "labels"):
        if batch.get(name) is not None:
            return int(batch[name].shape[-1])
    bounds = batch.get("cu_seqlens")
    return None if bounds is None else int(bounds.max())


def _cut_documents(batch: Mapping[str, Any], seqlen: int) -> dict[str, Tensor]:
    """Return the bounds of documents that end at ``seqlen``, and the longest of them in each row; {} without bounds."""
    bounds = batch.get("cu_seqlens")
    if bounds is None:
        return {}
    for name in ("cu_seqlens_padded", "local_cp_size"):
        if batch.get(name) is not None:
            raise DataError(f"{name}: documents that are padded one by one can't be cut; pack them without padding")
    # 0 5 9 16 at length 8 becomes 0 5 8 8: Megatron strips what repeats the end, and with it the empty documents.
    bounds = bounds.clamp(max=seqlen)
    return {"cu_seqlens": bounds, "max_seqlen": bounds.diff(dim=-1).amax(-1)}
