"""Every message that docs/troubleshooting.md quotes is one that the source can print, and none is explained twice."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
SYMPTOMS = re.findall(r"^### (?!`.*`$)(.+)$", PAGE, re.MULTILINE)
"""Headings that describe what is seen and quote no message."""


def texts(source):
    """Yield each string of a Python source; a value that is filled in is a line break, which no message has inside."""
    tree = ast.parse(source)
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.value


@cache
def messages():
    """Return all strings of the package, of the scripts, and of the part of DeepSpeed that refuses configurations."""
    files = [*(ROOT / "seqlen_curriculum").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    deepspeed = importlib.util.find_spec("deepspeed")  # found, not imported
    if deepspeed is not None:
        files.append(Path(deepspeed.origin).parent / "runtime" / "config.py")
    return "\n\n".join(text for file in files for text in texts(file.read_text()))


def pieces(quoted):
    """Return the parts of a quoted message between the values that vary."""
    return [piece for piece in quoted.split("…") if piece.strip(" :;,()")]


def test_a_piece_is_found_only_within_one_string():
    found = list(texts('f"a: {x} rows " "do not divide over {y}"'))
    assert found == ["a: \n rows do not divide over {y}"]
    assert pieces("…: unknown key…; did you mean …") == [": unknown key", "; did you mean "]


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_in_the_source(quoted):
    assert max(map(len, pieces(quoted))) >= 12, "too short to find the message by"
    missing = [piece for piece in pieces(quoted) if piece not in messages()]
    assert missing == []


def test_each_entry_has_a_cause_and_a_fix_and_is_there_once():
    assert len(QUOTED) >= 35
    headings = [*QUOTED, *SYMPTOMS]
    assert len(set(headings)) == len(headings)
    entries = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
    assert [entry for entry in entries if "**Cause.** " not in entry or "**Fix.** " not in entry] == []
