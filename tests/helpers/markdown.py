"""Code blocks of a Markdown page and their marks, and the programs that a block of commands calls.

The line above a block is a comment, which pages don't show:

- ``<!-- test: run -->`` runs it, in order with the others of its page, in one folder that is empty at first. A JSON block is
  checked as a run's file. ``<!-- test: run in a clone -->`` is for commands that name files of the repository.
- ``<!-- test: slow -->`` runs it too, but among the soak tests only.
- ``<!-- test: output -->`` compares it with what the block before it printed; ``...`` replaces text or lines.
- ``<!-- illustration: REASON -->`` doesn't run it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

RUN = ("test: run", "test: run in a clone")
SLOW, OUTPUT, ILLUSTRATION = "test: slow", "test: output", "illustration: "
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]+) -->\n)?(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
_ENDS = {"|", "||", "&&", ";", ">", "2>&1", "done"}
"""Words of a shell after which the arguments of a program have ended."""


class Block(NamedTuple):
    line: int
    """The line of the page that its first line is."""
    language: str
    text: str
    mark: str
    """Its comment, empty without one."""


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    return [
        Block(page.count("\n", 0, found.start("text")) + 1, found["language"], found["text"], found["mark"] or "")
        for found in _BLOCK.finditer(page)
    ]


def matches(expected: str, printed: str) -> bool:
    """Return whether ``printed`` is the text of an output block, apart from white space at the ends of lines."""
    lines = [line.rstrip() for line in expected.strip("\n").split("\n")]
    pattern = "\n".join(".*?".join(map(re.escape, line.split("..."))) if line != "..." else "\0" for line in lines)
    pattern = pattern.replace("\0\n", r"(?:[^\n]*\n)*").replace("\n\0", r"(?:\n[^\n]*)*")
    text = "\n".join(line.rstrip() for line in printed.strip("\n").split("\n"))
    return re.fullmatch(pattern, text) is not None


def calls(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Yield (subcommand, arguments) of each call of ``slw`` or of a script of the repository in a block of commands."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for start, word in enumerate(words):
            if word == "slw":
                name, rest = words[start + 1], words[start + 2 :]
            elif re.fullmatch(r"scripts/\w+\.py", word):
                name, rest = word.removeprefix("scripts/").removesuffix(".py"), words[start + 1 :]
            else:
                continue
            ends = (at for at, word in enumerate(rest) if word in _ENDS or word.endswith(";"))
            yield name, rest[: next(ends, len(rest))]
