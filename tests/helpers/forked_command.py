"""A command in place of ``python`` whose script is forked, for launchers that the tested code itself starts.

As a script, this is that command: it asks the tests' process to fork the script, prints its output at the end and exits
with its status. If the command is killed, so is the script.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import socket
import sys
import tempfile
import threading
from pathlib import Path


@functools.cache
def forked_command() -> list[str]:
    """Return the words to put before a script and its arguments."""
    from helpers.launching import fork_server

    fork_server()  # this thread starts it, and the others use it
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")  # Linux picks a name outside the file system
    listener.listen()
    threading.Thread(target=_listen, args=(listener,), daemon=True).start()
    return [sys.executable, __file__, listener.getsockname().hex()]


def _listen(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    from helpers.launching import Ranks, running

    dropped = contextlib.suppress(OSError)  # where the command is killed as its script ends
    with dropped, connection, connection.makefile("rw") as both, tempfile.NamedTemporaryFile() as log:
        request = json.loads(both.readline())
        script, *arguments = request["words"]
        ranks, folder = Ranks(script, arguments, 0), Path(request["folder"])
        with running(ranks, Path(log.name), folder, env=request["environment"]) as process:
            while process.poll() is None:
                if select.select([connection], [], [], 0.02)[0]:
                    return  # the command was killed
        print(json.dumps([process.returncode, Path(log.name).read_text()]), file=both, flush=True)


def main() -> None:
    address, *words = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(bytes.fromhex(address))
        with connection.makefile("rw") as both:
            request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
            print(json.dumps(request), file=both, flush=True)
            status, output = json.loads(both.readline())
    print(output, end="", flush=True)
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
