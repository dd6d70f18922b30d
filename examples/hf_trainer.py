"""Sequence length warmup in Hugging Face's Trainer, on a corpus of slw prepare or on rows of your own.

Run:  slw prepare --stdlib --train-vocab 512 --out corpus/stdlib
      python examples/hf_trainer.py        (on two ranks: torchrun --nproc_per_node 2 examples/hf_trainer.py)
"""

import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from seqlen_curriculum.integrations.plan import TrainerPlan
from seqlen_curriculum.integrations.torch_data import RunRows
from seqlen_curriculum.integrations.transformers import warm_up

RUN = Path(__file__).with_name("run.json")


def main(run=RUN, output_dir="runs/hf_trainer", **settings):
    """Train a small Llama and return the trainer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=64, **sizes))
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=3e-3,
        logging_steps=10,
        report_to=[],
        **settings,
    )
    global_batch = 16 * arguments.world_size
    # The rows that train_gpt2.py reads, each at the length of its step. A dataset of your own works too: rows of full
    # length, which warm_up cuts.
    rows = RunRows(TrainerPlan.of(run, global_batch=global_batch, max_lr=arguments.learning_rate))
    trainer = warm_up(Trainer(model=model, args=arguments, train_dataset=rows), run)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
