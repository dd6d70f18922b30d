"""The errors that this package raises for mistakes a user can fix.

SeqlenCurriculumError
├── ConfigError       a value in the configuration, a flag or a schedule (also a ``ValueError``)
├── DataError         a corpus, its files or its tokens, or a batch (also a ``ValueError``)
├── CheckpointError   a checkpoint that can't be written, read or resumed from
└── DivergenceError   the loss stopped being finite, or spiked in a run that stops at spikes

Each message names the field or file, its value and the fix. Programs catch the base class. Scripts print the message
without a traceback and exit with status 1, or 3 for a DivergenceError. A run stopped by a signal raises no error and exits
with status 75.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = [
    "DIVERGED",
    "HUNG",
    "STOPPED",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "SeqlenCurriculumError",
    "printable",
]

DIVERGED = 3
"""Exit status of a run that diverged. A launcher that restarts failed runs can distinguish it from status 1, a mistake."""
HUNG = 5
"""Exit status of a rank whose step did not end within ``training.hang_seconds``."""

STOPPED = 75
"""Exit status of a run that was stopped by SIGTERM or SIGINT after saving a checkpoint (EX_TEMPFAIL in sysexits.h)."""


_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys, can't print or reorders. Names in files may have them."""


def printable(message: str) -> str:
    """Return ``message`` with the characters escaped that a terminal obeys, can't print or reorders."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), message)


class SeqlenCurriculumError(Exception):
    """Base class of all user-facing errors. Control characters in a message are escaped."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class ConfigError(SeqlenCurriculumError, ValueError):
    """One or more problems in a configuration, listed in ``problems``."""

    def __init__(self, problems: str | Sequence[str], where: str = "") -> None:
        self.problems = [printable(problem) for problem in ([problems] if isinstance(problems, str) else problems)]
        self.where = where
        head = f"{where}: " if where else ""
        if len(self.problems) == 1:
            super().__init__(head + self.problems[0])
        else:
            listed = "".join(f"\n  - {problem}" for problem in self.problems)
            super().__init__(f"{head}{len(self.problems)} problems{listed}")


class DataError(SeqlenCurriculumError, ValueError):
    """A corpus that is missing, damaged, or doesn't fit the model or the run, or a batch of unknown shapes."""


class CheckpointError(SeqlenCurriculumError, RuntimeError):
    """A checkpoint that can't be written, is incomplete, or belongs to another run."""


class DivergenceError(SeqlenCurriculumError, RuntimeError):
    """A loss, gradient or validation loss that is NaN or infinite, or a spike. The last checkpoint is intact."""
