"""Sequence length warmup in TRL's SFTTrainer, with padding-free packing.

Run:  slw prepare --stdlib --train-vocab 512 --out corpus/stdlib
      python examples/trl_sft.py
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from seqlen_curriculum import RunConfig
from seqlen_curriculum.config.run_file import read_run_file
from seqlen_curriculum.data.indexed import IndexedCorpus
from seqlen_curriculum.integrations.transformers import warm_up

RUN = Path(__file__).with_name("run.json")


def main(run=RUN, output_dir="runs/trl_sft", documents=400, **settings):
    """Train a small Llama on packed documents and return the trainer."""
    prefix = RunConfig.load(run).data.prefixes[0]
    corpus = IndexedCorpus(prefix)
    texts = [
        corpus.tokens[corpus.document_start(n) : corpus.document_start(n + 1)].tolist()
        for n in range(min(documents, corpus.num_documents))
    ]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{prefix}.tokenizer.json", eos_token="<|endoftext|>")
    tokenizer.pad_token = tokenizer.eos_token
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=64, **sizes))
    arguments = SFTConfig(
        output_dir=output_dir,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=3e-3,
        max_length=64,
        bf16=torch.cuda.is_available(),
        packing=True,  # best fit decreasing: documents side by side, padding-free
        report_to=[],
        **settings,
    )
    rows = Dataset.from_list([{"input_ids": text} for text in texts])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    curriculum = read_run_file(run)
    curriculum["curriculum_learning"]["method"] = "window"  # packed rows keep every token
    trainer = warm_up(trainer, curriculum)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
