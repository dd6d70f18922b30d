"""Find the input files of a corpus: text, JSON lines, tables, and folders of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import DataError, printable
from seqlen_curriculum.run_folder.own_files import is_lfs_pointer

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
PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_KNOWN = f"{', '.join(SUFFIXES)} (text and JSON also as {', '.join(PACKED_SUFFIXES)})"
_UNFINISHED = (".crdownload", ".part", ".partial", ".download", ".incomplete", ".aria2", ".tmp")
_COPIES = (".bak", ".orig", ".old", ".swp", ".swo")
_OTHER_PACKINGS = (".lz4", ".zip", ".7z", ".rar", ".br", ".z", ".lzma", ".lzo", ".zstd", ".tar", ".tgz", ".sz")
_LISTED = 5  # files of each kind; the others are only counted
_EDGE_BYTES = 2**16
_DIGITS = re.compile(r"([0-9]+)")


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
    seen: dict[str, Path] = {}
    for path in files:
        other = seen.setdefault(os.path.realpath(path), path)
        if other is not path:
            also = "" if other == path else f", also as {other}"
            raise DataError(f"{path}: given twice{also}; give each file once, or only its folder")
        if is_lfs_pointer(path):
            raise DataError(f"{path}: is a pointer of Git LFS, not the file itself; run git lfs pull there")
    return files


def _files_in(folder: Path, excluded: set[str]) -> list[Path]:
    files, left_out = [], []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink()):
        # A preparation that was interrupted keeps its work in PREFIX.partial/corpus.*.part.
        is_own = path.parent.suffix == ".partial" and path.name.startswith("corpus.")
        if is_own or os.path.realpath(path) in excluded:
            continue
        if not path.exists() and plain_suffix(path) in SUFFIXES:
            left_out.append(f"{path}: a link to a file that does not exist; left out")
        elif not path.is_file():
            continue
        elif problem := _no_text(path.relative_to(folder)):
            left_out.append(f"{path}: {problem}; left out")
        elif plain_suffix(path) in SUFFIXES and _is_content(path):
            files.append(path)
    _warn(left_out)
    _warn(_order_problems(files))
    _warn(_copies(files))
    if not files:
        raise DataError(f"{folder}: this folder has no file with a known suffix; known are {_KNOWN}")
    return files


def _no_text(path: Path) -> str:
    """Return why a file of a folder, which may look like text, is not read; empty if it is read or has another suffix."""
    name = path.name
    stem, suffix = os.path.splitext(name.lower())
    is_inner_known = plain_suffix(Path(stem)) in SUFFIXES
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return "hidden" if plain_suffix(path) in SUFFIXES else ""
    if name.endswith("~") or name.startswith("~$") or (name.startswith("#") and name.endswith("#")):
        return "an editor's copy" if plain_suffix(Path(name.strip("~#"))) in SUFFIXES else ""
    if suffix in _COPIES and is_inner_known:
        return "an editor's copy"
    if suffix in _UNFINISHED:
        return "an unfinished download or write" if is_inner_known or suffix == ".crdownload" else ""
    if suffix in _OTHER_PACKINGS and (is_inner_known or suffix in (".zip", ".7z", ".rar", ".tgz", ".tar")):
        return f"{suffix} can't be read here; unpack it, or pack each file as {' or '.join(PACKED_SUFFIXES)}"
    return ""


def _order_problems(files: Sequence[Path]) -> Iterator[str]:
    """Yield a message for the first number that is out of order: by characters, part10 comes before part2."""
    for path, following in pairwise(files):
        if path.parent == following.parent and _natural(path) > _natural(following):
            yield (
                f"{path.parent}: files are read in the order of the characters in their names, {path.name} before "
                f"{following.name}; write the numbers with leading zeros, or give the files in another order"
            )
            return


def _natural(path: Path) -> list[Any]:
    """Return the parts of the name as a key by which part2 comes before part10: texts and numbers in turn."""
    return [int(part) if place % 2 else part for place, part in enumerate(_DIGITS.split(path.name))]


def _copies(files: Sequence[Path]) -> Iterator[str]:
    """Yield a message for each file that seems to be a copy of another: by name, or by size, beginning and end."""
    by_name: dict[Path, Path] = {}
    by_size: dict[int, list[Path]] = {}
    for path in files:
        plain = path.with_suffix("") if path.suffix.lower() in PACKED_SUFFIXES else path
        if plain in by_name:
            yield f"{path}: {by_name[plain].name} in the same folder seems to be the same text; both are read"
        by_name.setdefault(plain, path)
        by_size.setdefault(path.stat().st_size, []).append(path)
    for size, alike in by_size.items():
        first: dict[bytes, Path] = {}
        for path in alike if size and len(alike) > 1 else ():
            other = first.setdefault(_edges(path, size), path)
            if other is not path:
                yield f"{path}: has the size, the beginning and the end of {other} and seems to be a copy; both are read"


def _edges(path: Path, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            start = file.read(_EDGE_BYTES)
            file.seek(max(size - _EDGE_BYTES, 0))
            return hashlib.blake2b(start + file.read(_EDGE_BYTES)).digest()
    except OSError:  # reported when the file is read
        return str(path).encode()


def _warn(messages: Iterable[str]) -> None:
    listed = list(messages)
    for message in listed[:_LISTED]:
        print(f"warning: {printable(message)}", file=sys.stderr)
    if len(listed) > _LISTED:
        print(f"warning: and {len(listed) - _LISTED:,} files more like these", file=sys.stderr)


def _known_file(path: Path) -> Path:
    if not path.is_file():
        problem = "neither a file nor a folder" if path.exists() else "no such file or folder"
        raise DataError(f"{path}: {problem}; check the path")
    if plain_suffix(path) not in SUFFIXES:
        fix = _no_text(Path(path.name)) or f"rename it to one of {_KNOWN}"
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; {fix}")
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
