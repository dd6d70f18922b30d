"""The command ``slw`` in this process, which saves the start of Python and the imports."""

from __future__ import annotations

import contextlib
import io
import signal
from pathlib import Path
from typing import NamedTuple

from seqlen_curriculum import cli


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def slw(*arguments: object, cwd: Path | None = None) -> Finished:
    """Run a command that neither starts ranks nor reads stdin, and return what it printed and its exit status.

    cwd: the folder to run it in, None for the current one.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd or "."):
        try:
            cli.main(list(map(str, arguments)))
        except SystemExit as end:
            status = end.code
            if isinstance(status, str):
                print(status, file=err)
                status = 1
        finally:
            signal.signal(signal.SIGTERM, handler)
    return Finished(status or 0, out.getvalue(), err.getvalue())
