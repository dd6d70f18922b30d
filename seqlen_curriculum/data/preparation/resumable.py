"""An unfinished corpus, ``PREFIX.partial/``: the next process continues what a killed one has done.

The journal says how much of the other files is valid. Its first line holds what decides the corpus. Each further line
holds the progress after a shard, and is written when everything before it is on disk.
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

SHARD_BYTES = 2**25  # 32 MiB of text, some seconds of work: the most that a kill costs
_MOVED = (".bin", ".tokenizer.json", ".json", ".idx")  # the .idx last: a pair with an .idx is complete
_FINISHED = {"finished": True}
_OWN_FILES = re.compile(r"lock|journal|\.?corpus\..*\.part(\.\d+\.tmp)?")


@dataclass
class Progress:
    """How much of a corpus is done; equal for the same inputs, however often the work was interrupted."""

    batches: int = 0
    """Batches of the reader that are done."""
    text_bytes: int = 0
    num_tokens: int = 0
    num_documents: int = 0
    open_tokens: int = 0
    """Tokens at the end whose document has no end yet."""
    left_out: dict[str, int] = field(default_factory=dict)
    """How often each kind of problem occurred."""


class _PartialFolder:
    """The folder ``PREFIX.partial``, its lock, its journal and its parts."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.path = Path(prefix + ".partial")
        self.lock_file: int | None = None

    def part(self, suffix: str) -> Path:
        """Return the path of the unfinished ``PREFIX + suffix``."""
        # The name has no suffix of an input, so a folder of inputs may hold this one.
        return self.path / f"corpus{suffix}.part"

    @contextmanager
    def explained_errors(self) -> Iterator[None]:
        """Turn an OSError of the block into a ``DataError`` that says what to do."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.path}: can't be written ({error.strerror}); free space, move it, or choose another prefix"
            ) from error

    def lock(self) -> None:
        """Keep other processes out. Raises ``DataError`` if one is in."""
        self.lock_file = try_lock(self.path / "lock")
        if self.lock_file is None:
            raise DataError(f"{self.path}: another process prepares this corpus; wait for it, or choose another prefix")

    def unlock(self) -> None:
        """Let other processes in."""
        if self.lock_file is not None:
            os.close(self.lock_file)
            self.lock_file = None

    def journal(self) -> tuple[list[dict[str, Any]], int]:
        """Return the valid lines of the journal and their size in bytes.

        A process or machine that dies while it writes leaves half a line, or a line of zeros: that and what follows
        doesn't count.
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
        """Append a line to the journal; on return it is on disk."""
        with open(self.path / "journal", "a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self) -> None:
        """Move the finished corpus to its place."""
        publish({suffix: str(self.part(suffix)) for suffix in _MOVED}, self.prefix)

    def clear(self) -> None:
        """Delete all files but the lock. Raises ``DataError`` if the folder holds any other file."""
        foreign = [path.name for path in self.path.iterdir() if not _OWN_FILES.fullmatch(path.name)]
        if foreign:
            raise DataError(
                f"{self.path}: is for unfinished corpora, but holds {foreign[0]!r}; move that, or choose another prefix"
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
    """Context manager of ``PREFIX.partial``, which one process at a time can hold.

    ``facts`` decide the corpus. A partial corpus of other facts is discarded, and so is one that left out a kind of input
    that ``stops_at`` refuses. An exception leaves the folder for the next call, unless nothing in it is worth keeping.
    Raises ``DataError`` while another process holds it, and for a disk that can't be written.
    """

    def __init__(self, prefix: str, facts: Mapping[str, Any], stops_at: Callable[[str], bool]) -> None:
        self.progress = Progress()
        self._folder = _PartialFolder(prefix)
        self._header = json.loads(json.dumps(facts))  # as JSON gives it back: tuples become lists
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
                self._folder.unlock()  # no __exit__ follows
                raise
        return self

    def _resume_or_clear(self) -> None:
        folder = self._folder
        journal, valid_bytes = folder.journal()
        progress = Progress(**journal[-1]) if len(journal) > 1 and journal[0] == self._header else Progress()
        if journal[:1] == [self._header] and not any(map(self._stops_at, progress.left_out)):
            os.truncate(folder.path / "journal", valid_bytes)
            self.progress = progress
            done = f"{progress.num_documents:,} documents, {progress.num_tokens:,} tokens are done"
            print(f"continuing {folder.path}: {done}", file=sys.stderr)
            return
        if journal:
            print(f"discarding {folder.path}: it is of other inputs or settings", file=sys.stderr)
        folder.clear()
        folder.log(self._header)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._files is not None:
            self._files.close()
        # Worth keeping: a shard, whose progress is the journal's second line, or a trained tokenizer, except where the
        # inputs are refused (a DataError): they will change, and with them the tokenizer.
        has_shard = len(self._folder.journal()[0]) > 1
        has_tokenizer = self.trained() is not None and kind is not DataError
        try:
            if kind is None or not (has_shard or has_tokenizer):
                self._folder.remove()
            else:
                print(f"{self._folder.path} keeps what is done: rerun the same command to resume", file=sys.stderr)
        finally:
            self._folder.unlock()
        if isinstance(error, OSError):
            with self._folder.explained_errors():
                raise error

    def trained(self) -> str | None:
        """Return the tokenizer that was trained for this corpus, ``None`` until that is done."""
        path = self._folder.part(".trained")
        return path.read_text("utf-8") if path.exists() else None

    def keep_trained(self, tokenizer_json: str) -> None:
        """Keep a trained tokenizer for the next call."""
        replace_text(self._folder.part(".trained"), tokenizer_json)

    def open(self, vocab_size: int) -> None:
        """Open the tokens that are done, so that ``add`` continues them."""
        done = self.progress
        counts = (done.num_tokens, done.num_documents, done.open_tokens)
        paths = (str(self._folder.part(".bin")), str(self._folder.part(".lengths")))
        self._files = TokenFiles(*paths, vocab_size, *counts)
        self._saved_bytes = done.text_bytes

    def add(self, tokens: ArrayLike, ends: IntArray, text_bytes: int, left_out: Mapping[str, int]) -> None:
        """Append the result of one batch, see ``TokenFiles.add_tokens``. A full shard is made durable."""
        assert self._files is not None
        done, files = self.progress, self._files
        files.add_tokens(tokens, ends)
        done.batches += 1
        done.text_bytes += text_bytes
        for kind, count in left_out.items():
            done.left_out[kind] = done.left_out.get(kind, 0) + count
        done.num_tokens, done.num_documents, done.open_tokens = files.num_tokens, files.num_documents, files.open_tokens
        if done.text_bytes - self._saved_bytes >= SHARD_BYTES:
            files.sync()  # before the journal, which must not promise more than the disk has
            self._folder.log(asdict(done))
            self._saved_bytes = done.text_bytes

    def finish(self, tokenizer_json: str, record: Mapping[str, Any]) -> None:
        """Move the whole corpus to its place."""
        assert self._files is not None
        replace_text(self._folder.part(".tokenizer.json"), tokenizer_json)
        replace_text(self._folder.part(".json"), json.dumps(record, indent=2) + "\n")
        self._files.write_index(str(self._folder.part(".idx")))
        # From this line on all parts are complete: killed while it moves them, the process leaves the rest to the next one.
        self._folder.log(_FINISHED)
        self._folder.publish()


def publish_finished(prefix: str) -> bool:
    """Move a corpus to its place that a killed process finished but did not move; return whether there was one."""
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
            if finished or not journal:  # a folder without a journal is left of a removal that was interrupted
                folder.remove()
        finally:
            folder.unlock()
    return finished
