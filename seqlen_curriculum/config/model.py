"""The ``model`` section: presets, sizes, and the numbers of parameters and FLOPs.

Needs no torch, so that a run can be planned on a machine that can't build the model.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, overload

from pydantic import Field, model_validator

from seqlen_curriculum.config.architectures import Counts, count
from seqlen_curriculum.config.encoder_counts import count_encoder
from seqlen_curriculum.config.hf_config import size_problems, split_keys, with_sizes
from seqlen_curriculum.config.initial_sizes import raise_first, sizes_of_config, sizes_of_folder
from seqlen_curriculum.config.presets import ARCHITECTURE_PRESETS, PRESETS
from seqlen_curriculum.config.rope import RopeConfig
from seqlen_curriculum.fields import Count, Section, Seqlen, nearest
from seqlen_curriculum.run_folder.model_folder import (
    SIZES,
    PretrainedModel,
    is_encoder,
    is_plain_gpt2,
    read_pretrained,
)
from seqlen_curriculum.schedule.piecewise import ceil_div

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PRESETS", "VOCAB_MULTIPLE", "ModelConfig"]

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, as in Megatron: 50257 tokens make 50304 rows, which suit tensor cores."""


class ModelConfig(Section):
    """The ``model`` section: a preset, some of its sizes overridden, five sizes, a configuration or a pretrained model."""

    preset: str | None = None
    """Name of a preset. It sets every size below that isn't given."""

    hf_checkpoint: str | None = None
    """Folder of a Hugging Face causal language model or encoder, or its name on the Hub, such as ``gpt2``. Training starts
    from its architecture and weights. It sets the five sizes; a size that is given too must be the same. A relative path is
    looked up in the current folder first, then in the folder of this file."""

    hf_config: str | dict[str, Any] | None = None
    """A new model of any architecture of transformers: the path of a ``config.json``, a folder with one, a name on the Hub,
    or the object itself. It sets the five sizes; a size that is given too must be the same. A relative path is looked up as
    for ``hf_checkpoint``. The run records the object, so that the file isn't needed again."""

    num_layers: Count
    """Number of transformer blocks."""

    hidden_size: Count
    """Width of the residual stream; a multiple of ``num_attention_heads``."""

    num_attention_heads: Count
    """Number of attention heads per block."""

    max_position_embeddings: Seqlen
    """Number of learned positions: the maximum sequence length in tokens."""

    vocab_size: Count
    """Number of token ids, ``0`` to ``vocab_size - 1``; 50257 for GPT-2's BPE."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability for embeddings, attention and residuals of a GPT-2. The paper's Megatron recipe uses 0.1. Other
    architectures set theirs in their ``config.json``."""

    rope: RopeConfig | None = None
    """Another base or scaling of rotary positions, to continue ``hf_checkpoint`` at a longer ``data.seq_length``.
    ``max_position_embeddings`` then grows to ``data.seq_length``, unless a higher one is given."""

    activation_checkpointing: bool = False
    """Keep only each block's input and recompute the rest in the backward pass: less memory, about a third more compute."""

    @model_validator(mode="before")
    @classmethod
    def _fill_sizes(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        name = data.get("preset")
        if isinstance(name, str):
            if name not in PRESETS:
                raise ValueError(f"preset '{name}' is unknown{nearest(name, PRESETS)}")
            data = {**PRESETS[name], **data}  # a size that is given overrides the preset's
        if data.get("rope") is not None and data.get("hf_checkpoint") is None:
            raise ValueError(
                "rope changes the positions of a trained model, but hf_checkpoint isn't given; set it to the model's folder "
                "(slw train --hf-checkpoint FOLDER), or remove rope"
            )
        if data.get("hf_config") is not None:
            return sizes_of_config(data)
        return sizes_of_folder(data)

    @model_validator(mode="after")
    def _rope_is_possible(self) -> ModelConfig:
        if self.rope is not None and self.initial is not None and (learned := self.initial.learned_positions):
            raise ValueError(
                f"rope can't lengthen a {self.model_type}, whose positions are learned ({learned}); remove rope, or "
                "take a hf_checkpoint with RoPE, such as a Llama"
            )
        return self

    @model_validator(mode="after")
    def _preset_is_consistent(self) -> ModelConfig:
        if self.preset in ARCHITECTURE_PRESETS and self.hf_checkpoint is None:
            assert self.architecture is not None
            raise_first(f"preset {self.preset} with the sizes given", size_problems(self.architecture))
        return self

    @model_validator(mode="after")
    def _dropout_is_known(self) -> ModelConfig:
        if self.dropout and not self.is_gpt2:
            raise ValueError(
                f"dropout {self.dropout} is not used by a {self.model_type}, which has its own in config.json; remove the "
                "key"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide_hidden_size(self) -> ModelConfig:
        if self.is_gpt2 and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "change one of them"
            )
        return self

    @cached_property
    def initial(self) -> PretrainedModel | None:
        """The model in ``hf_checkpoint``. Raises CheckpointError, or ConfigError if it has changed since."""
        return read_pretrained(Path(self.hf_checkpoint)) if self.hf_checkpoint else None

    @cached_property
    def architecture(self) -> dict[str, Any] | None:
        """The ``config.json`` of the model; None for a GPT-2 that is given by its sizes."""
        if self.initial is not None:
            return self.initial.config
        if isinstance(self.hf_config, dict):
            return split_keys(self.hf_config)[0]
        if self.preset in ARCHITECTURE_PRESETS:
            return with_sizes(ARCHITECTURE_PRESETS[self.preset], {size: getattr(self, size) for size in SIZES})
        return None

    @property
    def ignored_keys(self) -> list[str]:
        """Keys of ``hf_config`` that its architecture doesn't have, if they have a value."""
        config = self.hf_config if isinstance(self.hf_config, dict) else {}
        return [key for key in split_keys(config)[1] if config[key]]

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers, such as ``llama``."""
        return "gpt2" if self.architecture is None else str(self.architecture["model_type"])

    @property
    def source(self) -> str:
        """The key that names the architecture, for messages."""
        given = [key for key in ("hf_checkpoint", "hf_config", "preset") if getattr(self, key) is not None]
        return f"model.{given[0]}" if given else "model"

    @property
    def is_gpt2(self) -> bool:
        """True for a GPT-2 whose architecture this package builds itself."""
        return self.architecture is None or is_plain_gpt2(self.architecture)

    @property
    def is_encoder(self) -> bool:
        """True for an encoder, which ``training.objective: "masked"`` trains; False for a causal language model."""
        return self.architecture is not None and is_encoder(self.architecture)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding and of the head.

        That is ``vocab_size`` rounded up to ``VOCAB_MULTIPLE``. A pretrained model that isn't a GPT-2 keeps its own rows.
        """
        if self.initial is not None and not self.is_gpt2:
            return int(self.initial.config.get("vocab_size") or self.vocab_size)
        return ceil_div(self.vocab_size, VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @cached_property
    def counts(self) -> Counts | None:
        """The counts of a known architecture that isn't a GPT-2."""
        if self.architecture is None or self.is_gpt2 or any(size_problems(self.architecture)):
            return None
        return (count_encoder if self.is_encoder else count)(self.architecture, self.padded_vocab_size)

    @property
    def uncounted(self) -> str:
        """Why the parameters and the FLOPs of this model aren't known, empty if they are."""
        if self.is_gpt2 or self.counts is not None:
            return ""
        if self.initial is None:
            return f"the weights of the architecture {self.model_type} aren't known here"
        experts = next((key for key in self.initial.config if "experts" in key), "")
        return (
            f"how many of its {experts} a token of the architecture {self.model_type} uses isn't known"
            if experts
            else ""
        )

    @property
    def inner_size(self) -> int:
        """Width of a GPT-2's MLP."""
        return (self.architecture and self.architecture.get("n_inner")) or 4 * self.hidden_size

    def parameter_count(self) -> int:
        """Return the exact number of trained parameters. The tied head counts once; padded vocabulary rows count.

        Not for a model that is ``uncounted``.
        """
        if self.initial is not None and not self.is_gpt2:
            return self.initial.parameter_count()
        if self.counts is not None:
            return self.counts.parameters
        assert self.is_gpt2, self.uncounted
        width = self.hidden_size
        inner = self.inner_size
        # A block: qkv 3w^2+3w, projection w^2+w, MLP w*i+i and i*w+w, two layer norms 4w. With w = 768 and i = 4w these
        # are 12w^2 + 13w = 7,087,872; GPT-2 117M has 12 of them, 38.6M of words and 0.8M of positions: 124.5M in all.
        block = 4 * width**2 + 9 * width + 2 * width * inner + inner
        embeddings = (self.padded_vocab_size + self.max_position_embeddings) * width
        return embeddings + self.num_layers * block + 2 * width  # + the last layer norm

    @overload
    def flops_per_token(self, seqlen: float) -> float: ...
    @overload
    def flops_per_token(self, seqlen: NDArray[Any]) -> NDArray[np.float64]: ...
    def flops_per_token(self, seqlen: Any) -> Any:
        """Return the training FLOPs (forward and backward) of one token in a sequence of ``seqlen`` tokens, elementwise.

        ``6 N + 12 num_layers hidden_size seqlen`` (PaLM, appendix B; Megatron's formula to within biases). ``N`` excludes
        position embeddings, which are looked up, and counts the word embedding once, for the product of the head. In a
        mixture of experts it counts those of a token. Attention is counted as if it were not causal, as in both sources; in
        a layer with a sliding window over ``min(seqlen, window)`` tokens; with heads of another width, over that of all
        heads. Recomputation for activation checkpointing is not counted. Not for a model that is ``uncounted``.
        """
        if self.counts is not None:
            return self.counts.flops_per_token(seqlen)
        # GPT-2 117M at seqlen 1024: 6 * (124.5M - 0.8M) + 12 * 12 * 768 * 1024 = 742M + 113M = 855M FLOPs per token.
        looked_up = self.max_position_embeddings * self.hidden_size
        if self.initial is not None and not self.is_gpt2:
            looked_up = self.initial.looked_up_count()
        multiplied = self.parameter_count() - looked_up
        return 6.0 * multiplied + 12.0 * self.num_layers * self.hidden_size * seqlen
