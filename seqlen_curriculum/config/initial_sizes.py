"""Fill in the sizes of a ``model`` section from the architecture that ``hf_checkpoint`` or ``hf_config`` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from seqlen_curriculum.config.hf_config import config_problems, read_hf_config
from seqlen_curriculum.config.rope import with_more_positions
from seqlen_curriculum.errors import CheckpointError, SeqlenCurriculumError
from seqlen_curriculum.run_folder.model_folder import SIZES, no_size, read_pretrained, sizes_in
from seqlen_curriculum.strict_json import shown

__all__ = ["raise_first", "sizes_of_config", "sizes_of_folder"]


def sizes_of_folder(data: dict[str, Any]) -> dict[str, Any]:
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
    sizes = with_more_positions(data, sizes)
    return _with_sizes(data, "hf_checkpoint", path, pretrained.config, sizes)


def sizes_of_config(data: dict[str, Any]) -> dict[str, Any]:
    """Return the section with the object of ``hf_config`` and its sizes. Raises ValueError if it makes no model."""
    value = data["hf_config"]
    others = [key for key in ("preset", "hf_checkpoint") if data.get(key) is not None]
    if others:
        raise ValueError(f"hf_config and {others[0]} each give an architecture; remove one of them")
    if not isinstance(value, (str, dict)):
        raise ValueError(f"hf_config: {shown(value)} is neither a path nor an object; write the path of a config.json")
    where = value if isinstance(value, str) else ""
    try:
        config = read_hf_config(value) if isinstance(value, str) else value
    except SeqlenCurriculumError as error:
        raise ValueError(f"hf_config: {error}") from error
    raise_first(f"hf_config {where}".rstrip(), config_problems(config))
    return {**_with_sizes(data, "hf_config", where, config, sizes_in(config)), "hf_config": config}


def raise_first(where: str, problems: Iterator[str]) -> None:
    """Raise ValueError with the first of ``problems``, which are in ``where``."""
    for problem in problems:
        raise ValueError(f"{where}: {problem}")


def _with_sizes(
    data: dict[str, Any], key: str, path: str, config: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Return the section with ``sizes`` of ``config``, which is in ``path``, or in the section itself."""
    where = f"{key} {path}".rstrip()
    # A size that config.json lacks may be given in the section. A size that both have must be equal.
    missing = [size for size in SIZES if size not in sizes and size not in data]
    if missing:
        raise ValueError(f"{key}: {f'{path}: ' if path else ''}{no_size(missing[0], config)}")
    for size, value in sizes.items():
        if data.get(size, value) != value:
            raise ValueError(
                f"{size}: {data[size]} differs from {value} in {where}; remove the size (or the preset that sets it), or "
                f"change {key}"
            )
    return {**data, **sizes}
