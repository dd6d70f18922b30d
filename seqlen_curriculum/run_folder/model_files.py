"""The files of a model's folder, which may be a stranger's: only ordinary files in the folder are read, never code."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from seqlen_curriculum.errors import CheckpointError
from seqlen_curriculum.files import read_json
from seqlen_curriculum.run_folder.own_files import check_own, is_lfs_pointer, wrong_name
from seqlen_curriculum.strict_json import shown

__all__ = [
    "TOKENIZER_FILES",
    "check_files",
    "code_in",
    "dropout_problem",
    "ordinary_file",
    "weight_files",
    "weight_shapes",
]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "chat_template.jinja",
)
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of weights, in the order in which transformers looks for them. An index maps weights to several files."""


def check_files(folder: Path) -> None:
    """Raise CheckpointError for a file of the model or its tokenizer that isn't an ordinary file in ``folder``.

    The same for a configuration that names code or weights elsewhere, or has a dropout that is not a probability.
    """
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        if os.path.lexists(folder / name):
            ordinary_file(folder, name)
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")  # transformers passes over a damaged one in silence
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if kernel := code_in(config):
        raise CheckpointError(
            f"{folder}: its config.json names code to download, {kernel}; remove the key to use the model's own code"
        )
    if problem := dropout_problem(config):
        raise CheckpointError(f"{folder}: its config.json: {problem}")
    if os.path.lexists(folder / "adapter_config.json"):
        raise CheckpointError(
            f"{folder}: has an adapter_config.json, which names another model to load; merge the adapter into its model "
            "(merge_and_unload of PEFT), or remove the file"
        )


def code_in(config: Mapping[str, Any]) -> str:
    """Return the key and the value that names a kernel on the Hub, which transformers would run. Empty without one."""
    for key, value in config.items():
        if isinstance(value, dict) and (found := code_in(value)):
            return f"{key}.{found}"
        if key.endswith("_implementation") and "/" in str(value):
            return f"{key} {value!r}"[:200]
    return ""


def dropout_problem(config: Mapping[str, Any]) -> str:
    """Return the first dropout in a model's ``config.json`` that is not a probability, NaN too. Empty without one."""
    for key, value in config.items():
        is_dropout = key.endswith(("dropout", "_pdrop", "dropout_prob"))
        if is_dropout and value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
            return f"{key}: {shown(value)} is not a probability; give one from 0 to 1"
    return ""


def ordinary_file(folder: Path, name: str) -> Path:
    """Return the path of the file ``name`` in ``folder``.

    Raises CheckpointError if it leads out of the folder, by its name or as a link, or isn't an ordinary file.
    """
    if reason := wrong_name(name):
        raise CheckpointError(f"{folder}: {reason}; save the model again with save_pretrained")
    check_own(folder / name)
    if not (folder / name).exists():
        raise CheckpointError(f"{folder / name}: there is no such file; copy the folder again")
    if is_lfs_pointer(folder / name):
        raise CheckpointError(f"{folder / name}: is a pointer of Git LFS, not the file itself; run git lfs pull there")
    return folder / name


def weight_files(folder: Path) -> list[Path]:
    """Return the paths of the files that hold the model's weights. Raises CheckpointError."""
    explicit = read_json(folder / "config.json").get("transformers_weights")  # an option of transformers 5
    names = [explicit] if isinstance(explicit, str) else list(_WEIGHTS)
    name = next((name for name in names if os.path.lexists(folder / name)), None)
    if name is None:
        raise CheckpointError(
            f"{folder}: has no weights as {' or '.join(_WEIGHTS)}; save the model again with save_pretrained"
        )
    first = ordinary_file(folder, name)
    if not name.endswith(".index.json"):
        return [first]
    suffix = Path(name.removesuffix(".index.json")).suffix
    file_of = read_json(first).get("weight_map")
    if not isinstance(file_of, dict) or not all(
        isinstance(file, str) and file.endswith(suffix) for file in file_of.values()
    ):
        raise CheckpointError(
            f"{first}: has no weight_map of names to {suffix} files; save the model again with save_pretrained"
        )
    return [ordinary_file(folder, file) for file in sorted(set(file_of.values()))]


def weight_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each weight in a file, a tied weight once. Raises CheckpointError."""
    yield from _safetensors_shapes(path) if path.suffix == ".safetensors" else _torch_shapes(path)


def _safetensors_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(path, framework="np") as weights:
            yield from [(name, tuple(weights.get_slice(name).get_shape())) for name in weights.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: can't be read as safetensors ({error}); save the model again with save_pretrained"
        ) from error


def _check_records(path: Path, weights: Mapping[str, Any]) -> None:
    """Raise ValueError for a value that is not a tensor, and a record in a zip file whose size isn't that of its tensor."""
    for name, weight in weights.items():
        if not hasattr(weight, "untyped_storage"):
            raise ValueError(f"{shown(name)} is of type {type(weight).__name__}, not a tensor")
    if not zipfile.is_zipfile(path):
        return
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights.values()}
    with zipfile.ZipFile(path) as records:
        stored = sorted(record.file_size for record in records.infolist() if "/data/" in record.filename)
    if sorted(storages.values()) != stored:
        raise ValueError(f"its tensors need {sum(storages.values()):,} bytes, its records have {sum(stored):,}")


def _torch_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        import torch  # this format is a pickle, which only torch reads without running code
    except ImportError:
        raise CheckpointError(
            f"{path}: this format needs torch; run: pip install torch, or save the model as safetensors"
        ) from None
    try:
        weights: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        _check_records(path, weights)
        seen = set()
        for name, weight in weights.items():
            # A file of safetensors holds a tied weight once. Here both names point to the same memory.
            if (place := (weight.data_ptr(), tuple(weight.shape))) not in seen:
                seen.add(place)
                yield name, tuple(weight.shape)
    except Exception as error:  # a damaged or hostile pickle raises almost anything
        refused = re.search(r"Unsupported \w+: [\w .]+", str(error))
        reason = refused[0] if refused else " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: can't be read as weights ({type(error).__name__}: {reason}); a file of weights holds only tensors; "
            "save the model as safetensors with save_pretrained"
        ) from error
