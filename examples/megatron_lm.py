"""Sequence length warmup in Megatron-LM: three functions for your own ``pretrain_gpt.py``, and the lines that call them.

At the end of the file, between parsing the arguments and ``pretrain``:

    args = parse_and_validate_args(...)
    plan = plan_run(args, "run.json")

In ``get_batch``, between the broadcast and ``flatten_batch_for_packed_sequences`` or the context-parallel slice:

    batch = get_batch_on_this_tp_rank(...)
    batch = cut_batch(batch, args, plan)

In ``train_valid_test_datasets_provider``, if the run shall read what slw train reads, in place of ``train_ds``:

    return MegatronRows(plan), valid_ds, test_ds
"""

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from seqlen_curriculum.integrations.megatron import MegatronRows, cut_tensors, token_rate, warm_up

__all__ = ["MegatronRows", "cut_batch", "plan_run"]


def plan_run(args, curriculum):
    """Plan the run, set the arguments that follow from it, and let the learning rate follow the consumed tokens."""
    plan = warm_up(args, curriculum)
    if plan.learning_rate is not None:
        OptimizerParamScheduler.get_lr = token_rate(plan)
    print(
        f"{plan.steps} steps, {plan.consumed_tokens(plan.steps)} tokens, lengths {plan.seqlen(1)} to {plan.full_length}"
    )
    return plan


def cut_batch(batch, args, plan):
    """Cut a training batch to the length of its step. Evaluation runs without gradients and keeps the full length."""
    if not torch.is_grad_enabled():
        return batch
    step = args.curr_iteration + 1  # Megatron counts from 0
    args.consumed_train_tokens = plan.consumed_tokens(step)  # saved with the arguments in every checkpoint
    tp = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return cut_tensors(batch, plan.seqlen(step), tp, args.context_parallel_size)
