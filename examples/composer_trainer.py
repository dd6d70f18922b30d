"""Sequence length warmup in MosaicML Composer's Trainer, on the rows that `slw train` reads.

Run:  slw prepare --stdlib --train-vocab 512 --out corpus/stdlib
      python examples/composer_trainer.py                 # or: composer -n 2 examples/composer_trainer.py
"""

import sys
from pathlib import Path

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from composer.utils import dist
from transformers import LlamaConfig, LlamaForCausalLM

from seqlen_curriculum.integrations.composer import SequenceLengthWarmup
from seqlen_curriculum.integrations.torch_data import RunLoader, RunRows

RUN = Path(__file__).with_name("run.json")
BATCH, MICRO_BATCH = 16, 4


def main(run=RUN):
    """Train a small Llama and return (length, loss) of every step."""
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=64, **sizes))

    warmup = SequenceLengthWarmup(run, global_batch=BATCH, max_lr=3e-3)
    loader = RunLoader(RunRows(warmup.plan), BATCH // ranks, rank=rank, ranks=ranks)
    log = InMemoryLogger()
    trainer = Trainer(
        model=HuggingFaceModel(model),
        optimizers=torch.optim.AdamW(model.parameters(), lr=3e-3),
        algorithms=[warmup],
        train_dataloader=warmup.data_spec(loader),
        max_duration=warmup.max_duration,
        device_train_microbatch_size=MICRO_BATCH,
        loggers=[log],
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    lengths = [length for _, length in log.data["sequence_length_warmup/seqlen"]]
    losses = [float(loss) for _, loss in log.data["loss/train/total"]]
    print(f"{len(losses)} steps, {trainer.state.timestamp.token.value} tokens, last loss {losses[-1]:.3f}")
    return list(zip(lengths, losses, strict=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
