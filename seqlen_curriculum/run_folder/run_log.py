"""A run's ``runlog.jsonl``: one JSON object per line, written as training goes, so that analysis needs no engine.

======================  ===================================================================================
training step           ``step, seqlen, rows, consumed_tokens, loss, lr, grad_norm``, and of ``MACHINE_KEYS``
                        ``seconds, data_seconds, mfu, peak_memory_bytes``, after a checkpoint
                        ``checkpoint_seconds``; every ``training.variance_interval`` steps Adam's moments
step that was skipped   ``step, seqlen, rows, consumed_tokens, skipped`` (true)
evaluation              ``step, consumed_tokens, valid_loss, valid_ppl, seconds``
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

__all__ = ["MACHINE_KEYS", "RunLog", "losses", "read_run_log", "records_after"]

MACHINE_KEYS = ("seconds", "data_seconds", "checkpoint_seconds", "mfu", "peak_memory_bytes")
"""Keys whose values depend on the machine and its load: two runs that train alike differ in them.

``seconds`` of the step or evaluation; ``data_seconds`` that it waited for its batch; ``checkpoint_seconds`` that training
stood still for a checkpoint before the step; ``mfu``, the model FLOPs utilization (None where the peak speed of the card is
unknown); ``peak_memory_bytes`` on rank 0's device since the last step (on a CPU: of the process since it started).
"""
_LOSS = re.compile(rb'"loss": (-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)[,}]')
_LINES_BYTES = 2**20
_ENCODER = json.JSONEncoder(allow_nan=False)  # json.dumps would make a new one for each line


class RunLog:
    """Appends records to ``path``. Each line goes to the system at once, so a kill loses no finished step."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        # Unbuffered: what Python holds back is lost with the process, what the system has been given is not.
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Raises DataError when the disk is full."""
        try:
            line = (_ENCODER.encode(record) + "\n").encode()
            if self._file.write(line) != len(line):  # where the disk is full only now
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise DataError(
                f"{self.path}: can't be written ({error.strerror}); free space, then rerun the same command"
            ) from error

    def close(self) -> None:
        """Flush to disk and close."""
        with contextlib.suppress(OSError):  # not every file system can; a full disk was reported by write
            os.fsync(self._file.fileno())
        self._file.close()

    @staticmethod
    def rewind(path: str | Path, step: int) -> int:
        """Drop the records after ``step`` and a last line cut short by a kill; return how many lines were dropped.

        A run that resumes after ``step`` writes the same records again. A kill in between loses nothing.
        """
        path = Path(path)
        if not path.exists():
            return 0
        end, later = _end_of(path, step)
        if end < path.stat().st_size:
            os.truncate(path, end)
            sync(path)
        return later


def _end_of(path: Path, step: int) -> tuple[int, int]:
    """Return where the records up to ``step`` end, in bytes, and how many lines follow, records or not.

    Steps never decrease in a log, so it is read from the end, as far as need be: no other part of it is touched.
    """
    later = 0
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
    """Yield the records after ``step`` without reading those before. Raises DataError on a damaged line among them."""
    return read_run_log(path, _end_of(path, step)[0])


def losses(path: Path) -> Iterator[float]:
    """Yield the training loss of every step that has one, in order, without parsing whole records."""
    with path.open("rb") as file:
        # 10 million records of 170 bytes: 9 s of a core, where json takes 70 s. The quotes keep "valid_loss" out; losses
        # are finite JSON numbers, because write() refuses others.
        for lines in iter(partial(file.readlines, _LINES_BYTES), []):
            if not lines[-1].endswith(b"\n"):
                lines.pop()
            yield from map(float, _LOSS.findall(b"".join(lines)))


def read_run_log(path: str | Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the records of a log from byte ``start`` on, in order, without a last line still being written.

    Raises DataError on a damaged line, whose number counts from ``start``.
    """
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return  # the writer may add the rest before the next read, which would look like a line of its own
            record = _parsed(line)
            if record is None:
                raise DataError(f"{path}: line {number} is not a run log record: {line[:80]!r}")
            yield record


def _parsed(line: str) -> dict[str, Any] | None:
    """Return the record in a whole ``line`` of the log, None if there is none."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if line.endswith("\n") and isinstance(record, dict) and "step" in record else None
