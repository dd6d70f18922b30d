"""Read a run's file, which may be JSON with comments or the folder of a run, and resolve its paths."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqlen_curriculum.config.data import corpus_prefix
from seqlen_curriculum.errors import CheckpointError, ConfigError
from seqlen_curriculum.fields import flat
from seqlen_curriculum.files import apply_override, read_json
from seqlen_curriculum.launchers import global_rank
from seqlen_curriculum.run_folder import RUN_INFO
from seqlen_curriculum.run_folder.hub import hub_folder, is_hub_name
from seqlen_curriculum.run_folder.own_files import check_own
from seqlen_curriculum.strict_json import shown

__all__ = ["SCHEMA_KEY", "absolute_paths", "folder_of", "is_corpus", "paths_beside", "places", "read_run_file"]

SCHEMA_KEY = "$schema"
"""The key that gives editors the JSON schema of the file. It is not a setting and is removed before checks."""


def read_run_file(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the configuration in a file after applying ``a.b=value`` overrides. Raises ConfigError.

    ``path`` may also be a run's ``run.json`` or its folder. The configuration is then that of the run's newest launch, and
    a note is printed to stderr. Relative paths in ``data.train``, ``data.valid``, ``data.test``, ``model.hf_checkpoint``
    and ``model.hf_config`` are looked up in the current folder first, then in the folder of the file.
    """
    given = Path(path)
    try:
        is_folder = given.is_dir()
    except OSError as error:  # a name of 5,000 characters, or a folder that is closed to this user
        raise ConfigError(f"can't be read ({error.strerror}); give the path of a run's JSON file", str(path)) from error
    file = given / RUN_INFO if is_folder else given
    if is_folder:
        check_own(file, ConfigError)
    if is_folder and not file.is_file():
        raise ConfigError(
            f"a folder without {RUN_INFO}; give the path of a run's JSON file, or a run's folder", str(path)
        )
    raw = read_json(file, comments=True)
    if isinstance(raw.get("config"), dict) and isinstance(raw.get("launches"), list):
        raw = _configuration_of_run(raw, file)
    if is_folder and (function := _named_function(raw)):
        raise ConfigError(
            f"{function[0]}: {shown(function[1])} is a function that this command would import and run, but a run's folder "
            f"may be someone else's; if you trust it, give {file} itself",
            str(path),
        )
    for override in overrides:
        apply_override(raw, override)

    raw = paths_beside(raw, file.parent)
    looked_up = places(file.parent)
    for key, value in _model_paths(raw):
        if len(looked_up) > 1 and not os.path.exists(value):
            _check_hub_name(key, value, looked_up, str(path))
    return raw


def _model_paths(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the keys of the ``model`` section that hold a path or a name on the Hub, with their values."""
    model = raw.get("model")
    found = [(key, model.get(key)) for key in ("hf_checkpoint", "hf_config")] if isinstance(model, Mapping) else []
    return [(key, value) for key, value in found if isinstance(value, str) and value]


def _check_hub_name(key: str, name: str, looked_up: Sequence[str], file: str) -> None:
    """Raise ConfigError unless ``name``, which isn't a path in ``looked_up``, is a model in the cache or on the Hub."""
    reason = ""
    if is_hub_name(name):
        try:
            hub_folder(name, weights=key == "hf_checkpoint")
            return
        except CheckpointError as error:
            reason = f" ({error})"
    raise ConfigError(
        f"model.{key}: no folder {name!r}, neither in {' nor in '.join(looked_up)}, the folder of the run's file; "
        f"give the folder of a model relative to one of them, or an absolute path{reason}",
        file,
    )


def _named_function(raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the key and the import path of a custom schedule's function, None without one."""
    named = (item for item in flat(raw) if item[0].endswith(".function") and isinstance(item[1], str))
    return next(named, None)


def folder_of(path: str | Path) -> Path:
    """Return the folder in which the relative paths of a run's file are looked up second."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _configuration_of_run(info: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the configuration in ``run.json``, without the key that depends on the number of ranks."""
    launches, config = info["launches"], dict(info["config"])
    started = launches[-1].get("started") if launches and isinstance(launches[-1], Mapping) else None
    if global_rank() == 0:
        newest = f"launch {len(launches)}" + (f", started {started}" if started else "")
        print(f"note: {file}: a run's record; using the configuration of {newest}", file=sys.stderr)
    # It was derived for the ranks of that launch. Here it follows from the other two batch keys.
    if {"train_batch_size", "train_micro_batch_size_per_gpu"} <= config.keys():
        config.pop("gradient_accumulation_steps", None)
    return config


def paths_beside(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a copy of the configuration in which paths that exist only in ``folder`` start with it."""

    def in_folder(path: str, exists: Callable[[str], bool]) -> str:
        other = os.path.join(folder, path)
        return other if exists(other) and not exists(path) else path

    return _with_paths(raw, in_folder)


def absolute_paths(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the configuration with absolute paths."""
    # A name on the Hub is no path.
    return _with_paths(
        raw, lambda path, exists: path if exists is not is_corpus and is_hub_name(path) else os.path.abspath(path)
    )


def places(folder: Path | None) -> list[str]:
    """Return the folders in which relative paths are looked up: the current one, then the file's if it differs."""
    return list(dict.fromkeys(os.path.realpath(place) for place in (".", folder or ".")))


def is_corpus(prefix: str) -> bool:
    """Return whether a ``.bin`` or an ``.idx`` file of the corpus exists."""
    return any(os.path.isfile(corpus_prefix(prefix) + suffix) for suffix in (".bin", ".idx"))


def _with_paths(raw: Mapping[str, Any], place: Callable[[str, Callable[[str], bool]], str]) -> dict[str, Any]:
    """Return ``raw`` with each path replaced by ``place(path, exists)``. Values of a wrong type are unchanged."""

    def corpora(value: Any) -> Any:
        if isinstance(value, str):
            return place(value, is_corpus)
        if isinstance(value, (list, tuple)):  # prefixes, or pairs of a weight and a prefix
            return [corpora(item) for item in value]
        return value

    changed, data, model = dict(raw), raw.get("data"), raw.get("model")
    if isinstance(data, Mapping):
        changed["data"] = {**data, **{key: corpora(data[key]) for key in ("train", "valid", "test") if key in data}}
    if isinstance(model, Mapping) and (paths := _model_paths(raw)):
        exists = {"hf_checkpoint": os.path.isdir, "hf_config": os.path.exists}
        changed["model"] = {**model, **{key: place(value, exists[key]) for key, value in paths}}
    return changed
