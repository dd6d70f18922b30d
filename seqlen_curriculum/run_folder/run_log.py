"""A run's ``runlog.jsonl``: one JSON object per line, written during training.

======================  ===================================================================================
training step           ``step, seqlen, rows, consumed_tokens, loss, lr, grad_norm``, and of ``MACHINE_KEYS``
                        ``seconds, cpu_seconds, data_seconds, mfu, peak_memory_bytes``, after a
                        checkpoint ``checkpoint_seconds``; every ``training.variance_interval`` steps Adam's
                        moments; with ``data.attention`` "document" ``document_starts``: targets that begin a
                        document
skipped step            ``step, seqlen, rows, consumed_tokens, skipped`` (true)
evaluation              ``step, consumed_tokens, valid_loss, valid_ppl, seconds``; with masked tokens
                        ``objective`` ("masked"): the loss of masked tokens, and their pseudo-perplexity;
                        ``attention`` ("document") and ``eod_mask_loss`` (true) as in the data section
======================  ===================================================================================
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import DataError
from seqlen_curriculum.files import sync
from seqlen_curriculum.run_folder.own_files import check_own

__all__ = ["MACHINE_KEYS", "RunLog", "losses", "read_run_log", "records_after"]

MACHINE_KEYS = ("seconds", "cpu_seconds", "data_seconds", "checkpoint_seconds", "mfu", "peak_memory_bytes")
"""Keys whose values depend on the machine and its load, and differ between runs that are otherwise identical.

- ``seconds``: duration of the step or evaluation.
- ``cpu_seconds``: CPU time of the step in all threads of rank 0's process.
- ``data_seconds``: time that it waited for its batch.
- ``checkpoint_seconds``: time that a checkpoint before the step blocked training.
- ``mfu``: model FLOPs utilization (None if the peak speed of the device is unknown).
- ``peak_memory_bytes``: on rank 0's device since the last step (on a CPU: of the process since its start).
"""
_LOSS = re.compile(rb'"loss": (-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)[,}]')
_LINES_BYTES = 2**20
_MOST_STEPS = 10**15
_ENCODER = json.JSONEncoder(allow_nan=False)  # json.dumps would create one per line


class RunLog:
    """Log that appends records to ``path``. Lines are unbuffered, so a kill doesn't lose finished steps."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_own(self.path, DataError)
        # Unbuffered, because data in Python's buffer is lost with the process, data written to the system is not.
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Raises DataError if the disk is full."""
        try:
            line = (_ENCODER.encode(record) + "\n").encode()
            if self._file.write(line) != len(line):  # the disk may be full only now
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise DataError(
                f"{self.path}: can't be written ({error.strerror}); free space, then rerun the same command"
            ) from error

    def close(self) -> None:
        """Flush to disk and close."""
        with contextlib.suppress(OSError):  # not supported by every file system; a full disk was reported by write
            os.fsync(self._file.fileno())
        self._file.close()

    @staticmethod
    def rewind(path: str | Path, step: int) -> int:
        """Drop the records after ``step`` and a partial last line; return the number of dropped lines.

        A run that resumes after ``step`` writes the same records again.
        """
        path = Path(path)
        if not path.exists():
            return 0
        check_own(path, DataError)
        end, later = _end_of(path, step)
        if end < path.stat().st_size:
            os.truncate(path, end)
            sync(path)
        return later


def _end_of(path: Path, step: int) -> tuple[int, int]:
    """Return the byte offset at which the records up to ``step`` end, and the number of lines after it.

    Steps never decrease in a log, so it is read backwards from the end, only as far as necessary.
    """
    later = 0
    check_own(path, DataError)
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        if end == 0:  # can't be mapped
            return 0, 0
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as log:
            while end:
                start = log.rfind(b"\n", 0, end - 1) + 1
                record = _parsed(log[start:end].decode(errors="replace"))
                if record is not None and record["step"] <= step:
                    break
                end, later = start, later + 1
    return end, later


def records_after(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """Yield the records after ``step`` without reading earlier ones. Raises DataError for a damaged line among them."""
    return read_run_log(path, _end_of(path, step)[0])


def losses(path: Path) -> Iterator[float]:
    """Yield the training loss of every step that has one, in order, without parsing whole records."""
    check_own(path, DataError)
    with path.open("rb") as file:
        # 10 million records of 170 bytes take 9 s, with json 70 s. The quotes exclude "valid_loss". Losses are finite JSON
        # numbers, because write() refuses others.
        for lines in iter(partial(file.readlines, _LINES_BYTES), []):
            if not lines[-1].endswith(b"\n"):
                lines.pop()
            yield from map(float, _LOSS.findall(b"".join(lines)))


def read_run_log(path: str | Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the records of a log from byte ``start`` on, in order, without a partial last line.

    Raises DataError for a damaged line, whose number counts from ``start``.
    """
    check_own(Path(path), DataError)
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return  # the writer may add the rest before the next read, which would look like a separate line
            record = _parsed(line)
            if record is None:
                raise DataError(f"{path}: line {number} is not a run log record: {line[:80]!r}")
            yield record


def _parsed(line: str) -> dict[str, Any] | None:
    """Return the record in a complete ``line`` of the log, None if it isn't one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also a number of 5,000 digits
        return None
    is_record = line.endswith("\n") and isinstance(record, dict) and type(record.get("step")) is int
    return record if is_record and 0 <= record["step"] <= _MOST_STEPS else None
