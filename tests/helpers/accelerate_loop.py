"""A loop of Accelerate on the rows of a run, which saves, evaluates and resumes, for the tests on one and on two ranks."""

import torch
from accelerate import Accelerator

from helpers.hf import tiny_llama
from seqlen_curriculum import TokenLR
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunLoader, RunRows


def train(run, folder, save_after=None, resume=None, accumulation=4, **loader_options):
    """Train on this rank; return its micro-batches, and the rate, loss and evaluated length of every step.

    ``resume`` is a folder of ``save_state``, also of another number of ranks.
    """
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    plan = TrainerPlan.of(run, global_batch=2 * accumulation * ranks, max_lr=5e-3)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rate = TokenLR(optimizer, plan.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = RunLoader(RunRows(plan), 2, rank=rank, ranks=ranks, **loader_options)
    accelerator.register_for_checkpointing(loader)
    if resume:
        accelerator.load_state(str(resume))
    result = {"batches": [], "rates": [], "losses": [], "lengths": [], "tokens": 0, "weights": None}
    step, total = loader.state_dict()["samples"] // plan.global_batch + 1, 0.0
    for batch in loader:
        rate.seek(step)
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                result["rates"].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
        total += float(loss.detach()) / accumulation
        result["batches"].append(batch["input_ids"].tolist())
        result["tokens"] += batch["labels"].numel() * ranks
        if accelerator.sync_gradients:
            result["losses"].append(float(accelerator.reduce(torch.tensor(total), "mean")))
            result["lengths"].append(batch["input_ids"].shape[1])
            if step == save_after:
                accelerator.save_state(str(folder))
            step, total = step + 1, 0.0
    result["weights"] = torch.cat([weight.detach().flatten() for weight in model.parameters()]).tolist()
    return result
