"""Encoders with a head for masked tokens, trained without holding logits of tokens that aren't predicted.

Shapes: ``B`` rows, ``S`` seqlen, ``M`` masked targets of a row, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.architecture import new_model, source_of
from seqlen_curriculum.models.cross_entropy import mean_cross_entropy
from seqlen_curriculum.models.pretrained import load_model, quiet

__all__ = ["MaskedLM", "build_masked_lm"]


class MaskedLM(nn.Module):
    """An encoder whose forward returns the mean loss of masked tokens; ``lm`` is transformers' model with its head.

    Only hidden states at masked positions enter the head, whatever its layers are, and the last of them computes the loss
    instead of logits (``sparse``). Where that differs from transformers' own loss, the head computes all logits.
    """

    lm: Any

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.max_positions = _positions(lm)
        """Maximum length of a row in tokens; None without a limit."""
        self.sparse = False
        self._places: Tensor | None = None  # (B, M) during a sparse forward
        reference = _own_loss(lm)
        dense_head = lm.get_output_embeddings()
        if type(dense_head) is nn.Linear:
            lm.set_output_embeddings(_LossHead(dense_head))
            hook = lm.base_model.register_forward_hook(self._keep_masked)
            self.sparse = True
            if not self._equals(reference):
                hook.remove()
                lm.set_output_embeddings(dense_head)
                self.sparse = False

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy in nats, an fp32 scalar, of the masked tokens of ``inputs`` (B, S) int64.

        ``targets`` (B, 2, M) are the positions in the row and the original tokens there. Raises ConfigError for rows longer
        than the model's positions.
        """
        if self.max_positions is not None and inputs.shape[1] > self.max_positions:
            raise ConfigError(
                f"data.seq_length: rows of {inputs.shape[1]} tokens are longer than the {self.max_positions} positions of "
                f"this {type(self.lm).__name__}; lower it, and the curriculum's max_difficulty"
            )
        places, labels = targets.unbind(1)
        if not self.sparse:
            logits = self.lm(input_ids=inputs).logits  # (B, S, V)
            masked = torch.take_along_dim(logits, places.unsqueeze(-1), dim=1)  # (B, M, V)
            return F.cross_entropy(masked.flatten(0, 1).float(), labels.flatten())
        head = self.lm.get_output_embeddings()
        self._places, head.labels = places, labels
        try:
            loss: Tensor = self.lm(input_ids=inputs).logits
        finally:
            self._places = head.labels = None
        return loss

    def _keep_masked(self, _encoder: nn.Module, _inputs: Any, output: Any) -> Any:
        """Replace the hidden states (B, S, H) of the encoder's output by those at masked positions, (B, M, H)."""
        if self._places is not None:
            output.last_hidden_state = torch.take_along_dim(output.last_hidden_state, self._places.unsqueeze(-1), dim=1)
        return output

    @torch.no_grad()
    def _equals(self, reference: Tensor) -> bool:
        """Return whether the sparse loss of ``_example`` is ``reference``."""
        inputs, targets = _example(self.lm)
        try:
            loss = self(inputs, targets)
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError):
            return False  # layers of the head may reject hidden states of another shape
        return loss.shape == reference.shape and torch.allclose(loss, reference, rtol=1e-5, atol=0)


class _LossHead(nn.Module):
    """The last linear layer of the head. Given ``labels`` it returns their mean cross entropy instead of logits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight  # (V, H)
        self.bias = linear.bias  # (V,) or None
        self.labels: Tensor | None = None  # (B, M)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of ``hidden`` (..., H), or the mean cross entropy of ``labels``, an fp32 scalar."""
        if self.labels is None:
            return F.linear(hidden, self.weight, self.bias)
        return mean_cross_entropy(hidden.flatten(0, -2), self.weight, self.labels.flatten(), bias=self.bias)


def build_masked_lm(config: ModelConfig, lm_config: Any, folder: Path | None) -> MaskedLM:
    """Build the encoder of ``lm_config`` on the CPU in fp32, with the weights in ``folder`` or fresh ones, ready to train.

    Raises CheckpointError, and ConfigError for an encoder that can't be built or can't read four tokens.
    """
    with quiet():
        lm = load_model(folder, padding=True) if folder is not None else _new(config, lm_config)
        try:
            return MaskedLM(lm.eval()).train()
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"{source_of(config)}: {type(lm).__name__} can't read four tokens: {reason}") from error


def _new(config: ModelConfig, lm_config: Any) -> Any:
    try:
        return new_model(config, lm_config)
    except Exception as error:  # a wrong value raises one of many classes
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{source_of(config)}: transformers can't build this encoder: {reason}") from error


def _example(lm: Any) -> tuple[Tensor, Tensor]:
    """Return inputs (1, 4) and targets (1, 2, 2): tokens 0 1 2 3, with targets 2 and 0 at positions 1 and 3."""
    vocab_size = lm.config.vocab_size
    inputs = torch.arange(4).remainder(vocab_size).unsqueeze(0)
    return inputs, torch.tensor([[[1, 3], [2 % vocab_size, 0]]])


@torch.no_grad()
def _own_loss(lm: Any) -> Tensor:
    """Return transformers' own loss of ``_example``."""
    inputs, targets = _example(lm)
    labels = torch.full_like(inputs, -100).scatter(1, targets[:, 0], targets[:, 1])
    loss: Tensor = lm(input_ids=inputs, labels=labels).loss
    return loss.float()


def _positions(lm: Any) -> int | None:
    """Return the number of tokens that learned positions allow; None for other positions."""
    limit, words = getattr(lm.config, "max_position_embeddings", None), lm.get_input_embeddings()
    for module in lm.base_model.modules():
        # RoBERTa numbers positions from its padding token's id plus 1: of 514 rows with padding 1, 512 are used.
        if isinstance(module, nn.Embedding) and module is not words and module.num_embeddings == limit:
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None
