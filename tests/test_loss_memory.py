"""The memory of a training step with a large vocabulary, measured in processes of their own.

Included are weights, gradients, Adam's two moments, activations and everything that the allocator holds; the interpreter
with its libraries isn't.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

STEP = """
import json, resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from seqlen_curriculum.models.causal_lm import AnyCausalLM

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

vocabulary = int(sys.argv[1])
sizes = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4)
before = peak()
model = AnyCausalLM(LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=1024, **sizes)))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
tokens = torch.randint(0, vocabulary, (4, 1025))
for weight in model.parameters():
    weight.grad = torch.zeros_like(weight)
optimizer.step()  # from the second step on there are moments
optimizer.zero_grad()
model(tokens[:, :-1], tokens[:, 1:]).backward()
optimizer.step()
print(json.dumps([peak() - before, sum(weight.numel() for weight in model.parameters())]))
"""


def step_memory(vocabulary: int) -> tuple[int, int]:
    """Return the peak bytes of a step of 4 x 1024 tokens, and the number of parameters."""
    command = [sys.executable, "-c", STEP, str(vocabulary)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    peak, parameters = json.loads(output)
    return peak, parameters


@pytest.mark.slow
def test_a_vocabulary_of_128256_needs_little_more_than_its_weights() -> None:
    (small, fewer), (large, more) = step_memory(4096), step_memory(128256)
    states = 16 * (more - fewer)  # fp32 weights, gradients and two moments
    print(f"\n4,096 tokens: {small:,} bytes; 128,256: {large:,}; weights and states of the larger one: {states:,}")
    print(f"ratio {large / (small + states):.3f}")
    assert large < 1.3 * (small + states)
