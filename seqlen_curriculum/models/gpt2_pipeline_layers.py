"""GPT-2 as a sequence of layers, each taking the one before's output: what a pipeline cuts into stages.

Shapes: ``B`` rows, ``S`` seqlen, ``H`` hidden size, ``V`` padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqlen_curriculum.models.cross_entropy import mean_cross_entropy
from seqlen_curriculum.models.gpt2 import CausalLM

__all__ = ["WordEmbedding", "hidden_loss", "middle_layers", "with_head"]


class WordEmbedding(nn.Module):
    """First layer and, by ``with_head``, last one: the two ends of a pipeline share its weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight  # (V, H)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, S, H) of ``tokens`` (B, S)."""
        return F.embedding(tokens, self.weight)


class _Positions(nn.Module):
    """Adds the position embeddings, then dropout."""

    def __init__(self, wpe: nn.Embedding, drop: nn.Dropout) -> None:
        super().__init__()
        self.wpe, self.drop = wpe, drop

    def forward(self, words: Tensor) -> Tensor:  # (B, S, H) to (B, S, H)
        positions = self.wpe(torch.arange(words.shape[1], device=words.device).unsqueeze(0))
        embedded: Tensor = self.drop(words + positions)
        return embedded


def middle_layers(model: CausalLM) -> list[nn.Module]:
    """What stands between the word embedding and the head: positions, the blocks, the last layer norm."""
    gpt2 = model.lm.transformer
    return [_Positions(gpt2.wpe, gpt2.drop), *gpt2.h, gpt2.ln_f]


def with_head(words: WordEmbedding, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The last layer's output: hidden states (B, S, H) and the tied head (V, H), not yet multiplied."""
    return hidden, words.weight


def hidden_loss(outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Mean cross entropy in nats, an fp32 scalar, of ``targets`` (B, S) given the output of ``with_head``."""
    hidden, weight = outputs
    return mean_cross_entropy(hidden.flatten(0, -2), weight, targets.flatten())
