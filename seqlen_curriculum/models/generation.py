"""Text from a trained model, by transformers' own ``generate``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig

from seqlen_curriculum.data.tokenizer import END_OF_TEXT
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.models.pretrained import load_model, load_tokenizer, quiet
from seqlen_curriculum.run_folder.model_folder import sizes_in

__all__ = ["Sample", "Sampling", "generate"]


class Sample(NamedTuple):
    """``text`` is the prompt and what follows, of ``new_tokens``; ``full``: it ends where the model's positions end."""

    text: str
    new_tokens: int
    full: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Raises ConfigError for values that make no sense."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token each time."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens that have this probability together."""
    top_k: int = 0
    """Draw from this many most likely tokens; 0 for all."""
    samples: int = 1
    """Texts for each prompt."""
    seed: int = 0
    """The same texts follow from the same prompt and seed."""

    def __post_init__(self) -> None:
        rules = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("--temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--top-k", self.top_k, self.top_k >= 0, "0 or more"),
            ("--samples", self.samples, self.samples >= 1, "1 or more"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "0 or more and below 2**63"),
        )
        found = [f"{flag}: {value} is not valid: it must be {rule}" for flag, value, holds, rule in rules if not holds]
        if self.temperature == 0 and self.samples > 1:
            found.append(f"--samples: {self.samples} would all be the same at --temperature 0; raise that or give 1")
        if found:
            raise ConfigError(found)


def generate(
    path: Path, prompts: Sequence[str], sampling: Sampling, tokenizer: Path | None = None
) -> Iterator[list[Sample]]:
    """The samples of each prompt in turn, from the checkpoint, run or Hugging Face folder at ``path``.

    Each ends at the end of text, after ``max_new_tokens``, or at the model's last position. Raises CheckpointError, and
    ConfigError if a prompt leaves no position, before anything is generated.
    """
    for prompt in prompts:
        _check_text(prompt)
    words = load_tokenizer(path, tokenizer)
    model = load_model(path)
    positions = sizes_in(model.config.to_dict()).get("max_position_embeddings")
    encoded = [_encoded(prompt, words, positions) for prompt in prompts]
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model.to(device)
    for ids in encoded:
        yield _continued(model, words, ids, sampling, positions)


def _check_text(prompt: str) -> None:
    """Bytes that aren't UTF-8 come from a command line or stdin as characters that can't be encoded."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"--prompt {prompt[:30]!r}: is not UTF-8 at character {error.start + 1}; give it, or stdin, in UTF-8"
        ) from None


def _encoded(prompt: str, words: Tokenizer, positions: int | None) -> list[int]:
    ids: list[int] = words.encode(prompt).ids
    end = words.token_to_id(END_OF_TEXT)
    if not ids and end is not None:
        return [end]  # what a document begins after
    if not ids:
        raise ConfigError(f"--prompt {prompt!r}: has no token to begin with; write some text")
    if positions is not None and len(ids) >= positions:
        raise ConfigError(
            f"--prompt {prompt[:30]!r}...: is {len(ids)} tokens long, and the model reads {positions} with what follows; "
            "shorten it"
        )
    return ids


def _continued(model: Any, words: Tokenizer, ids: list[int], sampling: Sampling, positions: int | None) -> list[Sample]:
    room = sampling.max_new_tokens if positions is None else min(sampling.max_new_tokens, positions - len(ids))
    ends = _ends(model, words)
    # What fills rows that ended before others is never read.
    shared = {"max_new_tokens": room, "eos_token_id": ends or None, "pad_token_id": ends[0] if ends else 0}
    settings = GenerationConfig(**shared, **_drawn(sampling))
    inputs = torch.tensor([ids], device=model.device)
    torch.manual_seed(sampling.seed)  # for each prompt, so that others change nothing
    with quiet():
        rows = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
    return [_sample(row[len(ids) :], ids, words, ends, full=room < sampling.max_new_tokens) for row in rows.tolist()]


def _ends(model: Any, words: Tokenizer) -> list[int]:
    """The tokens that end a text: the one that closes our documents, and those that the model names itself."""
    own, end = model.generation_config.eos_token_id, words.token_to_id(END_OF_TEXT)
    named = own if isinstance(own, list) else [own]
    return sorted({token for token in (end, *named) if token is not None and token < model.config.vocab_size})


def _sample(new: list[int], ids: list[int], words: Tokenizer, stops: Sequence[int], full: bool) -> Sample:
    stop = next((place for place, token in enumerate(new) if token in stops), None)
    kept = new if stop is None else new[:stop]
    return Sample(words.decode([*ids, *kept]), len(kept), full and stop is None)


def _drawn(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return {"do_sample": True, "num_return_sequences": sampling.samples, **chosen}
