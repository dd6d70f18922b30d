"""The run's log: one JSON object a line, one line a step, so that analysis needs no engine.

A training record holds ``step, seqlen, rows, consumed_tokens, loss, lr, grad_norm, seconds``; an evaluation record
``step, consumed_tokens, valid_loss, valid_ppl, seconds``. A step that a rollback passed over has no loss:
``step, seqlen, rows, consumed_tokens`` and ``skipped``, which is true.
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

__all__ = ["RunLog", "read_run_log"]


class RunLog:
    """Appends records to ``path``; each line is handed to the system at once, so a kill loses no finished step."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Raises DataError when the disk is full."""
        try:
            self._file.write((json.dumps(record, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise DataError(
                f"{self.path}: can't be written ({error.strerror}); free space, then give the same command"
            ) from error

    def close(self) -> None:
        """Flush to disk and close."""
        with contextlib.suppress(OSError):  # not every file system can; a full disk was told of by write
            os.fsync(self._file.fileno())
        self._file.close()

    @staticmethod
    def rewind(path: str | Path, step: int) -> int:
        """Drop the records after ``step`` and a line cut short by a kill; return how many steps were dropped.

        They are written again, with the same values, as the run continues. The shorter file replaces the old one in one
        rename, so a second kill in between loses nothing.
        """
        path = Path(path)
        if not path.exists():
            return 0
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if (record := _parsed(line)) is not None and record["step"] <= step]
        if len(kept) < len(lines):
            replace_text(path, "".join(kept))
        return len(lines) - len(kept)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if line.endswith("\n") and isinstance(record, dict) and "step" in record else None


def read_run_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a log in order; a last line still being written is left out. Raises DataError on a damaged line."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return  # the rest of it, written meanwhile, would look like a line of its own
            record = _parsed(line)
            if record is None:
                raise DataError(f"{path}: line {number} is not a run log record: {line[:80]!r}")
            yield record
