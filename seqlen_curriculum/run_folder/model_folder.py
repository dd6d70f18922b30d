"""A folder with a language model in Hugging Face's format, such as a checkpoint or a download; read without torch."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.files import read_json
from seqlen_curriculum.launchers import global_rank
from seqlen_curriculum.run_folder import CHECKPOINT_PREFIX, MANIFEST
from seqlen_curriculum.run_folder.checkpoint_manifest import checkpoint_folders, damage, read_checkpoint
from seqlen_curriculum.run_folder.hub import hub_folder, is_hub_name
from seqlen_curriculum.run_folder.model_files import check_files, weight_files, weight_shapes
from seqlen_curriculum.run_folder.rollbacks import read_rollbacks
from seqlen_curriculum.strict_json import shown

__all__ = [
    "CAUSAL",
    "MASKED",
    "SIZES",
    "PretrainedModel",
    "architecture_names",
    "is_encoder",
    "is_plain_gpt2",
    "lasting_keys",
    "model_folder",
    "no_size",
    "read_pretrained",
    "refuse_encoder",
    "shapes_in",
    "sizes_in",
    "vocabulary",
]

SIZES = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"),
    "vocab_size": ("vocab_size",),
}
"""Names of model sizes: those of the model section, and those of Hugging Face's architectures."""
CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Suffixes of the names of causal language models."""
MASKED = "ForMaskedLM"
"""Suffix of the names of encoders with a head for masked tokens."""
_BUFFERS = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq", ".position_ids")
"""Suffixes of tensors in older folders that aren't weights."""
_OTHER_HEADS = (".pooler.", ".seq_relationship.")
"""Parts of the names of weights in an encoder's folder that its head for masked tokens doesn't use."""
_HEADS = ("lm_head.weight", "embed_out.weight")
"""Names of the output head."""
_INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Keys of ``config.json`` that don't affect the model."""
_BLOCK_BYTES, _BLOCKS = 4096, 64


@dataclass(frozen=True)
class PretrainedModel:
    """A language model in ``folder``, described by its files without reading the values of its weights."""

    folder: Path
    config: dict[str, Any]
    """``config.json``."""
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the weights, by name."""
    files: list[Path]
    """Paths of the weight files."""

    def sizes(self) -> dict[str, int]:
        """Return the sizes in ``config.json``, by the names in ``SIZES``, with the vocabulary without padding."""
        sizes, vocab_size = sizes_in(self.config), vocabulary(self.folder)
        return sizes if vocab_size is None else {**sizes, "vocab_size": vocab_size}

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the trained weights, without buffers and other heads."""
        unused = _OTHER_HEADS if is_encoder(self.config) else ()
        return {
            name: shape
            for name, shape in self.shapes.items()
            if not name.endswith(_BUFFERS) and not any(part in name for part in unused)
        }

    def check_inner_size(self) -> None:
        """Raise ConfigError if ``n_inner``, the width of a GPT-2's MLP, isn't 1 or more."""
        inner = self.config.get("n_inner")
        if inner is not None and (type(inner) is not int or inner < 1):
            raise ConfigError(
                f"{self.folder}: n_inner in its config.json: {shown(inner)} is not a width; give 1 or more"
            )

    def parameter_count(self) -> int:
        """Return the number of trained parameters, a tied head counted once."""
        return sum(math.prod(shape) for shape in self.weights.values())

    @property
    def learned_positions(self) -> str | None:
        """The name of the embedding of positions, None if positions aren't learned."""
        parts = ("wpe.", "embed_positions", "position_embed")
        tables = (name for name, shape in self.weights.items() if len(shape) == 2)
        return next((name for name in tables if any(part in name for part in parts)), None)

    def looked_up_count(self) -> int:
        """Return the parameters of a word embedding that isn't tied to the head, 0 if it is tied."""
        vocab_size, hidden_size = self.config.get("vocab_size"), self.sizes().get("hidden_size")
        if vocab_size is None or hidden_size is None:
            return 0
        # An untied head is a second weight with the embedding's shape: Llama (32,000 x 4,096) has two, GPT-2 one.
        is_untied = list(self.shapes.values()).count((vocab_size, hidden_size)) > 1
        return int(vocab_size * hidden_size) if is_untied else 0

    @cached_property
    def fingerprint(self) -> str:
        """A digest of architecture and weights that doesn't depend on the path."""
        lasting = json.dumps(lasting_keys(self.config), sort_keys=True)
        digest = hashlib.blake2b(lasting.encode(), digest_size=16)
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                # 64 evenly spaced blocks of 4 KiB, including the end of the file: hashing a 14 GB checkpoint would take
                # minutes at every launch. Training changes every block of the weights.
                for block in range(_BLOCKS):
                    file.seek(max(size - _BLOCK_BYTES, 0) * block // (_BLOCKS - 1))
                    digest.update(file.read(_BLOCK_BYTES))
        return digest.hexdigest()


def read_pretrained(folder: Path) -> PretrainedModel:
    """Read the description of the language model in ``folder`` and check that its weight files are complete.

    Raises CheckpointError, and ConfigError for a model of another type.
    """
    if is_hub_name(folder):
        folder = hub_folder(str(folder))
    newest = model_folder(folder)
    if newest != folder:
        raise ConfigError(
            f"{folder}: is the folder of a run, whose newest checkpoint changes; give one checkpoint, such as {newest}"
        )
    config = read_json(folder / "config.json")
    _check_kind(folder, config)
    model = PretrainedModel(folder, config, shapes_in(folder, config), weight_files(folder))
    model.check_inner_size()
    return model


def shapes_in(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights in ``folder`` by name. Raises CheckpointError for sizes that don't fit them."""
    shapes = dict(shape for path in weight_files(folder) for shape in weight_shapes(path))
    for head in _HEADS if config.get("tie_word_embeddings") is True else ():
        if list(shapes.values()).count(shapes.get(head, ())) > 1:  # a copy of the embedding, which isn't read
            del shapes[head]
    sizes = sizes_in(config)
    for name, value in sizes.items():
        if value < 1:
            raise CheckpointError(f"{folder}: {name} in its config.json: {value} is not a size; copy it again")
    layers = sizes.get("num_layers", 0)
    if layers > len(shapes):
        raise CheckpointError(
            f"{folder}: its config.json has {layers:,} layers, and its files only {len(shapes):,} weights; copy it again"
        )
    return shapes


def lasting_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a ``config.json`` that affect the model."""
    return {key: value for key, value in config.items() if key not in _INCIDENTAL}


def is_plain_gpt2(config: Mapping[str, Any]) -> bool:
    """Return whether our GPT-2 is the architecture of a ``config.json``, for any sizes and activation."""
    is_variant = config.get("add_cross_attention") or config.get("tie_word_embeddings") is False
    return config.get("model_type") == "gpt2" and not is_variant


def sizes_in(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes in a model's configuration, by the names in ``SIZES``."""
    # If a configuration has several of the names, the first is used, because later items of a dict replace earlier ones.
    sizes = {size: config[name] for size, names in SIZES.items() for name in reversed(names) if name in config}
    return {size: value for size, value in sizes.items() if type(value) is int}


def no_size(size: str, config: Mapping[str, Any]) -> str:
    """Return the error message for a ``config`` without ``size``."""
    if "text_config" in config and size != "max_position_embeddings":
        return f"config.json has {size} only in the text_config of a multimodal model; give the folder of a text model"
    names = " or ".join(SIZES[size])
    return f"config.json has no {size} (as {names}); set model.{size} to the model's own"


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Return whether ``config``, a model's ``config.json``, is that of an encoder with a head for masked tokens."""
    return architecture_names(config).endswith(MASKED)


def refuse_encoder(folder: Path, problem: str) -> None:
    """Raise ConfigError with ``problem`` if the model in ``folder`` is an encoder."""
    if is_encoder(config := read_json(folder / "config.json")):
        raise ConfigError(f"{folder}: {architecture_names(config)} is an encoder, trained on masked tokens; {problem}")


def architecture_names(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    return ", ".join(map(str, architectures)) if isinstance(architectures, list) else ""


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    name = architecture_names(config)
    if config.get("is_encoder_decoder"):
        problem = f"{name or 'it'} is an encoder-decoder model"
    elif not name.endswith((*CAUSAL, MASKED)):
        problem = f"its config.json has the architecture {name}" if name else "its config.json has no architecture"
    elif not isinstance(config.get("model_type"), str):
        problem = "its config.json has no model_type"
    else:
        return
    raise ConfigError(
        f"{folder}: {problem}; give a causal language model, such as GPT2LMHeadModel or LlamaForCausalLM, or an encoder, "
        "such as BertForMaskedLM, saved by save_pretrained"
    )


def model_folder(path: Path) -> Path:
    """Return the model folder for ``path``: itself if it has a ``config.json``, or a run's newest complete checkpoint.

    A name on the Hugging Face Hub means its folder in the cache. The files of a checkpoint's model are verified against its
    manifest. Raises CheckpointError.
    """
    folder = hub_folder(str(path)) if is_hub_name(path) else _local_folder(path)
    check_files(folder)
    return folder


def _local_folder(path: Path) -> Path:
    if not path.is_dir():
        problem = (
            "is a file; give the folder it is in" if path.exists() else "there is no such folder; give one that exists"
        )
        raise CheckpointError(f"{path}: {problem}: a checkpoint, a run's --save folder or a Hugging Face model")
    # .global_step<N>.tmp is an unfinished checkpoint left by a kill, which may have a config.json.
    if (path / MANIFEST).exists() or path.name.lstrip(".").startswith(CHECKPOINT_PREFIX):
        if problem := damage(read_checkpoint(path), shards=False):
            raise CheckpointError(f"{problem}; give another checkpoint, or restore this one from a copy")
        return path
    if (path / "config.json").is_file():
        return path
    return _newest_checkpoint(path)


def _newest_checkpoint(run: Path) -> Path:
    rollbacks = read_rollbacks(run)
    unusable = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            checkpoint = read_checkpoint(folder)
        except CheckpointError as error:
            unusable.append(str(error))
            continue
        if rollbacks is not None and not checkpoint.includes_rollbacks(rollbacks):
            unusable.append(f"{folder}: contains steps that a rollback discarded")
        elif problem := damage(checkpoint, shards=False):
            unusable.append(problem)
            if global_rank() == 0:
                print(f"warning: skipping an unusable checkpoint: {problem}", file=sys.stderr)
        else:
            return folder
    if unusable:
        raise CheckpointError(f"{run}: has no complete checkpoint; the newest of {len(unusable)}: {unusable[0]}")
    raise CheckpointError(
        f"{run}: has neither a config.json nor checkpoints {CHECKPOINT_PREFIX}<N>; give a checkpoint, a run's --save folder "
        "that has one, or a Hugging Face model's folder"
    )


def vocabulary(folder: Path) -> int | None:
    """Return the vocabulary size of the model in ``folder``, without the padding rows of this package's checkpoints.

    None if no file has it. Raises CheckpointError, ConfigError.
    """
    if (folder / MANIFEST).exists():
        vocab_size = read_checkpoint(folder).run.get("model.vocab_size")
        if isinstance(vocab_size, int):
            return vocab_size
    vocab_size = read_json(folder / "config.json").get("vocab_size")
    return vocab_size if isinstance(vocab_size, int) else None
