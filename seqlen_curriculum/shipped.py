"""Find the folders that are installed with the package: configurations and examples."""

from __future__ import annotations

from pathlib import Path

__all__ = ["RUN_SCHEMA", "shipped_configs", "shipped_folder", "shipped_studies"]

RUN_SCHEMA = "run.schema.json"
_STUDIES = "studies"


def shipped_folder(name: str) -> Path:
    """Return the folder ``configs`` or ``examples``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def shipped_configs() -> dict[str, Path]:
    """Return the files of the configurations by name: ``mini/slw_calm`` is ``configs/mini/slw_calm.json``."""
    return {name: path for name, path in _json_files().items() if path.parent.name != _STUDIES}


def shipped_studies() -> dict[str, Path]:
    """Return the files of the studies by name: ``studies/mini`` is ``configs/studies/mini.json``."""
    return {name: path for name, path in _json_files().items() if path.parent.name == _STUDIES}


def _json_files() -> dict[str, Path]:
    folder = shipped_folder("configs")
    paths = sorted(path for path in folder.rglob("*.json") if path.name != RUN_SCHEMA)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
