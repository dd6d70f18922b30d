"""A folder that Hugging Face's models are loaded from: one of our checkpoints, a run's folder, anybody's; without torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.files import read_json
from seqlen_curriculum.run_folder.checkpoint_manifest import MANIFEST, checkpoint_folders, read_checkpoint
from seqlen_curriculum.run_folder.rollbacks import begun_by, read_rollbacks, same_course

__all__ = ["SIZES", "PretrainedModel", "model_folder", "no_size", "read_pretrained", "sizes_in", "vocabulary"]

SIZES = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"),
    "vocab_size": ("vocab_size",),
}
"""Our names of a model's sizes, and those of Hugging Face's models."""
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".inv_freq")
"""Ends of names of what older folders hold beside the weights."""
_INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
_BLOCK_BYTES, _BLOCKS = 4096, 64


@dataclass(frozen=True)
class PretrainedModel:
    """A causal language model in ``folder``: what its files say of it, without its weights' values."""

    folder: Path
    config: dict[str, Any]
    """``config.json``."""
    shapes: dict[str, tuple[int, ...]]
    """Of the weights, by name."""
    files: list[Path]
    """That hold the weights."""

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture, such as ``llama``."""
        return str(self.config["model_type"])

    @property
    def is_plain_gpt2(self) -> bool:
        """Whether it is what ``build_gpt2`` builds, but for its sizes and activation."""
        odd = self.config.get("add_cross_attention") or self.config.get("tie_word_embeddings") is False
        return self.model_type == "gpt2" and not odd

    def sizes(self) -> dict[str, int]:
        """Those of our five sizes that ``config.json`` tells; the vocabulary without padding."""
        told, true = sizes_in(self.config), vocabulary(self.folder)
        return told if true is None else {**told, "vocab_size": true}

    def parameter_count(self) -> int:
        """Trained parameters, a tied head counted once."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if not name.endswith(_BUFFERS))

    def looked_up_count(self) -> int:
        """Parameters of a word embedding that the head does not multiply with; 0 where they are one."""
        table = (self.config.get("vocab_size"), self.sizes().get("hidden_size"))
        return math.prod(table) if list(self.shapes.values()).count(table) > 1 else 0  # type: ignore[arg-type]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of architecture and weights, whatever the path: 64 evenly spaced blocks of each file; constant time."""
        chosen = {key: value for key, value in self.config.items() if key not in _INCIDENTAL}
        digest = hashlib.blake2b(json.dumps(chosen, sort_keys=True).encode(), digest_size=16)
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for block in range(_BLOCKS):
                    file.seek(max(size - _BLOCK_BYTES, 0) * block // (_BLOCKS - 1))
                    digest.update(file.read(_BLOCK_BYTES))
        return digest.hexdigest()


def read_pretrained(folder: Path) -> PretrainedModel:
    """The causal language model in ``folder``, its weights' files verified to be whole. CheckpointError, ConfigError."""
    found = model_folder(folder)
    if found != folder:
        raise ConfigError(f"{folder}: the folder of a run, whose newest checkpoint changes; name one, such as {found}")
    config = read_json(folder / "config.json")
    _check_causal(folder, config)
    files = _weight_files(folder)
    return PretrainedModel(folder, config, dict(shape for path in files for shape in _shapes(path)), files)


def sizes_in(config: Mapping[str, Any]) -> dict[str, int]:
    """Those of our five sizes that a model's configuration tells."""
    found = {size: config[name] for size, names in SIZES.items() for name in reversed(names) if name in config}
    return {size: value for size, value in found.items() if type(value) is int}


def no_size(size: str, config: dict[str, Any]) -> str:
    """Why ``size`` is not known from ``config``, and what to do."""
    if "text_config" in config and size != "max_position_embeddings":
        return f"config.json tells no {size} but in the text_config of a model of several parts; give a text model's folder"
    names = " or ".join(SIZES[size])
    return f"config.json tells no {size} (as {names}); set model.{size}, the model's own"


def _check_causal(folder: Path, config: dict[str, Any]) -> None:
    names = config.get("architectures")
    told = ", ".join(map(str, names)) if isinstance(names, list) and names else ""
    kind = "" if told.endswith(_CAUSAL) else f"its config.json names the architecture {told or 'of no model'}"
    if config.get("is_encoder_decoder"):
        kind = f"{told or 'it'} is an encoder with a decoder"
    if kind or not isinstance(config.get("model_type"), str):
        raise ConfigError(
            f"{folder}: {kind or 'its config.json has no model_type'}; give a causal language model, as GPT2LMHeadModel or "
            "LlamaForCausalLM, saved by save_pretrained"
        )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(
            f"{index}: has no weight_map of names to files; save the model again with save_pretrained"
        )
    return [folder / name for name in sorted(set(places.values()))]


def _shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(path, framework="np") as weights:
            yield from [(name, tuple(weights.get_slice(name).get_shape())) for name in weights.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: can't be read as safetensors ({error}); save the model again with save_pretrained"
        ) from error


def model_folder(path: Path) -> Path:
    """The folder with a ``config.json`` that ``path`` means: itself, or a run's newest complete checkpoint.

    A checkpoint is verified against its manifest. Raises CheckpointError.
    """
    if not path.is_dir():
        state = (
            "is a file; give the folder it lies in"
            if path.exists()
            else "there is no such folder; give one that exists"
        )
        raise CheckpointError(f"{path}: {state}: a checkpoint, a run's --save folder or a Hugging Face model")
    if (path / MANIFEST).exists() or path.name.lstrip(".").startswith("global_step"):
        read_checkpoint(path)
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
        if rollbacks is None or same_course(checkpoint.rollbacks, begun_by(rollbacks, checkpoint.step)):
            return folder
        unusable.append(f"{folder}: belongs to the course that a rollback abandoned")
    if unusable:
        raise CheckpointError(f"{run}: has no complete checkpoint; the newest of {len(unusable)}: {unusable[0]}")
    raise CheckpointError(
        f"{run}: has neither a config.json nor checkpoints global_step<N>; give a checkpoint, a run's --save folder that "
        "has one, or a Hugging Face model's folder"
    )


def vocabulary(folder: Path) -> int | None:
    """Token ids of the model in ``folder``, without the rows that our checkpoints add; None where nothing tells.

    Raises CheckpointError, ConfigError.
    """
    if (folder / MANIFEST).exists():
        size = read_checkpoint(folder).run.get("model.vocab_size")
        if isinstance(size, int):
            return size
    size = read_json(folder / "config.json").get("vocab_size")
    return size if isinstance(size, int) else None
