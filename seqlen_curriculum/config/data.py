"""The ``data`` section: corpora, their proportions, and the full length of a sample."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from seqlen_curriculum.fields import Count, Section, Seqlen
from seqlen_curriculum.strict_json import not_text, shown

__all__ = ["DECOMPOSED_KEYS", "DOCUMENT_KEYS", "DataConfig", "corpus_prefix"]

DOCUMENT_KEYS = ("attention", "eod_mask_loss")
"""Keys that a run whose tokens attend through their row leaves out of its settings, as older checkpoints do."""
DECOMPOSED_KEYS = ("order", "min_piece_tokens", "bucket_curriculum", "bucket_cycles", "bucket_odds")
"""Keys that a packed run leaves out of its settings, as older checkpoints do."""


def corpus_prefix(path: str | os.PathLike[str]) -> str:
    """Return ``path`` without a trailing ``.bin`` or ``.idx``."""
    name = os.fspath(path)
    return name[:-4] if name.endswith((".bin", ".idx")) else name


def _corpora(value: object) -> list[str] | list[tuple[float, str]]:
    """Return ``["wiki", ...]`` unchanged and the pairs of ``[[0.7, "wiki"], ...]`` as tuples. Raises ValueError."""
    # Checked by hand, because pydantic reports a mistake in a union of lists once for each of its members.
    if not isinstance(value, list) or not value or not all(isinstance(item, (str, list)) for item in value):
        raise ValueError(f"{shown(value)} is not valid: give a list of corpus prefixes, or of [weight, prefix] pairs")
    if all(isinstance(item, str) for item in value):
        return value
    for item in value:
        is_pair = isinstance(item, list) and len(item) == 2 and isinstance(item[1], str)
        has_number = is_pair and isinstance(item[0], (int, float)) and not isinstance(item[0], bool)
        if not has_number or not 0 < item[0] < 1e15:
            raise ValueError(
                f"{shown(item)} is not a [weight, prefix] pair with a weight above 0; give every corpus a weight, as in "
                '[[0.7, "wiki"], [0.3, "books"]], or give none'
            )
    return [(float(weight), prefix) for weight, prefix in value]


_SHARES = r"^\s*(\d+\.?\d*|\.\d+)(\s*[,/]\s*(\d+\.?\d*|\.\d+)){0,2}\s*$"


def _shares(split: str) -> str:
    if not re.search(_SHARES, split):
        raise ValueError(f"{shown(split)} is not valid: write up to three shares, as in '949,50,1'")
    return split


_Split = Annotated[str, AfterValidator(_shares), Field(json_schema_extra={"pattern": _SHARES})]
_Weight = Annotated[float, Field(gt=0, lt=1e15)]
_Prefixes = Annotated[list[str], Field(min_length=1)]
_Blend = Annotated[list[tuple[_Weight, str]], Field(min_length=1)]


class DataConfig(Section):
    """The ``data`` section: the corpora, their proportions, and the full length of a sample."""

    train: Annotated[
        list[str] | list[tuple[float, str]],
        BeforeValidator(_corpora, json_schema_input_type=_Prefixes | _Blend),
    ]
    """Prefixes of Megatron ``.bin/.idx`` pairs. Several are read as one corpus, in proportion to their sizes. With
    ``[[weight, prefix], ...]`` samples are taken in proportion to the weights instead. A relative path here, in ``valid``
    or in ``test`` is looked up in the current folder first, then in the folder of this file."""
    seq_length: Seqlen
    """Full length of a sample in tokens."""
    split: _Split = "949,50,1"
    """Shares of the documents for training, validation and test, as in Megatron."""
    valid: _Prefixes | None = None
    """Prefixes of corpora for validation only. The corpora of ``train`` are then read whole and ``split`` isn't used."""
    test: _Prefixes | None = None
    """Prefixes of corpora for testing only, instead of the last share of ``split``."""
    leftovers: Literal["drop", "recycle"] = "drop"
    """Use of the tokens that shortening leaves over. ``drop`` skips them, as in the paper. ``recycle`` reads them as
    further samples before the next epoch starts, so that fewer than ``seq_length`` tokens per epoch are lost."""
    order: Literal["packed", "decomposed"] = "packed"
    """How documents become rows. ``packed`` concatenates them and cuts samples of ``seq_length`` tokens. ``decomposed`` cuts
    each document into pieces whose lengths are powers of two, up to ``seq_length``. A row is one piece, all rows of a step
    have the same length, and all steps have the same number of tokens (Dataset Decomposition, arXiv 2405.13226)."""
    attention: Literal["row", "document"] = "row"
    """The tokens that a token attends to: those before it in its ``row``, or only those of its own ``document``, with
    positions that start at 0 in each document (intra-document attention; Megatron's ``--reset-attention-mask`` and
    ``--reset-position-ids``). The token that ends a document predicts the first token of the next one from position 0."""
    eod_mask_loss: bool = False
    """Only with ``document``: don't train on the first token of a document, which only the end token before it predicts
    (Megatron's ``--eod-mask-loss``). The loss is the mean over the other targets; all count as consumed tokens."""
    min_piece_tokens: Seqlen | None = None
    """Only with ``decomposed``: the shortest piece, a power of two. Shorter ones are dropped. Default: ``seq_length // 32``,
    at least 1 (the paper has 256 to 8192)."""
    bucket_curriculum: Literal["uniform", "grow"] | None = None
    """Only with ``decomposed`` and without ``curriculum_learning``, whose schedule otherwise sets the length of each step.
    ``uniform`` (the default) draws lengths in proportion to their tokens. ``grow`` draws short lengths first in each of
    ``bucket_cycles`` parts of the run, which have the same steps as those of ``uniform``."""
    bucket_cycles: Annotated[Count, Field(le=2**16)] | None = None
    """Only with ``grow``: the cycles of the run, each of which starts with short lengths again. Default: 8, as in the
    paper."""
    bucket_odds: Annotated[list[Annotated[float, Field(gt=0, lt=1e15)]], Field(min_length=1)] | None = None
    """Only with ``grow``: the odds of drawing each length that is not used up in the cycle, shortest length first. Default:
    powers of two down to 1 for the longest, as the paper's Grow-P2."""

    @model_validator(mode="after")
    def _document_keys(self) -> DataConfig:
        if self.eod_mask_loss and self.attention != "document":
            raise ValueError('eod_mask_loss: true needs attention "document"; set it, or set eod_mask_loss to false')
        return self

    @model_validator(mode="after")
    def _decomposed_keys(self) -> DataConfig:
        if self.order == "packed":
            given = [name for name in DECOMPOSED_KEYS if name != "order" and getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f'{given[0]}: {getattr(self, given[0])!r} needs order "decomposed"; set it, or remove {given[0]}'
                )
            return self
        for name, length in (("seq_length", self.seq_length), ("min_piece_tokens", self.shortest_piece)):
            if length & (length - 1):
                raise ValueError(
                    f'{name}: {length} is not a power of two, and order "decomposed" cuts pieces of 1, 2, 4, 8, ... tokens; '
                    f"set it to {1 << (length.bit_length() - 1)} or {1 << length.bit_length()}"
                )
        if self.shortest_piece > self.seq_length:
            raise ValueError(
                f"min_piece_tokens: {self.shortest_piece} is above seq_length {self.seq_length}, the longest piece; lower it"
            )
        if self.leftovers == "recycle":
            raise ValueError(
                'leftovers: "recycle" has no effect with order "decomposed", whose pieces are read whole; drop it'
            )
        return self._checked_grow()

    def _checked_grow(self) -> DataConfig:
        for name in ("bucket_cycles", "bucket_odds"):
            if getattr(self, name) is not None and self.bucket_curriculum != "grow":
                raise ValueError(
                    f'{name}: {getattr(self, name)!r} needs bucket_curriculum "grow"; set it, or remove {name}'
                )
        lengths = len(self.piece_lengths)
        if self.bucket_odds is not None and len(self.bucket_odds) != lengths:
            raise ValueError(
                f"bucket_odds: has {len(self.bucket_odds)} entries for the {lengths} lengths from min_piece_tokens "
                f"{self.shortest_piece} to seq_length {self.seq_length}; give one for each, shortest first"
            )
        return self

    @model_validator(mode="after")
    def _each_corpus_once(self) -> DataConfig:
        seen: dict[str, str] = {}  # real path to key: "wiki", "./wiki.bin" and a link to either are one corpus
        for name, prefixes in (("train", self.prefixes), ("valid", self.valid or []), ("test", self.test or [])):
            for prefix in prefixes:
                if reason := not_text(prefix):
                    raise ValueError(f"{name} names {prefix!r}, which {reason}")
                place = os.path.realpath(corpus_prefix(prefix))
                if seen.get(place) == name:
                    raise ValueError(f"{name} names {prefix!r} twice; each corpus is read once per epoch, so keep one")
                if place in seen:
                    raise ValueError(f"{name} names {prefix!r}, which {seen[place]} names too; keep it in one of them")
                seen[place] = name
        if self.valid is not None and "split" in self.model_fields_set:
            raise ValueError(f'split: "{self.split}" isn\'t used if valid is given; remove one of them')
        return self

    @property
    def shortest_piece(self) -> int:
        """The tokens of the shortest piece under ``decomposed``."""
        return self.min_piece_tokens or max(self.seq_length // 32, 1)

    @property
    def piece_lengths(self) -> tuple[int, ...]:
        """The lengths of the pieces under ``decomposed``, shortest first; none otherwise."""
        if self.order == "packed":
            return ()
        return tuple(1 << power for power in range(self.shortest_piece.bit_length() - 1, self.seq_length.bit_length()))

    @property
    def prefixes(self) -> list[str]:
        """The training corpora."""
        return [item if isinstance(item, str) else item[1] for item in self.train]

    @property
    def weights(self) -> list[float] | None:
        """The weights of the training corpora as given; None without weights."""
        pairs = [item[0] for item in self.train if not isinstance(item, str)]
        return pairs or None
