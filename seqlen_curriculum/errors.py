"""Every error this package raises for a user's mistake.

SeqlenCurriculumError
├── ConfigError       a value in the configuration, a flag or a schedule (also a ``ValueError``)
├── DataError         a corpus, its files or its tokens, or a batch (also a ``ValueError``)
├── CheckpointError   a checkpoint that can't be written, read or continued
└── DivergenceError   the loss stopped being finite, or spiked where that is to stop the run

Each message names the field or file, the value found and what to do. Programs catch the root; scripts print
the message without a traceback and exit with status 1, of a DivergenceError with status 3.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["DIVERGED", "CheckpointError", "ConfigError", "DataError", "DivergenceError", "SeqlenCurriculumError"]

DIVERGED = 3
"""Exit status of a training that diverged; 1 is a mistake in the command or the configuration."""


class SeqlenCurriculumError(Exception):
    """Root of the errors a user can cause and mend."""


class ConfigError(SeqlenCurriculumError, ValueError):
    """One or more problems of a configuration, all reported at once in ``problems``."""

    def __init__(self, problems: str | Sequence[str], where: str = "") -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        self.where = where
        head = f"{where}: " if where else ""
        if len(self.problems) == 1:
            super().__init__(head + self.problems[0])
        else:
            listed = "".join(f"\n  - {problem}" for problem in self.problems)
            super().__init__(f"{head}{len(self.problems)} problems{listed}")


class DataError(SeqlenCurriculumError, ValueError):
    """A corpus that can't be read, is damaged, or doesn't fit the model or the run; a batch of unknown shapes."""


class CheckpointError(SeqlenCurriculumError, RuntimeError):
    """A checkpoint that can't be written, is incomplete, or belongs to another run."""


class DivergenceError(SeqlenCurriculumError, RuntimeError):
    """The loss, its gradient or the validation loss is NaN or infinite, or it spiked; the last checkpoint is intact."""
