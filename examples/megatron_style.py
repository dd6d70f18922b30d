"""Train a model that truncates in its forward, as in Megatron-DeepSpeed: the engine passes it the step's length.

Run:  deepspeed --num_accelerators 2 examples/megatron_style.py
"""

import torch
from torch import Tensor, nn

from seqlen_curriculum import initialize

SEQ_LENGTH, VOCAB = 64, 100
CONFIG = {
    "train_batch_size": 8,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
    "curriculum_learning": {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": SEQ_LENGTH,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 20, "difficulty_step": 8},
    },
    "scheduler": {"type": "TokenCosineLR", "params": {"warmup_steps": 5}},
    "training": {"train_tokens": 15_000},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB))

    def forward(self, tokens: Tensor, labels: Tensor, curriculum_seqlen: int | None = None) -> Tensor:
        """Return the loss of each token, (B, S): S is the step's length in training, the full length in evaluation."""
        if curriculum_seqlen is not None:
            tokens, labels = tokens[:, :curriculum_seqlen], labels[:, :curriculum_seqlen]
        return nn.functional.cross_entropy(self.layers(tokens).transpose(1, 2), labels, reduction="none")


def main() -> list[dict[str, float]]:
    torch.manual_seed(0)
    model = Model()
    engine, _, _, _ = initialize(
        model=model, model_parameters=model.parameters(), config=CONFIG, curriculum_kwarg="curriculum_seqlen"
    )
    rows = engine.train_micro_batch_size_per_gpu()
    sample = torch.arange(rows)[:, None] + torch.arange(SEQ_LENGTH + 1)  # (B, S + 1): each token follows from the last
    tokens, labels = sample[:, :-1].remainder(VOCAB).to(engine.device), sample[:, 1:].remainder(VOCAB).to(engine.device)

    history, consumed_tokens = [], 0
    while consumed_tokens < CONFIG["training"]["train_tokens"]:
        losses = engine(tokens, labels)  # (B, seqlen of the step)
        engine.backward(losses.mean())
        engine.step()
        consumed_tokens += losses.numel() * engine.dp_world_size
        history.append({"seqlen": losses.shape[1], "loss": losses.mean().item(), "consumed_tokens": consumed_tokens})
        if engine.global_steps % 10 == 0:
            engine.eval()
            with torch.no_grad():
                losses = engine(tokens, labels)  # (B, full length)
            engine.train()
            history[-1] |= {"eval_seqlen": losses.shape[1], "eval_loss": losses.mean().item()}
    if engine.global_rank == 0:
        print(f"{engine.global_steps} steps, {history[-1]}")
    return history


if __name__ == "__main__":
    main()
