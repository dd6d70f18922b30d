"""Find the input files of a corpus: text, JSON lines, tables, and folders of them."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from seqlen_curriculum.errors import DataError

__all__ = [
    "JSON_SUFFIXES",
    "PACKED_SUFFIXES",
    "SUFFIXES",
    "TABLE_SUFFIXES",
    "find_files",
    "plain_suffix",
    "stdlib_files",
]

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (".txt", ".text", ".md", ".py", *JSON_SUFFIXES, *TABLE_SUFFIXES)
PACKED_SUFFIXES = (".gz", ".zst")
_KNOWN = f"{', '.join(SUFFIXES)} (text and JSON also as .gz or .zst)"


def find_files(inputs: Sequence[Path], outputs: Iterable[Path] = ()) -> list[Path]:
    """Return the files of ``inputs`` in order.

    A folder is replaced by its files with a known suffix, sorted, without ``outputs``. From a folder written by Hugging
    Face's ``save_to_disk`` only the data files are used. Raises ``DataError`` for a missing path, an unknown suffix, a
    folder without files, a dataset of several splits, and a file given twice.
    """
    # Compared after resolving links, so that two names of one file are found.
    excluded = {os.path.realpath(path) for path in outputs}
    files: list[Path] = []
    for path in inputs:
        files += _files_in(path, excluded) if path.is_dir() else [_known_file(path)]
    seen: set[str] = set()
    for path in files:
        real = os.path.realpath(path)
        if real in seen:
            raise DataError(f"{path}: given twice; give each file once, or only its folder")
        seen.add(real)
    return files


def _files_in(folder: Path, excluded: set[str]) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if plain_suffix(path) in SUFFIXES and path.is_file())
    files = [path for path in files if os.path.realpath(path) not in excluded and _is_content(path)]
    if not files:
        raise DataError(f"{folder}: this folder has no file with a known suffix; known are {_KNOWN}")
    return files


def _known_file(path: Path) -> Path:
    if not path.is_file():
        problem = "neither a file nor a folder" if path.exists() else "no such file or folder"
        raise DataError(f"{path}: {problem}; check the path")
    if plain_suffix(path) not in SUFFIXES:
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; rename it to one of {_KNOWN}")
    return path


def _is_content(path: Path) -> bool:
    """Return false for files that ``save_to_disk`` and its caches write beside the data of a dataset."""
    if path.name == "dataset_dict.json":
        raise DataError(
            f"{path.parent}: a dataset of several splits; give one of its folders, as in {path.parent}/train"
        )
    state = path.with_name("state.json")
    if not path.with_name("dataset_info.json").exists() or not state.exists():
        return True
    try:
        return path.name in {data["filename"] for data in json.loads(state.read_bytes())["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{state}: not in the format of save_to_disk; save the dataset again, or give its files"
        ) from None


def stdlib_files() -> list[Path]:
    """Return the sorted ``.py`` files of the running Python, without installed packages and files that aren't UTF-8."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    files = []
    for path in sorted(root.rglob("*.py")):
        if path.is_file() and not left_out & set(path.relative_to(root).parts):
            with suppress(UnicodeDecodeError):  # Python's own test data in other encodings
                path.read_bytes().decode()
                files.append(path)
    return files


def plain_suffix(path: Path) -> str:
    """Return the suffix in lower case, without a compression suffix: ``.jsonl`` for ``a.jsonl.gz``."""
    stem, suffix = os.path.splitext(path.name.lower())
    inner = os.path.splitext(stem)[1]
    return inner if suffix in PACKED_SUFFIXES and inner not in TABLE_SUFFIXES else suffix
