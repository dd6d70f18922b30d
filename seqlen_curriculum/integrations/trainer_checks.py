"""Checks of a Hugging Face ``Trainer`` before it trains with a sequence length warmup."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from transformers import DataCollatorWithFlattening

from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunRows

__all__ = ["is_padding_free", "rows_problems", "trainer_problems"]

_LIBRARIES = {"transformers", "trl", "seqlen_curriculum"}
"""Packages whose trainers read a dataset in its sampler's order."""


def is_padding_free(trainer: Any) -> bool:
    """Return whether the rows of a batch hold documents side by side, separated by their position ids."""
    return bool(
        getattr(trainer, "padding_free", False) or isinstance(trainer.data_collator, DataCollatorWithFlattening)
    )


def trainer_problems(trainer: Any) -> Iterator[str]:
    """Yield one line for each setting of the trainer that contradicts a warmup."""
    args, dataset = trainer.args, trainer.train_dataset
    if getattr(args, "train_sampling_strategy", "random") not in ("random", "sequential"):
        yield (
            f"train_sampling_strategy: {args.train_sampling_strategy!r} sorts rows by length, but every step has one "
            'length; set "random"'
        )
    if args.auto_find_batch_size:
        yield "auto_find_batch_size: changes the rows of a step, which the plan counts; set it to False"
    if args.accelerator_config.dispatch_batches:
        yield "accelerator_config.dispatch_batches: rank 0 would read for all ranks; set it to False"
    if args.accelerator_config.split_batches:
        yield "accelerator_config.split_batches: divides per_device_train_batch_size over the ranks; set it to False"
    if not hasattr(dataset, "__len__"):
        yield (
            "train_dataset: its length is unknown, so that an epoch may end within a step; give it a __len__ (rows of an "
            "epoch), or use RunRows"
        )
    if isinstance(dataset, RunRows):
        yield from _problems_with_run_rows(trainer)
    if is_padding_free(trainer):
        yield from _padding_free_problems(trainer)


def _problems_with_run_rows(trainer: Any) -> Iterator[str]:
    """Yield one line for each way in which the trainer would not read ``RunRows`` in its order."""
    args = trainer.args
    if args.ignore_data_skip:
        yield "ignore_data_skip: True would read RunRows from its beginning after a resume; set it to False"
    if not getattr(args, "dataloader_in_order", True):
        yield "dataloader_in_order: False lets workers give batches of RunRows out of order; set it to True"
    for name in ("_get_train_sampler", "get_train_dataloader"):
        for owner in type(trainer).__mro__:
            if name in vars(owner) and owner.__module__.split(".")[0] not in _LIBRARIES:
                yield (
                    f"{name}: {owner.__name__} overrides it, but RunRows must be read in its own order; remove the method, "
                    "or use another dataset"
                )
    if not trainer.model_accepts_loss_kwargs:
        yield (
            f"train_dataset: RunRows gives shift_labels, which the loss of {type(trainer.model).__name__} doesn't take; "
            "use a causal language model of transformers"
        )
    if is_padding_free(trainer):
        yield (
            "data_collator: joins the rows of RunRows into one padding-free row, but they are whole rows of the step's "
            "length; leave it out"
        )


def _padding_free_problems(trainer: Any) -> Iterator[str]:
    """Yield one line for each reason why the documents of a padding-free row would attend to each other."""
    collator = trainer.data_collator
    if isinstance(collator, DataCollatorWithFlattening) and not collator.return_position_ids:
        yield (
            "data_collator: return_position_ids is False, but position ids separate the documents of a padding-free batch; "
            "set it to True"
        )
    base = getattr(trainer.model, "get_base_model", lambda: trainer.model)()  # of a PEFT model
    forwards = [vars(owner)["forward"] for owner in type(base).__mro__ if "forward" in vars(owner)]
    if not any("position_ids" in inspect.signature(forward).parameters for forward in forwards):
        yield (
            f"model: {type(base).__name__} takes no position_ids, by which the documents of a padding-free batch are "
            "separated; switch packing and padding_free off"
        )
    if getattr(getattr(base, "config", None), "use_cache", False):
        # Measured with Llama, GPT-2, GPT-NeoX and Qwen3: the logits of a document depend on the ones before it.
        yield (
            "use_cache: True, with which models of transformers build no mask between the documents of a padding-free "
            "batch; set it to False in the arguments and in model.config"
        )


def rows_problems(dataset: Any, plan: TrainerPlan) -> Iterator[str]:
    """Yield a line if ``dataset`` holds the rows of another plan, or too few rows for a step."""
    if isinstance(dataset, RunRows) and dataset.plan.state()["settings"] != plan.state()["settings"]:
        yield (
            f"train_dataset: RunRows was made for another plan (global batch {dataset.plan.global_batch}, the trainer has "
            f"{plan.global_batch}); make both from the same file and batch"
        )
    elif hasattr(dataset, "__len__") and len(dataset) < plan.global_batch:
        yield f"train_dataset: has {len(dataset)} rows, but a step needs {plan.global_batch}; give it more rows"
