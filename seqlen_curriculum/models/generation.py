"""Generate text from a trained model with transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer
from transformers import GenerationConfig

from seqlen_curriculum.data.document_end import own_end
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.fields import Flags
from seqlen_curriculum.models.pretrained import load_model, quiet
from seqlen_curriculum.models.pretrained_tokenizer import load_tokenizer
from seqlen_curriculum.run_folder.model_folder import model_folder, refuse_encoder, sizes_in

__all__ = ["Sample", "Sampling", "generate", "ignore_saved_settings"]


class Sample(NamedTuple):
    """A prompt and its continuation."""

    text: str
    """The prompt and its continuation."""
    new_tokens: int
    full: bool
    """True if the text ends because the model has no more positions."""


class Sampling(Flags):
    """The sampling parameters. Raises one ConfigError for all values out of range."""

    max_new_tokens: int = Field(default=100, ge=1)
    temperature: float = Field(default=0.8, ge=0)
    """Divides the logits; 0 means greedy decoding."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of most likely tokens with at least this total probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many most likely tokens; 0 for all."""
    samples: int = Field(default=1, ge=1)
    """Number of texts per prompt."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Random seed; the same prompt and seed give the same texts."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Sampling:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"--samples: {self.samples} would all be the same at --temperature 0; raise that or give 1"
            )
        return self

    def generation_config(self, **stopping: Any) -> GenerationConfig:
        """Return transformers' settings; ``stopping`` has those that depend on the model and the prompt."""
        if self.temperature == 0:
            return GenerationConfig(do_sample=False, **stopping)
        drawing = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(do_sample=True, num_return_sequences=self.samples, **drawing, **stopping)


def generate(
    path: Path, prompts: Sequence[str], sampling: Sampling, tokenizer: Path | None = None
) -> Iterator[list[Sample]]:
    """Yield the samples of each prompt, from the checkpoint, run or Hugging Face folder at ``path``.

    A sample ends at the end of text, after ``max_new_tokens``, or at the model's last position. Of the folder's
    ``generation_config.json`` only the end tokens are read. All prompts are checked before anything is generated. Raises
    CheckpointError, and ConfigError for a prompt that leaves no position.
    """
    for prompt in prompts:
        _check_utf8(prompt)
    folder = model_folder(path)
    refuse_encoder(folder, "it can't continue a text; give a causal language model")
    loaded_tokenizer, model = load_tokenizer(folder, tokenizer), load_model(folder)
    end = own_end(tokenizer or folder, loaded_tokenizer)
    positions = sizes_in(model.config.to_dict()).get("max_position_embeddings")
    end_id = None if end is None else loaded_tokenizer.token_to_id(end)
    generator = _Generator(model, loaded_tokenizer, sampling, positions, end_id, _end_tokens(model, end_id))
    ignore_saved_settings(model)
    encoded = [generator.encode(prompt) for prompt in prompts]
    model.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    for ids in encoded:
        yield generator.samples(ids)


def ignore_saved_settings(model: Any) -> None:
    """Forget the settings of the folder's ``generation_config.json``.

    transformers fills in what the caller's settings leave open from that file: penalties, beams, outputs, bad values too.
    Decoding would no longer be greedy where it was asked to be.
    """
    model.generation_config = GenerationConfig()


def _end_tokens(model: Any, end: int | None) -> list[int]:
    """Return the ids that end a text: the end-of-text token of prepared corpora, and those in the model's config."""
    named = model.generation_config.eos_token_id
    ends = [end, *(named if isinstance(named, list) else [named])]
    return sorted({end for end in ends if end is not None and end < model.config.vocab_size})


def _check_utf8(prompt: str) -> None:
    """Raise ConfigError for a prompt that can't be encoded.

    Python reads a byte that is invalid in UTF-8, such as 0xff, from a command line or stdin as a lone surrogate, U+DCFF.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"--prompt {prompt[:30]!r}: is not UTF-8 at character {error.start + 1}; give it, or stdin, in UTF-8"
        ) from None


@dataclass(frozen=True)
class _Generator:
    model: Any
    tokenizer: Tokenizer
    sampling: Sampling
    positions: int | None
    """Number of positions of the model; None without a limit, as with ALiBi."""
    end: int | None
    """Id of the token that ends a document of the training data, if known."""
    ends: Sequence[int]
    """Ids that end a text."""

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of ``prompt``. Raises ConfigError if it is empty, or leaves no position for a new token."""
        ids: list[int] = self.tokenizer.encode(prompt).ids
        if not ids and self.end is not None:
            return [self.end]  # in training each document except the first follows one
        if not ids:
            raise ConfigError(f"--prompt {prompt!r}: has no tokens; write some text")
        if self.positions is not None and len(ids) >= self.positions:
            raise ConfigError(
                f"--prompt {prompt[:30]!r}...: is {len(ids)} tokens long, but the model has {self.positions} positions for "
                "prompt and new tokens; shorten it"
            )
        return ids

    def samples(self, ids: list[int]) -> list[Sample]:
        """Return ``sampling.samples`` continuations of a prompt."""
        wanted, ends = self.sampling.max_new_tokens, self.ends
        room = wanted if self.positions is None else min(wanted, self.positions - len(ids))
        config = self.sampling.generation_config(
            max_new_tokens=room,
            eos_token_id=list(ends) or None,
            pad_token_id=ends[0] if ends else 0,  # pads rows that end before others, and is never read
        )
        inputs = torch.tensor([ids], device=self.model.device)  # (1, S)
        # Seeded for each prompt, so that its samples don't depend on earlier prompts.
        torch.manual_seed(self.sampling.seed)
        with torch.no_grad():
            is_finite = self.model(inputs, use_cache=False).logits[:, -1].isfinite().all()
        if not is_finite:
            raise CheckpointError(
                "the logits are not finite; the model's weights have diverged, give another checkpoint"
            )
        with quiet():
            rows = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
        samples = []
        for row in rows.tolist():  # the prompt's ids, then the new ones
            new = row[len(ids) :]
            length = next((place for place, token in enumerate(new) if token in ends), len(new))
            text = self.tokenizer.decode([*ids, *new[:length]])
            samples.append(Sample(text, length, full=length == len(new) and room < wanted))
        return samples
