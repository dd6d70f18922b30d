"""Train Hugging Face models with an unchanged loader: each full-length batch is shortened to the step's length.

Run:  deepspeed --num_accelerators 2 examples/huggingface.py --architecture llama   (or bloom, or bert)
"""

import argparse

import torch
from deepspeed import comm as dist
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from seqlen_curriculum import initialize, set_batch_sequence_length

SEQ_LENGTH, VOCAB, MASK = 64, 50, 49
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, intermediate_size=64)),  # RoPE
    "bloom": (BloomForCausalLM, BloomConfig(**SIZES)),  # ALiBi
    "bert": (BertForMaskedLM, BertConfig(**SIZES, intermediate_size=64)),  # learned positions, masked tokens
}
CONFIG = {
    "train_batch_size": 16,
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
    "training": {"train_tokens": 30_000},
}


def causal_batch(starts: list[int]) -> dict[str, torch.Tensor]:
    """Return rows (B, S) of successive numbers. The model shifts the labels itself."""
    tokens = (torch.tensor(starts)[:, None] + torch.arange(SEQ_LENGTH)).remainder(MASK)
    return {"input_ids": tokens, "labels": tokens.clone()}


def masked_batch(starts: list[int]) -> dict[str, torch.Tensor]:
    """Return rows (B, S) with half of the tokens as targets, every second target masked, and 0 to 7 columns of padding."""
    tokens = causal_batch(starts)["input_ids"]
    attention_mask = (torch.arange(SEQ_LENGTH) < SEQ_LENGTH - torch.tensor(starts)[:, None] % 8).long()
    is_masked = torch.arange(SEQ_LENGTH) % 4 == 2  # of columns 0 1 2 3, 2 is masked; 2 and 3 are targets
    is_target = (torch.arange(SEQ_LENGTH) % 4 > 1) & attention_mask.bool()
    labels = tokens.where(is_target, -100)
    return {"input_ids": tokens.masked_fill(is_masked, MASK), "labels": labels, "attention_mask": attention_mask}


def main(architecture: str) -> list[dict[str, float]]:
    torch.manual_seed(0)
    model_class, model_config = MODELS[architecture]
    model = model_class(model_config)
    engine, _, _, lr_scheduler = initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    plan, causal = lr_scheduler.rate.timeline, architecture != "bert"
    starts = range(engine.global_rank, 10_000, engine.dp_world_size)  # each rank reads its own samples
    collate = causal_batch if causal else masked_batch
    loader = DataLoader(starts, batch_size=engine.train_micro_batch_size_per_gpu(), collate_fn=collate)

    history, all_targets = [], 0
    for step, full_batch in zip(range(1, plan.steps + 1), loader, strict=False):
        seqlen = engine.curriculum_scheduler.update_difficulty(step)
        batch, targets = set_batch_sequence_length(full_batch, seqlen, labels_shifted=not causal)
        output = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()})
        engine.backward(output.loss)
        engine.step()
        over_ranks = torch.tensor(targets, device=engine.device)
        dist.all_reduce(over_ranks)
        all_targets += int(over_ranks)  # without ignored labels; the plan counts all rows * seqlen columns
        history.append({"seqlen": output.logits.shape[1], "loss": output.loss.item(), "targets": all_targets})
        if step % 10 == 0:
            engine.eval()
            with torch.no_grad():  # at full length
                output = engine(**{name: tensor.to(engine.device) for name, tensor in full_batch.items()})
            engine.train()
            history[-1] |= {"eval_seqlen": output.logits.shape[1], "eval_loss": output.loss.item()}
    if engine.global_rank == 0:
        print(
            f"{architecture}: {step} steps, {plan.consumed_tokens(step)} tokens, {all_targets} targets, {history[-1]}"
        )
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--architecture", choices=MODELS, default="llama")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher
    main(parser.parse_args().architecture)
