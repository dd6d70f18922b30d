"""Sequence length warmup in a plain PyTorch loop such as nanoGPT's, which samples (x, y) blocks from an array of tokens.

Run:  slw prepare --stdlib --train-vocab 512 --out corpus/stdlib
      python examples/nanogpt_loop.py
"""

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from seqlen_curriculum import RunConfig
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.integrations.plan import TrainerPlan

RUN = Path(__file__).with_name("run.json")
BATCH, BLOCK = 16, 64


def main(run=RUN):
    """Train a small GPT-2 and return (length, loss) of every step."""
    plan = TrainerPlan.of(run, global_batch=BATCH, max_lr=3e-3)
    data = torch.from_numpy(IndexedCorpus(RunConfig.load(run).data.prefixes[0]).tokens.astype("int64"))
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": BLOCK}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    history = []
    for step in range(1, plan.steps + 1):  # it ends at the token budget
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        starts = torch.randint(len(data) - BLOCK, (BATCH,), generator=torch.Generator().manual_seed(step))
        x = torch.stack([data[start : start + BLOCK] for start in starts.tolist()])
        y = torch.stack([data[start + 1 : start + BLOCK + 1] for start in starts.tolist()])
        seqlen = plan.seqlen(step)
        x, y = x[:, :seqlen], y[:, :seqlen]  # the one line: cut where the batch is used, not where it is prefetched

        logits = model(x).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append((seqlen, float(loss.detach())))
    print(f"{plan.steps} steps, {plan.consumed_tokens(plan.steps)} tokens, last loss {history[-1][1]:.3f}")
    return history


if __name__ == "__main__":
    main(*sys.argv[1:])
