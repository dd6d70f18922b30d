"""One launch for many parts, each of which fails or is skipped separately.

A test module lists its parts and calls ``launch_parts`` in a fixture. The launched script, often the test module itself,
calls ``do_parts``. Every rank writes the result of a part, or its traceback, to a file of that part, and waits for the
others. After an error, a crash or a hang the launch ends. That part gets the error, and a new launch runs the rest.
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
"""Seconds on an idle machine until DeepSpeed has compiled and loaded a C++ extension."""


@dataclass
class Part:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """JSON-able arguments that ``do_parts`` passes to its function."""
    needs: tuple[str, ...] = ()
    """Capabilities of the machine that the part needs, else it is skipped."""
    after: str | None = None
    """The part whose files this one uses. If that fails, so does this one."""
    seconds: float = 0
    """Maximum duration on an idle machine. 0 means 120, or 600 if it needs the compiler."""

    def __post_init__(self) -> None:
        self.seconds = self.seconds or (COMPILE_SECONDS if "compiler" in self.needs else 120)


class Results:
    """Results of the parts on rank 0, by name. Reading one that failed or was skipped fails or skips the test."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.skips: dict[str, str] = {}
        self.output = ""
        """The output of all launches."""

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
    """Run all ``parts`` in one launch of ``script``, or in several if some of them fail.

    results: results of earlier launches, which a part may be ``after``; new results are added.
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
    """Return whether a part is finished: it has a result, or the part that it is ``after`` failed."""
    if part.after in results.errors:
        results.errors[part.name] = f"{part.after} failed, whose files it uses"
    if part.after in results.skips:
        results.skips[part.name] = results.skips[part.after]
    return part.name in results


def _launch_once(folder: Path, script: str | Path, parts: list[Part], ranks: int, results: Results) -> None:
    """Launch until all parts are done or one of them ends the launch, which then has an error."""
    (folder / "todo.json").write_text(json.dumps([asdict(part) for part in parts]))
    log = folder / "log"
    hung = ""
    with running(forked(script, folder, ranks=ranks), log) as process:
        finished, since = -1, time.monotonic()  # -1: the start of DeepSpeed, which may compile
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
            # No part started, so the launch itself fails and would fail again.
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
            os._exit(1)  # the launcher then ends the other ranks, which may be waiting for this one
        while not _is_done(folder, number, ranks):
            time.sleep(0.002)


def _path(folder: Path, number: int, rank: int) -> Path:
    """Return the file that a rank writes after part number ``part``, from 0, or after starting, -1."""
    return folder / f"{number}.rank{rank}.json"


def _is_done(folder: Path, number: int, ranks: int) -> bool:
    return all(_path(folder, number, rank).exists() for rank in range(ranks))


def _read(folder: Path, number: int, rank: int) -> Any:
    path = _path(folder, number, rank)
    return json.loads(path.read_text()) if path.exists() else None
