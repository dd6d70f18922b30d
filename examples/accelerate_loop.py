"""Sequence length warmup in a loop of Accelerate.

Run:  slw prepare --stdlib --train-vocab 512 --out corpus/stdlib
      accelerate launch examples/accelerate_loop.py
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from seqlen_curriculum import TokenLR
from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunLoader, RunRows

RUN = Path(__file__).with_name("run.json")
MICRO_BATCH, ACCUMULATION = 4, 2


def main(run=RUN):
    """Train a small Llama and return (length, loss) of every step."""
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    plan = TrainerPlan.of(run, global_batch=MICRO_BATCH * ACCUMULATION * ranks, max_lr=3e-3)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=64, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate = TokenLR(optimizer, plan.learning_rate)  # not prepared: Accelerate would step it once per process
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = RunLoader(RunRows(plan), MICRO_BATCH, rank=rank, ranks=ranks)  # not prepared: it already is this rank's

    step, total, history = 1, 0.0, []
    for batch in loader:
        rate.seek(step)
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        total += float(loss.detach()) / ACCUMULATION
        if accelerator.sync_gradients:  # an optimizer step is done
            history.append((plan.seqlen(step), total))
            step, total = step + 1, 0.0
    accelerator.print(f"{step - 1} steps, {plan.consumed_tokens(step - 1)} tokens, last loss {history[-1][1]:.3f}")
    return history


if __name__ == "__main__":
    main(*sys.argv[1:])
