"""Read a run's file as a user gives it: JSON with comments, or the folder of a run; find the paths named in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.config.data import corpus_prefix
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.files import apply_override, read_json
from seqlen_curriculum.launchers import global_rank
from seqlen_curriculum.run_folder import RUN_INFO

__all__ = ["SCHEMA_KEY", "absolute_paths", "folder_of", "is_corpus", "places", "read_run_file"]

SCHEMA_KEY = "$schema"
"""Names the JSON schema of the file for editors. It is no setting: neither the run nor DeepSpeed gets to see it."""


def read_run_file(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the configuration in a file, changed by ``a.b=value`` overrides. Raises ConfigError.

    ``path`` may also be a run's ``run.json`` or its folder: then it is the configuration of that run's newest launch, and a
    line on stderr says so. Relative paths in the file, ``data.train``, ``data.valid``, ``data.test`` and
    ``model.hf_checkpoint``, are looked up in the current folder first, then in the folder of the file.
    """
    given = Path(path)
    file = given / RUN_INFO if given.is_dir() else given
    if given.is_dir() and not file.is_file():
        raise ConfigError(
            f"a folder without {RUN_INFO}; give the path of a run's JSON file, or a run's folder", str(path)
        )
    raw = read_json(file, comments=True)
    if isinstance(raw.get("config"), dict) and isinstance(raw.get("launches"), list):
        raw = _configuration_of_run(raw, file)
    for override in overrides:
        apply_override(raw, override)

    def beside_the_file(path: str, exists: Callable[[str], bool]) -> str:
        other = os.path.join(file.parent, path)
        return other if exists(other) and not exists(path) else path

    raw = _with_paths(raw, beside_the_file)
    model, looked_up = raw.get("model"), places(file.parent)
    checkpoint = model.get("hf_checkpoint") if isinstance(model, Mapping) else None
    if len(looked_up) > 1 and isinstance(checkpoint, str) and checkpoint and not os.path.exists(checkpoint):
        raise ConfigError(
            f"model.hf_checkpoint: no folder {checkpoint!r}, neither in {' nor in '.join(looked_up)}, the folder of the "
            "run's file; give the folder of a model relative to one of them, or an absolute path",
            str(path),
        )
    return raw


def folder_of(path: str | Path) -> Path:
    """Return the folder in which the relative paths of a run's file are looked up second."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _configuration_of_run(info: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the configuration that ``run.json`` holds, which depends on no number of ranks."""
    launches, config = info["launches"], dict(info["config"])
    started = launches[-1].get("started") if launches and isinstance(launches[-1], Mapping) else None
    if global_rank() == 0:
        newest = f"launch {len(launches)}" + (f", started {started}" if started else "")
        print(f"note: {file}: a run's record; using the configuration of {newest}", file=sys.stderr)
    # It was written for the ranks of that launch. With the other two batch keys it follows from the ranks of this one.
    if {"train_batch_size", "train_micro_batch_size_per_gpu"} <= config.keys():
        config.pop("gradient_accumulation_steps", None)
    return config


def absolute_paths(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration whose paths mean the same in every folder."""
    return _with_paths(raw, lambda path, _: os.path.abspath(path))


def places(folder: Path | None) -> list[str]:
    """Return where relative paths are looked up: the current folder, and the file's where that is another one."""
    return list(dict.fromkeys(os.path.realpath(place) for place in (".", folder or ".")))


def is_corpus(prefix: str) -> bool:
    """Return whether a ``.bin`` or an ``.idx`` file of the corpus exists."""
    return any(os.path.isfile(corpus_prefix(prefix) + suffix) for suffix in (".bin", ".idx"))


def _with_paths(raw: Mapping[str, Any], place: Callable[[str, Callable[[str], bool]], str]) -> dict[str, Any]:
    """Return ``raw`` with ``place(path, exists)`` instead of each path; what isn't of the right type stays as it is."""

    def corpora(value: Any) -> Any:
        if isinstance(value, str):
            return place(value, is_corpus)
        if isinstance(value, (list, tuple)):  # prefixes, or pairs of a weight and a prefix
            return [corpora(item) for item in value]
        return value

    changed, data, model = dict(raw), raw.get("data"), raw.get("model")
    if isinstance(data, Mapping):
        changed["data"] = {**data, **{key: corpora(data[key]) for key in ("train", "valid", "test") if key in data}}
    if isinstance(model, Mapping) and isinstance(model.get("hf_checkpoint"), str) and model["hf_checkpoint"]:
        changed["model"] = {**model, "hf_checkpoint": place(model["hf_checkpoint"], os.path.isdir)}
    return changed
