"""The ``model`` section: presets, sizes, and the numbers of parameters and FLOPs.

Needs no torch, so that a run can be planned on a machine that can't build the model.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, overload

from pydantic import Field, model_validator

from seqlen_curriculum.errors import CheckpointError, SeqlenCurriculumError
from seqlen_curriculum.fields import Count, Section, Seqlen, nearest
from seqlen_curriculum.run_folder.model_folder import SIZES, PretrainedModel, no_size, read_pretrained
from seqlen_curriculum.schedule.piecewise import ceil_div

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PRESETS", "VOCAB_MULTIPLE", "ModelConfig"]

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, as in Megatron: 50257 tokens make 50304 rows, which suit tensor cores."""


def _shape(
    num_layers: int, hidden_size: int, num_attention_heads: int, max_position_embeddings: int, vocab_size: int = 50257
) -> dict[str, int]:
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "max_position_embeddings": max_position_embeddings,
        "vocab_size": vocab_size,
    }


PRESETS: dict[str, dict[str, int]] = {
    # For a CPU and for tests; heads of 16, 32 and 32.
    "tiny-200k": _shape(2, 64, 4, 1024, 512),  # 198,400 parameters, half of them embeddings
    "tiny-1m": _shape(2, 128, 4, 1024, 4096),  # 1,052,160
    "tiny-2m": _shape(4, 160, 5, 1024, 4096),  # 2,056,640
    # GPT-2 (Radford et al. 2019, table 2). The smallest was published as 117M; it has 124M.
    "gpt2-117m": _shape(12, 768, 12, 1024),  # the paper's first model
    "gpt2-345m": _shape(24, 1024, 16, 1024),
    "gpt2-774m": _shape(36, 1280, 20, 1024),
    "gpt2-1.5b": _shape(48, 1600, 25, 1024),  # the paper's second model
    # GPT-3 (Brown et al. 2020, table 2.1): twice the context.
    "gpt3-125m": _shape(12, 768, 12, 2048),  # the paper's third model
    "gpt3-1.3b": _shape(24, 2048, 16, 2048),  # 16 heads of 128; the GPT-3 paper's 24 don't divide 2048
}
"""Sizes by name. The parameter counts include the padding of the vocabulary."""


class ModelConfig(Section):
    """The ``model`` section: a preset, the five sizes, a preset with some sizes overridden, or a pretrained model."""

    preset: str | None = None
    """Name of a preset. It sets every size below that isn't given."""

    hf_checkpoint: str | None = None
    """Folder of a Hugging Face causal language model or encoder, or its name on the Hub, such as ``gpt2``. Training starts
    from its architecture and weights. It sets the five sizes; a size that is given too must be the same. A relative path is
    looked up in the current folder first, then in the folder of this file."""

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
    architectures set theirs in the ``config.json`` of ``hf_checkpoint``."""

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
        return _with_sizes_of_folder(data)

    @model_validator(mode="after")
    def _dropout_is_known(self) -> ModelConfig:
        if self.dropout and not self.is_gpt2:
            assert self.initial is not None
            raise ValueError(
                f"dropout {self.dropout} is not used by a {self.initial.model_type}, which has its own in config.json; "
                "remove the key"
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

    @property
    def is_gpt2(self) -> bool:
        """True for a GPT-2, which every engine can train. Other architectures train data-parallel only."""
        return self.initial is None or self.initial.is_plain_gpt2

    @property
    def is_encoder(self) -> bool:
        """True for an encoder, which ``training.objective: "masked"`` trains; False for a causal language model."""
        return self.initial is not None and self.initial.is_encoder

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding and the tied head: for a GPT-2, ``vocab_size`` rounded up to ``VOCAB_MULTIPLE``."""
        if not self.is_gpt2:
            return self.vocab_size
        return ceil_div(self.vocab_size, VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def parameter_count(self) -> int:
        """Return the exact number of trained parameters. The tied head counts once; padded vocabulary rows count."""
        if self.initial is not None and not self.is_gpt2:
            return self.initial.parameter_count()
        width = self.hidden_size
        inner = (self.initial and self.initial.config.get("n_inner")) or 4 * width
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
        position embeddings, which are looked up, and counts the word embedding once, for the product of the head.
        Attention is counted as if it were not causal, as in both sources. Recomputation for activation checkpointing is
        not counted.
        """
        # GPT-2 117M at seqlen 1024: 6 * (124.5M - 0.8M) + 12 * 12 * 768 * 1024 = 742M + 113M = 855M FLOPs per token.
        looked_up = self.max_position_embeddings * self.hidden_size
        if self.initial is not None and not self.is_gpt2:
            looked_up = self.initial.looked_up_count()
        multiplied = self.parameter_count() - looked_up
        return 6.0 * multiplied + 12.0 * self.num_layers * self.hidden_size * seqlen


def _with_sizes_of_folder(data: dict[str, Any]) -> dict[str, Any]:
    """Return the section with the sizes of ``hf_checkpoint``. Raises ValueError for a size that differs or is missing."""
    path = data.get("hf_checkpoint")
    if not isinstance(path, str):
        return data
    if not path:
        raise ValueError("hf_checkpoint: '' is not a folder; give one, or remove the key to start a new model")
    try:
        pretrained = read_pretrained(Path(path))
        sizes = pretrained.sizes()
    except CheckpointError as error:
        reason = "a run that started from a folder needs its files each time it is resumed"
        raise ValueError(f"hf_checkpoint: {error}; {reason}") from error
    except SeqlenCurriculumError as error:
        raise ValueError(f"hf_checkpoint: {error}") from error
    # A size that config.json lacks may be given in the section. A size that both have must be equal.
    missing = [size for size in SIZES if size not in sizes and size not in data]
    if missing:
        raise ValueError(f"hf_checkpoint: {path}: {no_size(missing[0], pretrained.config)}")
    for size, value in sizes.items():
        if data.get(size, value) != value:
            raise ValueError(
                f"{size}: {data[size]} differs from {value} in hf_checkpoint {path}; remove the size (or the preset that "
                "sets it), or give another folder"
            )
    return {**data, **sizes}
