"""Hugging Face's GPT-2, trained without holding the logits of a batch or an S x S mask in memory.

Shapes: ``B`` rows, ``S`` seqlen, ``H`` hidden size, ``V`` padded vocabulary, ``nh`` heads of size ``hs``, windows of ``s``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.attention import SDPA_CAUSAL, causal_attention, refuse_padding, set_parts, set_window
from seqlen_curriculum.models.document_attention import DocumentParts, mean_loss
from seqlen_curriculum.models.loss_head import LossHead
from seqlen_curriculum.models.pretrained import add_older_names, quiet, save_weights

__all__ = [
    "CausalLM",
    "LossHead",
    "build_gpt2",
    "causal_attention",
    "checkpoint_activations",
    "save_config",
    "save_hf",
    "set_window",
]


def build_gpt2(config: ModelConfig, bos_token_id: int | None = None, eos_token_id: int | None = None) -> CausalLM:
    """Build a freshly initialised GPT-2 on the CPU in fp32.

    The init is GPT-2's: normal with 0.02, residual projections divided by sqrt(2 layers). Weights depend only on torch's
    global seed, so every rank must set the same seed. The token ids are only stored in the config.
    """
    hf_config = GPT2Config(
        vocab_size=config.padded_vocab_size,
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_attention_heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new as one fused kernel
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        use_cache=False,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        attn_implementation=SDPA_CAUSAL,
    )
    lm = GPT2LMHeadModel(hf_config)
    if config.activation_checkpointing:
        checkpoint_activations(lm)
    return CausalLM(lm)


def checkpoint_activations(lm: Any) -> None:
    """Enable activation checkpointing: store only each block's input and recompute the rest in the backward pass.

    Raises ConfigError if the architecture has none.
    """
    # transformers 5.23 renamed the method. The old name still works there, but prints a warning.
    enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"model.activation_checkpointing: true, but {error} Set it to false") from error


class CausalLM(nn.Module):
    """GPT-2 whose forward returns the mean loss; ``lm`` is the Hugging Face model that owns every parameter.

    ``model.lm(inputs).logits`` are the logits, without support for padding and a key-value cache. To generate text, write
    the model with ``save_hf`` and load the folder.
    """

    lm: Any

    def __init__(self, lm: Any) -> None:
        super().__init__()
        lm.lm_head = LossHead(lm.transformer.wte.weight)
        lm.register_forward_pre_hook(refuse_padding, with_kwargs=True)
        lm.transformer.wpe.register_forward_pre_hook(_restart_positions)
        self.lm = lm
        set_window(self, None)

    def forward(
        self, inputs: Tensor, targets: Tensor, first_position: int = 0, parts: DocumentParts | None = None
    ) -> Tensor:
        """Return the mean cross entropy in nats, an fp32 scalar, of ``targets`` (B, S) given ``inputs`` (B, S), both int64.

        ``targets`` are already shifted: ``targets[:, i]`` follows ``inputs[:, i]``, which is at ``first_position + i``.
        With ``parts``, for which no window may be set, attention and positions are those of the parts, and the mean is that
        of the targets that they keep, times their weight.
        Raises ConfigError if a position is at or above ``max_position_embeddings``.
        """
        end, positions = first_position + inputs.shape[1], self.lm.config.n_positions
        if end > positions:
            raise ConfigError(
                f"model.max_position_embeddings: {positions} is below the seqlen {end} of this batch; "
                "raise it, or lower data.seq_length and the curriculum's max_difficulty"
            )
        assert inputs.shape == targets.shape
        position_ids = torch.arange(first_position, end, device=inputs.device).unsqueeze(0)  # (1, S)
        if parts is not None:
            position_ids = parts.positions  # (B, S)
        set_parts(self.attentions, parts)
        hidden = self.lm.transformer(inputs, position_ids=position_ids).last_hidden_state  # (B, S, H)
        return mean_loss(self.lm.lm_head, hidden, targets, parts)

    @property
    def backbone(self) -> Any:
        """Transformers' model without its head: (B, S) token ids to hidden states."""
        return self.lm.transformer

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.lm.transformer.h
        return blocks

    @property
    def head(self) -> LossHead:
        head: LossHead = self.lm.lm_head
        return head

    @property
    def attentions(self) -> Sequence[nn.Module]:
        """The modules that attend by ``causal_attention``, one per block."""
        return [block.attn for block in self.lm.transformer.h]

    def restart_positions(self, window: int | None) -> None:
        """Count positions from 0 in each ``window`` tokens of a row, or through the row."""
        self.lm.transformer.wpe.window = window


def _restart_positions(wpe: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Restart the position ids (1, S) at 0 in each window: with s=4, ``0 1 2 3 4 5`` becomes ``0 1 2 3 0 1``."""
    return inputs if wpe.window is None else (inputs[0] % wpe.window,)


def save_hf(model: CausalLM, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` for ``AutoModelForCausalLM.from_pretrained(folder)``.

    ``state_dict`` has the keys of ``model.state_dict()`` or of ``model.lm.state_dict()``. It is required if the parameters
    of ``model`` are sharded (ZeRO-3). The embedding keeps its padding rows, so logits are ``padded_vocab_size`` wide.
    """
    whole = model.state_dict() if state_dict is None else state_dict
    tensors = {key.removeprefix("lm."): tensor.detach().cpu().contiguous() for key, tensor in whole.items()}
    tensors.pop("lm_head.weight", None)  # tied; loading ties it again
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_config(model, folder, tensors["transformer.wte.weight"].dtype)
    save_weights(tensors, Path(folder) / "model.safetensors")


def save_config(model: CausalLM, folder: str | Path, dtype: torch.dtype) -> None:
    """Write the ``config.json`` for weights of ``dtype``."""
    config = copy.deepcopy(model.lm.config)
    config.architectures = ["GPT2LMHeadModel"]
    config.dtype = dtype
    config.use_cache = True  # disabled in training, needed for generation
    with quiet():
        config.save_pretrained(folder)
    add_older_names(Path(folder))
