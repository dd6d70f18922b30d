"""A corpus in the making, ``PREFIX.partial/``: what a killed process finished of it is continued by the next.

The journal says how far the other files are good: its first line holds what decides the corpus, each further line the
progress after a shard, written when all before it is on the disk.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from numpy.typing import ArrayLike

from seqlen_curriculum.data.writer import TokenFiles, publish
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.files import replace_text, try_lock
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["Partial", "Progress", "publish_finished"]

SHARD_BYTES = 2**25  # 32 MiB of text, some seconds of work: what a kill costs at most
_MOVED = (".bin", ".tokenizer.json", ".json", ".idx")  # the .idx last: a pair with an .idx is complete
_FINISHED = {"finished": True}
_OURS = re.compile(r"lock|journal|\.?corpus\..*\.part(\.\d+\.tmp)?")


@dataclass
class Progress:
    """How far a corpus is; equal for the same inputs, however often the work was interrupted."""

    batches: int = 0
    """Batches of the reader that are done."""
    text_bytes: int = 0
    num_tokens: int = 0
    num_documents: int = 0
    open_tokens: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """How often each kind of problem was met."""


class Partial:
    """Context manager of ``PREFIX.partial``, which one process at a time can hold.

    ``facts`` decide the corpus: a partial of others is discarded, and so is one that left out what ``stops_at`` refuses
    now. An exception leaves the folder for the next try, unless it holds nothing of worth yet. Raises ``DataError``
    while another process holds it, and for a disk that can't be written.
    """

    def __init__(self, prefix: str, facts: Mapping[str, Any], stops_at: Callable[[str], bool]) -> None:
        self.prefix = prefix
        self.folder = Path(prefix + ".partial")
        self.progress = Progress()
        self._header = json.loads(json.dumps(facts))
        self._stops_at = stops_at
        self._files: TokenFiles | None = None
        self._saved_bytes = 0

    def __enter__(self) -> Partial:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
            self._begin()
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return self

    def _begin(self) -> None:
        journal, good_bytes = _journal(self.folder)
        if self._continues(journal):
            os.truncate(self.folder / "journal", good_bytes)
            self.progress = Progress(**journal[-1]) if len(journal) > 1 else self.progress
            done = self.progress
            _say(f"continuing {self.folder}: {done.num_documents:,} documents, {done.num_tokens:,} tokens are done")
        else:
            if journal:
                _say(f"discarding {self.folder}: it is of other inputs or settings")
            _clear(self.folder)
            self._log(self._header)

    def _continues(self, journal: list[dict[str, Any]]) -> bool:
        if not journal or journal[0] != self._header:
            return False
        return len(journal) == 1 or not any(map(self._stops_at, journal[-1]["left_out"]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._files is not None:
            self._files.close()
        # What was trained is kept too, but not for inputs that hold no text.
        if kind is None or (len(_journal(self.folder)[0]) < 2 and (self.trained() is None or kind is DataError)):
            _remove(self.folder)
        else:
            _say(f"{self.folder} keeps what is done: the same command continues")
        self._lock.close()
        if isinstance(error, OSError):
            raise _unwritable(self.folder, error) from error

    def trained(self) -> str | None:
        """The tokenizer that was trained for this corpus, if that is done."""
        path = Path(self._part(".trained"))
        return path.read_text("utf-8") if path.exists() else None

    def keep_trained(self, tokenizer_json: str) -> None:
        """Keep a trained tokenizer for the next try."""
        replace_text(Path(self._part(".trained")), tokenizer_json)

    def open(self, vocab_size: int) -> None:
        """The tokens up to ``progress``, to go on with by ``add``."""
        now = self.progress
        counts = (now.num_tokens, now.num_documents, now.open_tokens)
        self._files = TokenFiles(self._part(".bin"), self._part(".lengths"), vocab_size, *counts)
        self._saved_bytes = now.text_bytes

    def add(self, tokens: ArrayLike, ends: IntArray, text_bytes: int, left_out: Mapping[str, int]) -> None:
        """Append what one batch gave, see ``TokenFiles.add_tokens``; after a shard it is there for the next try."""
        assert self._files is not None
        now, files = self.progress, self._files
        files.add_tokens(tokens, ends)
        now.batches += 1
        now.text_bytes += text_bytes
        for kind, count in left_out.items():
            now.left_out[kind] = now.left_out.get(kind, 0) + count
        now.num_tokens, now.num_documents, now.open_tokens = files.num_tokens, files.num_documents, files.open_tokens
        if now.text_bytes - self._saved_bytes >= SHARD_BYTES:
            files.sync()
            self._log(asdict(now))
            self._saved_bytes = now.text_bytes

    def finish(self, tokenizer_json: str, record: Mapping[str, Any]) -> None:
        """Move the whole corpus to its place."""
        assert self._files is not None
        replace_text(Path(self._part(".tokenizer.json")), tokenizer_json)
        replace_text(Path(self._part(".json")), json.dumps(record, indent=2) + "\n")
        self._files.write_index(self._part(".idx"))
        self._log(_FINISHED)
        _publish(self.prefix)

    def _log(self, line: Mapping[str, Any]) -> None:
        with open(self.folder / "journal", "a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _part(self, suffix: str) -> str:
        return _part(self.prefix, suffix)


def publish_finished(prefix: str) -> bool:
    """Move a corpus to its place that a process finished but could not move whole; whether there was one."""
    folder = Path(prefix + ".partial")
    if not folder.exists():
        return False
    try:
        with _locked(folder):
            journal, _ = _journal(folder)
            finished = journal[-1:] == [_FINISHED]
            if finished:
                _publish(prefix)
            if (
                finished or not journal
            ):  # without one nothing in it is of use, as after a kill in the middle of removing it
                _remove(folder)
            return finished
    except OSError as error:
        raise _unwritable(folder, error) from error


def _publish(prefix: str) -> None:
    publish({suffix: _part(prefix, suffix) for suffix in _MOVED}, prefix)


def _part(prefix: str, suffix: str) -> str:
    # No suffix of an input: a folder of inputs may hold this one.
    return os.path.join(prefix + ".partial", f"corpus{suffix}.part")


def _journal(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The good lines of the journal and their bytes: up to one that was being written when its process or machine died."""
    try:
        content = (folder / "journal").read_bytes()
    except OSError:
        return [], 0
    lines: list[dict[str, Any]] = []
    good_bytes = 0
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            break
        lines.append(record)
        good_bytes += len(line)
    return lines, good_bytes


def _clear(folder: Path) -> None:
    """Delete what a partial is made of, the lock excepted. Raises ``DataError`` for anything else in its folder."""
    foreign = [path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name)]
    if foreign:
        raise DataError(
            f"{folder}: is for unfinished corpora, but holds {foreign[0]!r}; move that, or choose another prefix"
        )
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()


def _remove(folder: Path) -> None:
    _clear(folder)
    (folder / "lock").unlink()
    folder.rmdir()


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder}: can't be written ({error.strerror}); free space, move it, or choose another prefix")


def _locked(folder: Path) -> BinaryIO:
    lock = try_lock(folder / "lock")
    if lock is None:
        raise DataError(f"{folder}: another process prepares this corpus; wait for it, or choose another prefix")
    return open(lock, "r+b")  # the caller closes it


def _say(message: str) -> None:
    print(message, file=sys.stderr)
