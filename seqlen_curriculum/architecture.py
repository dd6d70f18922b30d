"""The shape of a GPT-2 model: presets, the ``model`` section, and what it counts to (parameters, FLOPs).

Needs no torch, so a run can be planned where no model could be built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, overload

from pydantic import Field, model_validator

from seqlen_curriculum.fields import Count, Section, Seqlen, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PRESETS", "VOCAB_MULTIPLE", "ModelConfig"]

VOCAB_MULTIPLE = 128
"""The head's width is rounded up to this, as in Megatron: 50257 words make 50304 rows, which tensor cores divide well."""


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
    "tiny-200k": _shape(2, 64, 4, 1024, 512),  # 198,400 parameters, half of them positions and words
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
"""Name to shape. Parameter counts include the padding of the vocabulary."""


class ModelConfig(Section):
    """The ``model`` section: a preset, or the five sizes, or a preset with some of them overridden."""

    preset: str | None = None
    """A name of ``PRESETS``; it gives every size below that isn't written out."""

    num_layers: Count
    """Transformer blocks."""

    hidden_size: Count
    """Width of the residual stream; a multiple of ``num_attention_heads``."""

    num_attention_heads: Count
    """Attention heads of a block."""

    max_position_embeddings: Seqlen
    """Learned positions: the longest seqlen the model can read, in tokens."""

    vocab_size: Count
    """Token ids the data uses, ``0`` to ``vocab_size - 1``; 50257 for GPT-2's BPE."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability, for embeddings, attention and residuals alike. The paper's Megatron recipe has 0.1."""

    activation_checkpointing: bool = False
    """Keep only each block's input and recompute the rest in backward: less memory, about a third more compute."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        name = data.get("preset") if isinstance(data, dict) else None
        if not isinstance(name, str):
            return data
        if name not in PRESETS:
            raise ValueError(f"preset '{name}' is unknown{nearest(name, PRESETS)}")
        return {**PRESETS[name], **data}

    @model_validator(mode="after")
    def _heads_divide_hidden_size(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "change one of them"
            )
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding and of the tied head: ``vocab_size`` rounded up to ``VOCAB_MULTIPLE``."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def parameter_count(self) -> int:
        """Exact number of trained parameters; the tied head counts once, padded vocabulary rows count."""
        width = self.hidden_size
        # A block: qkv 3w^2+3w, projection w^2+w, MLP 4w^2+4w and 4w^2+w, two layer norms 4w.
        block = 12 * width**2 + 13 * width
        embeddings = (self.padded_vocab_size + self.max_position_embeddings) * width
        return embeddings + self.num_layers * block + 2 * width  # + the last layer norm

    @overload
    def flops_per_token(self, seqlen: float) -> float: ...
    @overload
    def flops_per_token(self, seqlen: NDArray[Any]) -> NDArray[np.float64]: ...
    def flops_per_token(self, seqlen: Any) -> Any:
        """Training FLOPs (forward and backward) of one token in a sequence of ``seqlen`` tokens; arrays elementwise.

        ``6 N + 12 num_layers hidden_size seqlen`` (PaLM, appendix B; Megatron's formula to within biases). ``N`` leaves
        out position embeddings, which are looked up, and counts the word embedding once, for the head's product.
        Attention counts as if not causal, as both do; recomputation for activation checkpointing is not counted.
        """
        multiplied = self.parameter_count() - self.max_position_embeddings * self.hidden_size
        return 6.0 * multiplied + 12.0 * self.num_layers * self.hidden_size * seqlen
