"""One launch for many parts, each of which fails or is skipped alone.

A test module lists its parts and calls ``launch_parts`` in a fixture. The launched script, often the test module itself,
calls ``do_parts``. Every rank writes what a part returned, or its traceback, to a file of that part, and waits for the
others. After an error, a crash or a hang the launch ends; that part has the error, and a new launch does the rest.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.capabilities import lacking, require, require_launches
from helpers.launching import forked, limit, running

COMPILE_SECONDS = 600
"""On a quiet machine, until DeepSpeed has one of its C++ parts compiled and loaded."""


@dataclass
class Part:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """What ``do_parts`` gives to its function, as JSON."""
    needs: tuple[str, ...] = ()
    """Capabilities of the machine without which the part is skipped."""
    after: str | None = None
    """The part whose files this one uses; if that fails, so does this one."""
    seconds: float = 0
    """How long it may take on a quiet machine; 0 is 120, or 600 where it needs the compiler."""

    def __post_init__(self) -> None:
        self.seconds = self.seconds or (COMPILE_SECONDS if "compiler" in self.needs else 120)


class Results:
    """What the parts returned on rank 0, by name; asking for one that failed or was skipped fails or skips the test."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.skips: dict[str, str] = {}
        self.output = ""
        """What all launches printed."""

    def __getitem__(self, name: str) -> Any:
        if name in self.skips:
            pytest.skip(self.skips[name])
        if name in self.errors:
            pytest.fail(f"{name}: {self.errors[name]}", pytrace=False)
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values or name in self.errors or name in self.skips


def launch_parts(
    folder: Path, script: str | Path, parts: Iterable[Part], ranks: int, results: Results | None = None
) -> Results:
    """Do all ``parts`` in one launch of ``script``, or in several where some of them fail.

    results: those of earlier launches, whose parts a part may be ``after``; these ones are added.
    """
    results, todo = Results() if results is None else results, []
    for part in parts:
        if reason := lacking(part.needs):
            results.skips[part.name] = reason
        else:
            todo.append(part)
    if not todo:
        return results
    require_launches()
    if ranks > 2:
        require("memory")
    number = 0
    while todo := [part for part in todo if not _settled(part, results)]:
        launch_folder = folder / f"launch{number}-{ranks}ranks"
        launch_folder.mkdir()
        _launch_once(launch_folder, script, todo, ranks, results)
        number += 1
    return results


def _settled(part: Part, results: Results) -> bool:
    """Whether there is nothing left to do about a part: it has a result, or what it begins with has none."""
    if part.after in results.errors:
        results.errors[part.name] = f"{part.after} failed, with whose files it begins"
    if part.after in results.skips:
        results.skips[part.name] = results.skips[part.after]
    return part.name in results


def _launch_once(folder: Path, script: str | Path, parts: list[Part], ranks: int, results: Results) -> None:
    """Launch until all parts are done or one of them ends it; that one then has an error."""
    (folder / "todo.json").write_text(json.dumps([asdict(part) for part in parts]))
    log = folder / "log"
    hung = ""
    with running(forked(script, folder, ranks=ranks), log) as process:
        finished, since = -1, time.monotonic()  # -1: DeepSpeed starts, and may compile
        while process.poll() is None:
            if finished < len(parts) and _is_done(folder, finished, ranks):
                finished, since = finished + 1, time.monotonic()
            seconds = parts[finished].seconds if 0 <= finished < len(parts) else COMPILE_SECONDS
            if time.monotonic() > since + limit(seconds):
                hung = f"hung for {limit(seconds):.0f} seconds"
                break
            time.sleep(0.02)
    output = log.read_text()
    results.output += output
    ended = hung or f"ended with status {process.returncode}"
    for number, part in enumerate(parts):
        outcomes = [_read(folder, number, rank) for rank in range(ranks)]
        errors = [f"rank {rank}: {one['error']}" for rank, one in enumerate(outcomes) if one and "error" in one]
        if errors:
            results.errors[part.name] = "\n".join(errors)
        elif all(outcomes) and (process.returncode == 0 or number + 1 < len(parts)):
            results.values[part.name] = outcomes[0]["value"]
            continue
        else:
            results.errors[part.name] = f"the launch {ended}\n{output[-8000:]}"
        if not _is_done(folder, -1, ranks):
            # Nothing began: the launch itself fails, and would again.
            results.errors |= {left.name: results.errors[part.name] for left in parts}
        return


def do_parts(do: Callable[..., Any]) -> None:
    """Call ``do(**arguments)`` for each part of the launch whose folder is this process's last argument."""
    folder, rank, ranks = Path(sys.argv[-1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _path(folder, -1, rank).touch()
    for number, part in enumerate(json.loads((folder / "todo.json").read_text())):
        begin = time.monotonic(), time.process_time()
        try:
            outcome = {"value": do(**part["arguments"])}
        except BaseException:
            outcome = {"error": traceback.format_exc()}
        outcome["seconds"], outcome["cpu_seconds"] = time.monotonic() - begin[0], time.process_time() - begin[1]
        path = _path(folder, number, rank)
        path.with_suffix(".part").write_text(json.dumps(outcome))
        path.with_suffix(".part").rename(path)
        if "error" in outcome:
            print(outcome["error"], file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # the launcher then ends the other ranks, which may wait for this one
        while not _is_done(folder, number, ranks):
            time.sleep(0.002)


def _path(folder: Path, number: int, rank: int) -> Path:
    """Return the file that a rank leaves when it is done with a part, counted from 0, or with starting, -1."""
    return folder / f"{number}.rank{rank}.json"


def _is_done(folder: Path, number: int, ranks: int) -> bool:
    return all(_path(folder, number, rank).exists() for rank in range(ranks))


def _read(folder: Path, number: int, rank: int) -> Any:
    path = _path(folder, number, rank)
    return json.loads(path.read_text()) if path.exists() else None
