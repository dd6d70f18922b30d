"""An unfinished corpus, ``PREFIX.partial/``, from which the next process resumes after a kill.

The journal records how much of the other files is valid. Its first line has the facts that determine the corpus. Each
further line has the progress after a shard, and is written when everything before it is on disk.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import ArrayLike

from seqlen_curriculum.data.writer import TokenFiles, publish
from seqlen_curriculum.errors import DataError
from seqlen_curriculum.files import replace_text, try_lock
from seqlen_curriculum.schedule.piecewise import IntArray

__all__ = ["PartialCorpus", "Progress", "publish_finished"]

SHARD_BYTES = 2**25  # 32 MiB of text, a few seconds of work: the most that a kill loses
_MOVED = (".bin", ".tokenizer.json", ".json", ".idx")  # the .idx last: a pair with an .idx is complete
_FINISHED = {"finished": True}
_OWN_FILES = re.compile(r"lock|journal|\.?corpus\..*\.part(\.\d+\.tmp)?")


@dataclass
class Progress:
    """The finished part of a corpus. It doesn't depend on interruptions."""

    batches: int = 0
    """Finished batches of the reader."""
    text_bytes: int = 0
    num_tokens: int = 0
    num_documents: int = 0
    open_tokens: int = 0
    """Tokens at the end that belong to an unfinished document."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of occurrences of each kind of problem."""


class _PartialFolder:
    """The folder ``PREFIX.partial``, its lock, its journal and its parts."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.path = Path(prefix + ".partial")
        self.lock_file: int | None = None

    def part(self, suffix: str) -> Path:
        """Return the path of the unfinished ``PREFIX + suffix``."""
        # The name doesn't have a suffix of input files, so a folder of inputs may contain this one.
        return self.path / f"corpus{suffix}.part"

    @contextmanager
    def explained_errors(self) -> Iterator[None]:
        """Convert an OSError in the block to a ``DataError`` with a fix."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.path}: can't be written ({error.strerror}); free space, move it, or choose another prefix"
            ) from error

    def lock(self) -> None:
        """Lock the folder. Raises ``DataError`` if another process has locked it."""
        self.lock_file = try_lock(self.path / "lock")
        if self.lock_file is None:
            raise DataError(
                f"{self.path}: another process is preparing this corpus; wait for it, or choose another prefix"
            )

    def unlock(self) -> None:
        """Release the lock."""
        if self.lock_file is not None:
            os.close(self.lock_file)
            self.lock_file = None

    def journal(self) -> tuple[list[dict[str, Any]], int]:
        """Return the valid lines of the journal and their size in bytes.

        A crash during a write leaves a partial line or a line of zeros, which is ignored with everything after it.
        """
        try:
            content = (self.path / "journal").read_bytes()
        except OSError:
            return [], 0
        lines: list[dict[str, Any]] = []
        valid_bytes = 0
        for line in content.splitlines(keepends=True):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if not isinstance(record, dict):
                break
            lines.append(record)
            valid_bytes += len(line)
        return lines, valid_bytes

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to the journal and flush it to disk."""
        with open(self.path / "journal", "a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self) -> None:
        """Move the finished corpus to its final path."""
        publish({suffix: str(self.part(suffix)) for suffix in _MOVED}, self.prefix)

    def clear(self) -> None:
        """Delete all files except the lock. Raises ``DataError`` if the folder contains a foreign file."""
        foreign = [path.name for path in self.path.iterdir() if not _OWN_FILES.fullmatch(path.name)]
        if foreign:
            raise DataError(
                f"{self.path}: is for unfinished corpora, but contains {foreign[0]!r}; move it, or choose another prefix"
            )
        for path in self.path.iterdir():
            if path.name != "lock":
                path.unlink()

    def remove(self) -> None:
        """Delete the folder."""
        self.clear()
        (self.path / "lock").unlink()
        self.path.rmdir()


class PartialCorpus:
    """Context manager for ``PREFIX.partial``, used by one process at a time.

    ``facts`` determine the corpus. A partial corpus with other facts is discarded, and so is one that skipped a kind of
    input that ``stops_at`` refuses. After an exception the folder is kept for the next call if it has finished work.
    Raises ``DataError`` while another process uses it, and for a disk that can't be written.
    """

    def __init__(self, prefix: str, facts: Mapping[str, Any], stops_at: Callable[[str], bool]) -> None:
        self.progress = Progress()
        self._folder = _PartialFolder(prefix)
        self._header = json.loads(json.dumps(facts))  # as after a round trip through JSON: tuples become lists
        self._stops_at = stops_at
        self._files: TokenFiles | None = None
        self._saved_bytes = 0

    def __enter__(self) -> PartialCorpus:
        with self._folder.explained_errors():
            self._folder.path.mkdir(parents=True, exist_ok=True)
            self._folder.lock()
            try:
                self._resume_or_clear()
            except BaseException:
                self._folder.unlock()  # __exit__ won't be called
                raise
        return self

    def _resume_or_clear(self) -> None:
        folder = self._folder
        journal, valid_bytes = folder.journal()
        progress = Progress(**journal[-1]) if len(journal) > 1 and journal[0] == self._header else Progress()
        if journal[:1] == [self._header] and not any(map(self._stops_at, progress.left_out)):
            os.truncate(folder.path / "journal", valid_bytes)
            self.progress = progress
            done = f"{progress.num_documents:,} documents, {progress.num_tokens:,} tokens done"
            print(f"resuming {folder.path}: {done}", file=sys.stderr)
            return
        if journal:
            print(f"discarding {folder.path}: it was made from other inputs or settings", file=sys.stderr)
        folder.clear()
        folder.log(self._header)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._files is not None:
            self._files.close()
        # Kept if it has a shard, whose progress is the journal's second line, or a trained tokenizer. After a DataError
        # the inputs will change, and with them the tokenizer, so then a tokenizer alone is not kept.
        has_shard = len(self._folder.journal()[0]) > 1
        has_tokenizer = self.trained() is not None and kind is not DataError
        try:
            if kind is None or not (has_shard or has_tokenizer):
                self._folder.remove()
            else:
                print(f"progress is kept in {self._folder.path}: rerun the same command to resume", file=sys.stderr)
        finally:
            self._folder.unlock()
        if isinstance(error, OSError):
            with self._folder.explained_errors():
                raise error

    def trained(self) -> str | None:
        """Return the tokenizer trained for this corpus, ``None`` before that."""
        path = self._folder.part(".trained")
        return path.read_text("utf-8") if path.exists() else None

    def keep_trained(self, tokenizer_json: str) -> None:
        """Store a trained tokenizer for the next call."""
        replace_text(self._folder.part(".trained"), tokenizer_json)

    def open(self, vocab_size: int) -> None:
        """Open the finished tokens so that ``add`` appends to them."""
        done = self.progress
        counts = (done.num_tokens, done.num_documents, done.open_tokens)
        paths = (str(self._folder.part(".bin")), str(self._folder.part(".lengths")))
        self._files = TokenFiles(*paths, vocab_size, *counts)
        self._saved_bytes = done.text_bytes

    def add(self, tokens: ArrayLike, ends: IntArray, text_bytes: int, left_out: Mapping[str, int]) -> None:
        """Append the result of one batch, see ``TokenFiles.add_tokens``. A full shard is flushed to disk."""
        assert self._files is not None
        done, files = self.progress, self._files
        files.add_tokens(tokens, ends)
        done.batches += 1
        done.text_bytes += text_bytes
        for kind, count in left_out.items():
            done.left_out[kind] = done.left_out.get(kind, 0) + count
        done.num_tokens, done.num_documents, done.open_tokens = files.num_tokens, files.num_documents, files.open_tokens
        if done.text_bytes - self._saved_bytes >= SHARD_BYTES:
            files.sync()  # before the journal, which must not list data that isn't on disk
            self._folder.log(asdict(done))
            self._saved_bytes = done.text_bytes

    def finish(self, tokenizer_json: str, record: Mapping[str, Any]) -> None:
        """Move the finished corpus to its final path."""
        assert self._files is not None
        replace_text(self._folder.part(".tokenizer.json"), tokenizer_json)
        replace_text(self._folder.part(".json"), json.dumps(record, indent=2) + "\n")
        self._files.write_index(str(self._folder.part(".idx")))
        # After this line all parts are complete. If the process is killed while it moves them, the next one moves the rest.
        self._folder.log(_FINISHED)
        self._folder.publish()


def publish_finished(prefix: str) -> bool:
    """Move a corpus that a killed process finished but did not move; return whether there was one."""
    folder = _PartialFolder(prefix)
    if not folder.path.exists():
        return False
    with folder.explained_errors():
        folder.lock()
        try:
            journal, _ = folder.journal()
            finished = journal[-1:] == [_FINISHED]
            if finished:
                folder.publish()
            if finished or not journal:  # a folder without a journal remains from an interrupted removal
                folder.remove()
        finally:
            folder.unlock()
    return finished
