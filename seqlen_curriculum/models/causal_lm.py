"""The model that a run begins with: a new GPT-2, one that was trained before, or any causal model of Hugging Face's.

Shapes: ``B`` rows, ``S`` seqlen, ``V`` vocabulary, ``H`` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GPT2LMHeadModel

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.models.gpt2 import CausalLM, build_gpt2, checkpoint_activations, save_hf
from seqlen_curriculum.models.pretrained import load_model, mend_generation, quiet

__all__ = ["AnyCausalLM", "build_model", "save_model"]


class AnyCausalLM(nn.Module):
    """Tokens and their next tokens in, mean loss out, as ``CausalLM``, of any of transformers' causal models.

    It knows nothing of the model inside, so it holds the logits (B, S, V) of a micro-batch.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats, an fp32 scalar, of ``targets`` (B, S), already shifted, given ``inputs`` (B, S)."""
        logits = self.lm(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build_model(config: ModelConfig, read_weights: bool = True) -> CausalLM | AnyCausalLM:
    """The model of the ``model`` section on the CPU in fp32, ready to train.

    Weights are those of ``hf_checkpoint``; without one, or without ``read_weights`` (a checkpoint of the run brings them),
    they follow from torch's global seed. A GPT-2's vocabulary is padded: rows that the folder doesn't have are the mean of
    those it has, so that they get the mean logit, which is at most that of 1 in V. Raises CheckpointError, ConfigError.
    """
    if config.initial is None:
        return build_gpt2(config)
    folder = config.initial.folder
    try:
        with quiet():
            lm_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (KeyError, OSError, TypeError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise ConfigError(f"model.hf_checkpoint: {folder}: transformers can't read its config.json: {told}") from error
    with quiet():
        lm = (_gpt2 if config.is_gpt2 else _any)(config, lm_config, folder if read_weights else None)
    if config.activation_checkpointing:
        checkpoint_activations(lm)
    return CausalLM(lm) if config.is_gpt2 else AnyCausalLM(lm)


def _gpt2(config: ModelConfig, lm_config: Any, folder: Path | None) -> Any:
    lm_config.update({"vocab_size": config.padded_vocab_size, "use_cache": False})
    lm_config.update(dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout))
    lm_config._attn_implementation = "sdpa_causal"
    lm = GPT2LMHeadModel(lm_config).float()
    if folder is not None:
        # A checkpoint that has our padding rows keeps them, so that it goes on with the very loss it had.
        weights = load_model(folder, padding=True).state_dict()
        words = weights.pop("lm_head.weight")[: config.padded_vocab_size]
        weights["transformer.wte.weight"] = _padded(words, config.padded_vocab_size)
        lm.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]})
    return lm


def _padded(words: Tensor, rows: int) -> Tensor:
    """``words`` (V, H) with rows of their mean at the end.

    Zero rows would have logit 0, which may be above all others; the mean's logit is below the log of the mean of exp.
    """
    return torch.cat([words, words.mean(0, keepdim=True).expand(rows - len(words), -1)])


def _any(config: ModelConfig, lm_config: Any, folder: Path | None) -> Any:
    assert config.initial is not None
    try:
        lm = load_model(folder) if folder is not None else AutoModelForCausalLM.from_config(lm_config).float()
    except ValueError as error:
        raise ConfigError(f"model.hf_checkpoint: no causal language model of transformers ({error})") from error
    if folder is None and (config.initial.folder / "generation_config.json").exists():
        lm.generation_config = GenerationConfig.from_pretrained(config.initial.folder)
        mend_generation(lm)
    _check_causal(lm.eval(), config)
    return lm.train()


@torch.no_grad()
def _check_causal(lm: Any, config: ModelConfig) -> None:
    """Some models of both names read in both directions unless told otherwise, and would learn to copy their targets."""
    tokens = torch.arange(4).remainder(config.vocab_size).unsqueeze(0)
    other = torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1)  # (1, S), the last token another
    before, after = (lm(input_ids=rows, use_cache=False).logits[:, :-1].float() for rows in (tokens, other))
    if not torch.allclose(before, after, atol=1e-5 * float(before.abs().max()), rtol=0):
        raise ConfigError(
            f"model.hf_checkpoint: {config.hf_checkpoint}: its logits change with later tokens; give a causal language model"
        )


def save_model(model: CausalLM | AnyCausalLM, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write ``weights``, by the names of ``model``'s parameters, for ``AutoModelForCausalLM.from_pretrained(folder)``.

    Raises CheckpointError.
    """
    if isinstance(model, CausalLM):
        save_hf(model, folder, weights)
        return
    lasting = {name: buffer for name, buffer in model.lm.named_buffers() if name in model.lm.state_dict()}
    tensors = {**lasting, **{name.removeprefix("lm."): tensor.contiguous() for name, tensor in weights.items()}}
    with quiet():
        model.lm.save_pretrained(folder, state_dict=tensors)
    if not any(folder.glob("model*.safetensors")):
        raise CheckpointError(f"{folder}: transformers wrote no model.safetensors for {type(model.lm).__name__}")
