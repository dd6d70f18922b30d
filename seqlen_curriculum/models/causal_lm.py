"""The initial model of a run: a new GPT-2, a pretrained GPT-2, or any causal language model of Hugging Face.

Shapes: ``B`` rows, ``S`` seqlen, ``V`` vocabulary, ``H`` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GPT2LMHeadModel

from seqlen_curriculum.config.model import ModelConfig
from seqlen_curriculum.errors import CheckpointError, ConfigError, SeqlenCurriculumError
from seqlen_curriculum.models.architecture import architecture_config, new_model, source_of
from seqlen_curriculum.models.attention import SDPA_CAUSAL, set_parts
from seqlen_curriculum.models.document_attention import DocumentParts, mean_loss
from seqlen_curriculum.models.gpt2 import CausalLM, build_gpt2, checkpoint_activations, save_hf
from seqlen_curriculum.models.loss_head import LossHead
from seqlen_curriculum.models.masked_lm import MaskedLM, build_masked_lm
from seqlen_curriculum.models.pretrained import (
    load_model,
    quiet,
    reason,
    replace_invalid_generation_config,
    save_pretrained,
)
from seqlen_curriculum.models.probe import Ability, backbone_of, balance_loss, probe
from seqlen_curriculum.models.rope import change_rope

__all__ = ["AnyCausalLM", "build_model", "save_model"]


class AnyCausalLM(nn.Module):
    """Any causal language model of transformers with the interface of ``CausalLM``; ``lm`` owns every parameter.

    ``abilities`` is what ``probe`` found. Where the loss can't be computed from hidden states, the logits (B, S, V) of a
    micro-batch are held in memory; where attention can't be ours, it stays the model's own.
    """

    lm: Any

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.abilities = probe(lm)
        self.lm = lm
        self.restarted_window: int | None = None

    def forward(
        self, inputs: Tensor, targets: Tensor, first_position: int = 0, parts: DocumentParts | None = None
    ) -> Tensor:
        """Return the mean cross entropy in nats, an fp32 scalar, of ``targets`` (B, S) given ``inputs`` (B, S), both int64.

        ``targets`` are already shifted: ``targets[:, i]`` follows ``inputs[:, i]``, which is at ``first_position + i``. With
        ``parts``, for which no window may be set, attention and positions are those of the parts, and the mean is that of
        the targets that they keep, times their weight. In training mode, the auxiliary loss of a mixture of experts is added
        if its configuration has ``output_router_logits``.
        """
        if parts is not None:
            self.require("windows", 'data.attention: "document"')
        set_parts(self.abilities.attentions, parts)
        positions = self.positions(inputs, first_position) if parts is None else {"position_ids": parts.positions}
        if self.head is None:
            outputs = self.lm(input_ids=inputs, use_cache=False, **positions)
            whole = mean_loss(_loss_of_logits, outputs.logits, targets, parts)
            balance = getattr(outputs, "aux_loss", None)
            return whole if balance is None or not self.training else whole + self.lm.router_aux_loss_coef * balance
        routes = self.abilities.routes and self.training
        routing = {"output_router_logits": routes} if self.abilities.routes else {}
        keywords = positions | routing
        outputs = self.backbone(input_ids=inputs, use_cache=False, **keywords)
        loss = mean_loss(self.head, outputs.last_hidden_state, targets, parts)
        return loss + balance_loss(self.lm, outputs.router_logits) if routes else loss

    def positions(self, inputs: Tensor, first_position: int) -> dict[str, Tensor]:
        """Return the keyword ``position_ids`` (1, S), if the model takes it; with a restart of 4: ``0 1 2 3 0 1``."""
        if "windows" in self.abilities.refused:
            assert first_position == 0  # whoever splits rows has called require()
            return {}
        place = torch.arange(first_position, first_position + inputs.shape[1], device=inputs.device).unsqueeze(0)
        return {"position_ids": place if self.restarted_window is None else place % self.restarted_window}

    def require(self, ability: Ability, setting: str) -> None:
        """Raise ConfigError, which names the ``setting`` that needs ``ability``, if the model lacks it."""
        if ability in self.abilities.refused:
            raise ConfigError(
                f"{setting} doesn't work with a {self.lm.config.model_type} ({type(self.lm).__name__}): "
                f"{self.abilities.refused[ability]}; remove it, or choose another architecture"
            )

    @property
    def backbone(self) -> Any:
        """Transformers' model without its head: (B, S) token ids to hidden states."""
        return backbone_of(self.lm)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder layers. Raises ConfigError if there is no list of them."""
        for module in self.backbone.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.lm.config.num_hidden_layers:
                return module
        raise ConfigError(f"{type(self.lm).__name__} has no list of its layers; choose another architecture")

    @property
    def head(self) -> LossHead | None:
        """The output layer, None if the loss is computed from logits."""
        return self.lm.get_submodule(self.abilities.head_name) if self.abilities.head_name else None

    @property
    def attentions(self) -> Sequence[nn.Module]:
        """The modules that attend by ``causal_attention``. Raises ConfigError if windows don't work."""
        self.require("windows", 'curriculum_learning.method: "window"')
        return self.abilities.attentions

    def restart_positions(self, window: int | None) -> None:
        """Count positions from 0 in each ``window`` tokens of a row, or through the row."""
        self.restarted_window = window


def _loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of ``targets`` (...) given ``logits`` (..., V)."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def build_model(config: ModelConfig, read_weights: bool = True) -> CausalLM | AnyCausalLM | MaskedLM:
    """Build the model of the ``model`` section on the CPU in fp32, ready to train.

    The weights are those of ``hf_checkpoint``. Without it, or without ``read_weights`` (if a checkpoint of the run is
    loaded), the architecture initialises them from torch's global seed. Raises CheckpointError, ConfigError.
    """
    if config.architecture is None:
        return build_gpt2(config)
    lm_config = architecture_config(config)
    weights_folder = config.initial.folder if config.initial is not None and read_weights else None
    try:
        if config.rope is not None:
            change_rope(lm_config, config.rope, config.max_position_embeddings)
        with quiet():
            model: CausalLM | AnyCausalLM | MaskedLM
            if config.is_encoder:
                model = build_masked_lm(config, lm_config, weights_folder)
            elif config.is_gpt2:
                model = CausalLM(_pretrained_gpt2(config, lm_config, weights_folder))
            else:
                model = AnyCausalLM(_pretrained_lm(config, lm_config, weights_folder))
    except SeqlenCurriculumError:
        raise
    except Exception as error:  # odd values in config.json make transformers raise almost anything
        raise ConfigError(f"{source_of(config)}: transformers can't build it ({reason(error)})") from error
    if config.activation_checkpointing:
        checkpoint_activations(model.lm)
    return model


def _pretrained_gpt2(config: ModelConfig, lm_config: Any, folder: Path | None) -> Any:
    """Return a GPT-2 with the vocabulary padded to ``padded_vocab_size`` rows."""
    lm_config.update({"vocab_size": config.padded_vocab_size, "use_cache": False})
    lm_config.update(dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout))
    lm_config._attn_implementation = SDPA_CAUSAL
    lm = GPT2LMHeadModel(lm_config).float()
    if folder is None:
        return lm

    # A checkpoint of this package keeps its trained padding rows, so that training continues with exactly the same loss.
    weights = load_model(folder, padding=True).state_dict()
    words = weights["lm_head.weight"][: config.padded_vocab_size]  # (V, H) of the folder
    # Missing rows are the mean of the existing ones. A padding token's logit is then the mean logit, which by Jensen is
    # at most log(mean(exp(logits))): it takes at most 1/V of the probability. From 50257 to 50304 tokens the loss rises
    # by at most log(1 + 47 / 50257) = 0.0009 nats. The logit of a zero row is 0, which may exceed all others.
    mean_rows = words.mean(0, keepdim=True).expand(config.padded_vocab_size - len(words), -1)
    padded = torch.cat([words, mean_rows])  # (padded V, H)
    lm.load_state_dict({**weights, "transformer.wte.weight": padded, "lm_head.weight": padded})
    return lm


def _pretrained_lm(config: ModelConfig, lm_config: Any, folder: Path | None) -> Any:
    """Return any other causal language model, built by transformers."""
    if folder is not None:
        lm = load_model(folder, padding=True, config=lm_config if config.rope else None)
    else:
        lm = new_model(config, lm_config)
    if folder is None and config.initial is not None and (config.initial.folder / "generation_config.json").exists():
        lm.generation_config = GenerationConfig.from_pretrained(config.initial.folder)
        replace_invalid_generation_config(lm)
    _check_causal(lm.eval(), config)
    return lm.train()


@torch.no_grad()
def _check_causal(lm: Any, config: ModelConfig) -> None:
    """Raise ConfigError for a model whose logits depend on later tokens, because it would learn to copy its targets.

    BERT and similar models also load as causal language models, but attend in both directions unless configured otherwise.
    """
    tokens = torch.arange(4).remainder(config.vocab_size).unsqueeze(0)  # (1, S): 0 1 2 3
    changed_end = torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1)  # 0 1 2 0
    before = lm(input_ids=tokens, use_cache=False).logits[:, :-1].float()  # (1, S - 1, V)
    after = lm(input_ids=changed_end, use_cache=False).logits[:, :-1].float()
    if not torch.allclose(before, after, atol=1e-5 * float(before.abs().max()), rtol=0):
        raise ConfigError(f"{source_of(config)}: its logits change with later tokens; give a causal language model")


def save_model(model: CausalLM | AnyCausalLM | MaskedLM, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write ``weights``, under the names of ``model``'s parameters, for ``from_pretrained(folder)`` of its ``AutoModel``.

    Raises CheckpointError.
    """
    if isinstance(model, CausalLM):
        save_hf(model, folder, weights)
        return
    persistent = {name: buffer for name, buffer in model.lm.named_buffers() if name in model.lm.state_dict()}
    tensors = {**persistent, **{name.removeprefix("lm."): tensor.contiguous() for name, tensor in weights.items()}}
    save_pretrained(model.lm, folder, tensors)
    if not any(folder.glob("model*.safetensors")):
        raise CheckpointError(f"{folder}: transformers wrote no model.safetensors for {type(model.lm).__name__}")
