"""GPT-2 as a list of layers, which pipeline parallelism partitions into stages.

The layers share the parameters of a ``CausalLM``.

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
    """The first layer of a pipeline and, by ``with_head``, the last one, with a tied weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight  # (V, H)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (B, S, H) of ``tokens`` (B, S)."""
        return F.embedding(tokens, self.weight)


class _Positions(nn.Module):
    """Position embeddings and dropout."""

    def __init__(self, wpe: nn.Embedding, drop: nn.Dropout) -> None:
        super().__init__()
        self.wpe, self.drop = wpe, drop

    def forward(self, words: Tensor) -> Tensor:
        """Return hidden states (B, S, H) for word embeddings (B, S, H)."""
        position_ids = torch.arange(words.shape[1], device=words.device).unsqueeze(0)  # (1, S)
        embedded: Tensor = self.drop(words + self.wpe(position_ids))  # (B, S, H) + (1, S, H)
        return embedded


def middle_layers(model: CausalLM) -> list[nn.Module]:
    """Return the layers between word embedding and head, (B, S, H) each: positions, the blocks, the last layer norm."""
    gpt2 = model.lm.transformer
    return [_Positions(gpt2.wpe, gpt2.drop), *gpt2.h, gpt2.ln_f]


def with_head(words: WordEmbedding, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of the last layer: hidden states (B, S, H) and the tied head (V, H).

    ``hidden_loss`` multiplies them in chunks, so that the last stage never holds the logits (B, S, V).
    """
    return hidden, words.weight


def hidden_loss(outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Return the mean cross entropy in nats, an fp32 scalar, of ``targets`` (B, S) given the output of ``with_head``."""
    hidden, weight = outputs  # (B, S, H), (V, H)
    return mean_cross_entropy(hidden.flatten(0, -2), weight, targets.flatten())
