"""Sequence length warmup in torchtitan, on the rows of ``slw train``: a module with a torchtitan configuration.

Run:  slw prepare --stdlib --train-vocab 512 --out corpus/stdlib
      mkdir -p assets && cp corpus/stdlib.tokenizer.json assets/tokenizer.json
      PYTHONPATH=examples torchrun --nproc-per-node 1 -m torchtitan.train \
          --module torchtitan_warmup --config debugmodel --hf_assets_path assets

torchtitan needs a GPU. It loads the tokenizer, although RunDataLoader reads tokens.
"""

from pathlib import Path

from torchtitan.models.llama3.config_registry import llama3_debugmodel

from seqlen_curriculum.integrations.torchtitan import RunDataLoader, warm_up

RUN = Path(__file__).with_name("run_window.json")


def debugmodel():
    """torchtitan's debug model, whose tokens attend within windows of 8 to 64 tokens."""
    config = llama3_debugmodel()
    config.training.local_batch_size = 16
    config.training.seq_len = 64  # max_difficulty of the run
    config.dataloader = RunDataLoader.Config()  # without this line: torchtitan's own text loader
    return warm_up(config, RUN)
