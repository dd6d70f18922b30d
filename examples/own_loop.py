"""Use sequence length warmup in your own training loop, with any model and any data.

Run:  deepspeed --num_accelerators 2 examples/own_loop.py
"""

import torch
from torch import nn

from seqlen_curriculum import initialize

CONFIG = {
    "train_batch_size": 8,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    "curriculum_learning": {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 64,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 20, "difficulty_step": 8},
    },
    "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 5}},
    "training": {"train_tokens": 15_000},
}


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 100))
    engine, _, _, _ = initialize(model=model, model_parameters=model.parameters(), config=CONFIG)

    consumed_tokens = 0
    while consumed_tokens < CONFIG["training"]["train_tokens"]:
        # Get the length of the next step before reading the batch, and read only that many tokens per row.
        seqlen = engine.curriculum_scheduler.update_difficulty(engine.global_steps + 1)
        rows = engine.train_micro_batch_size_per_gpu()
        tokens = torch.arange(rows)[:, None] + torch.arange(seqlen + 1)  # (B, S + 1): each token follows from the last
        tokens = tokens.remainder(100).to(engine.device)

        logits = engine(tokens[:, :-1])  # (B, S, 100)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        engine.backward(loss)
        engine.step()  # the rate steps too, even when fp16 skips the weights' update
        consumed_tokens += engine.train_batch_size() * seqlen

    if engine.global_rank == 0:
        print(f"{engine.global_steps} steps, {consumed_tokens} tokens, last length {seqlen}, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
