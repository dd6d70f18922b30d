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
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqlen_curriculum.errors import DataError
from seqlen_curriculum.files import replace_text

__all__ = ["MACHINE_KEYS", "RunLog", "read_run_log"]

MACHINE_KEYS = ("seconds", "data_seconds", "checkpoint_seconds", "mfu", "peak_memory_bytes")
"""Keys whose values depend on the machine and its load: two runs that train alike differ in them.

``seconds`` of the step or evaluation; ``data_seconds`` that it waited for its batch; ``checkpoint_seconds`` that training
stood still for a checkpoint before the step; ``mfu``, the model FLOPs utilization (None where the peak speed of the card is
unknown); ``peak_memory_bytes`` on rank 0's device since the last step (on a CPU: of the process since it started).
"""


class RunLog:
    """Appends records to ``path``. Each line goes to the system at once, so a kill loses no finished step."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        # Unbuffered: what Python holds back is lost with the process, what the system has been given is not.
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Raises DataError when the disk is full."""
        try:
            self._file.write((json.dumps(record, allow_nan=False) + "\n").encode())
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
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        records = [_parsed(line) for line in lines]
        kept = [line for line, record in zip(lines, records, strict=True) if record and record["step"] <= step]
        if len(kept) < len(lines):
            replace_text(path, "".join(kept))
        return len(lines) - len(kept)


def read_run_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log in order, without a last line still being written. Raises DataError on a damaged line."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
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
