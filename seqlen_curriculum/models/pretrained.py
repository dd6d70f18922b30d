"""Trained models, from checkpoints, runs, Hugging Face folders and the Hub.

Nothing of a folder is run: ``trust_remote_code`` is False, so transformers never asks, and pickles are read weights-only.
"""

from __future__ import annotations

import copy
import errno
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from seqlen_curriculum.config.rope import older_rope_keys
from seqlen_curriculum.errors import CheckpointError, SeqlenCurriculumError
from seqlen_curriculum.files import follow_umask, read_json
from seqlen_curriculum.run_folder.model_folder import is_encoder, model_folder, shapes_in, vocabulary
from seqlen_curriculum.strict_json import shown

__all__ = [
    "add_older_names",
    "as_saved",
    "drop_code",
    "load_model",
    "quiet",
    "read_config",
    "reason",
    "replace_invalid_generation_config",
    "save_configs",
    "save_pretrained",
    "save_weights",
    "set_end_of_text",
]


def load_model(path: Path, dtype: torch.dtype | None = torch.float32, padding: bool = False, config: Any = None) -> Any:
    """Load the ``AutoModelForCausalLM``, or ``AutoModelForMaskedLM``, of ``model_folder(path)`` on the CPU, in eval mode.

    Padding rows of the vocabulary are removed unless ``padding``. The default ``dtype`` is float32 for any saved dtype: it
    represents every saved value exactly, and sums of logits need its precision. None keeps the saved one. ``config``
    replaces transformers' configuration in the folder. Raises CheckpointError.
    """
    folder = model_folder(path)
    encoder = is_encoder(read_json(folder / "config.json"))
    try:
        config = config or read_config(folder)
        with quiet():
            model, loading = (AutoModelForMaskedLM if encoder else AutoModelForCausalLM).from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                output_loading_info=True,
            )
    except SeqlenCurriculumError:
        raise
    except Exception as error:  # damaged files make the libraries raise almost anything
        kind = "an encoder" if encoder else "a causal language model"
        raise CheckpointError(f"{folder}: can't be loaded as {kind} ({reason(error)})") from error
    # transformers only warns about missing weights and initialises them randomly.
    lost = sorted({*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])})
    if lost:
        other = sorted(
            loading["unexpected_keys"]
        )  # "module." of DDP and "_orig_mod." of torch.compile precede each name
        beside = f", and its files have others, such as {shown(other[0])[1:-1]}" if other else ""
        raise CheckpointError(
            f"{folder}: {len(lost)} of the model's weights are missing, such as {lost[0]}{beside}; "
            "give a complete model with a head"
        )
    size = vocabulary(folder)
    if not padding and size is not None and size < model.get_input_embeddings().num_embeddings:
        with quiet():
            model.resize_token_embeddings(size)
    if not encoder:
        _check_token_ids(folder, model.generation_config)
        replace_invalid_generation_config(model)
    drop_code(model.config)
    return model.eval()


def _check_token_ids(folder: Path, generation_config: Any) -> None:
    """Raise CheckpointError for a token in ``generation_config.json`` that is not an id, nor a list of ids."""
    for name, value in generation_config.to_dict().items():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and value is not None and not all(type(number) is int for number in ids):
            raise CheckpointError(
                f"{folder}: {name} in its generation_config.json: {shown(value)} is not the id of a token"
            )


def reason(error: Exception) -> str:
    """Return the type and the first line of an error of another library."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def read_config(folder: Path) -> Any:
    """Return transformers' configuration of the model in ``folder``, without references to code.

    Raises CheckpointError if it describes far more parameters than the weights have, before memory is allocated for them.
    """
    with quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    drop_code(config)
    shapes = shapes_in(folder, config.to_dict())
    with torch.device("meta"), quiet():
        kind = AutoModelForMaskedLM if is_encoder(config.to_dict()) else AutoModelForCausalLM
        model = kind.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)
    described, stored = model.num_parameters(), sum(map(math.prod, shapes.values()))
    # A few missing weights are reported by name, after loading. Quantized weights are packed, up to 16 in one element.
    if described > stored * (16 if hasattr(config, "quantization_config") else 2):
        raise CheckpointError(
            f"{folder}: its config.json describes {described:,} parameters, and its files have {stored:,}; copy it again"
        )
    return config


def drop_code(config: Any) -> None:
    """Remove the references to Python files of the folder, which aren't loaded and must not reach a saved model."""
    for name in ("auto_map", "custom_pipelines"):
        if hasattr(config, name):
            delattr(config, name)


def set_end_of_text(lm: Any, end: int | None) -> None:
    """Set the token that ends a text in the configurations of transformers' ``lm`` to the id ``end``, unless it is one.

    A begin or an end that is missing or outside the vocabulary is replaced too: GPT2Config's default is 50256, so with a
    vocabulary of 8,192 tokens no text would end before its limit.
    """
    for config in (lm.config, getattr(lm, "generation_config", None)):
        if config is None:
            continue
        ends = config.eos_token_id
        if end is not None and end not in (ends if isinstance(ends, list) else [ends]):
            config.eos_token_id = end
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(config, name, None)
            if token is None or (isinstance(token, int) and token >= lm.config.vocab_size):
                setattr(config, name, end)


def save_weights(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write ``weights`` as safetensors for transformers, with file modes that follow the umask."""
    with _as_os_error():
        save_file(dict(weights), path, metadata={"format": "pt"})
    follow_umask(path)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Raise OSError for the error by which safetensors reports a full disk."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error


def save_pretrained(model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write transformers' ``model``, or ``weights`` instead of its own, to ``folder``, with modes that follow the umask."""
    with quiet(), _as_os_error():
        model.save_pretrained(folder, state_dict=weights)
    add_older_names(folder)
    for path in folder.glob("*.safetensors"):
        follow_umask(path)


def as_saved(lm: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``weights`` of transformers' ``lm`` under the names, and in the layout, of the folders that it saves.

    Some differ from those of its parameters: GPT-NeoX saves ``lm_head.weight`` as ``embed_out.weight``.
    """
    saved: dict[str, torch.Tensor] = revert_weight_conversion(lm, dict(weights))
    return saved


def save_configs(lm: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the ``config.json`` of transformers' ``lm`` for weights of ``dtype``, and its generation config."""
    config = copy.deepcopy(lm.config)
    config.architectures, config.dtype = [type(lm).__name__], dtype
    with quiet():
        config.save_pretrained(folder)
        if lm.generation_config is not None:
            lm.generation_config.save_pretrained(folder)
    add_older_names(folder)


def add_older_names(folder: Path) -> None:
    """Add the names of transformers 4 to the ``config.json`` in ``folder``, if transformers 5 reads the same from both.

    transformers 4 doesn't know ``rope_parameters``: without ``rope_theta`` it would compute other logits without an error.
    """
    path = folder / "config.json"
    written = read_json(path)
    config = {**_older_names(written), **written}
    if config == written:
        return
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with quiet():
        again = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()
    if any(again[key] != value for key, value in written.items() if key in ("rope_parameters", "dtype")):
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {"torch_dtype": config["dtype"]} if config.get("dtype") else {}
    if "num_local_experts" in config:
        names["num_experts"] = config["num_local_experts"]
    return {**names, **older_rope_keys(config)}


def replace_invalid_generation_config(model: Any) -> None:
    """Replace an inconsistent ``generation_config.json`` by defaults.

    transformers loads such a file, for example ``temperature`` without ``do_sample``, but refuses to save it.
    """
    with quiet():
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            model.generation_config = GenerationConfig.from_model_config(model.config)


@contextmanager
def quiet() -> Iterator[None]:
    """Disable the progress bars and warnings of transformers. Errors are raised as usual."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
