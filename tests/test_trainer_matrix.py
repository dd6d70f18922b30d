"""The matrix of docs/trainers.md: every trainer has every property, and every test that it names exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "trainers.md").read_text()
PROPERTIES = [
    "length per step",
    "rows read",
    "tokens",
    "rate",
    "evaluation length",
    "resume mid-warmup",
    "2 ranks",
    "accumulation",
    "workers",
]


def table(header):
    """Return the rows of the table whose header starts with ``header``, header first, as lists of cells."""
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")]


MATRIX = table("| trainer | length per step |")
TESTS = dict(table("| | test, or reason |")[1:])


def test_the_columns_are_the_properties():
    assert MATRIX[0] == ["trainer", *PROPERTIES]
    assert len(MATRIX) > 4


@pytest.mark.parametrize("row", MATRIX[1:], ids=lambda row: row[0])
def test_no_cell_is_empty(row):
    assert len(row) == 1 + len(PROPERTIES)
    for name, cell in zip(PROPERTIES, row[1:], strict=True):
        assert cell, f"{row[0]}, {name}"
        assert set(cell.split()) <= TESTS.keys(), f"{row[0]}, {name}: {cell}"


@pytest.mark.parametrize("key", TESTS)
def test_every_key_is_a_test_that_exists_or_a_reason(key):
    assert key in {word for row in MATRIX[1:] for cell in row[1:] for word in cell.split()}, "no cell names it"
    named = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", TESTS[key])
    if named is None:
        assert re.fullmatch(r"Not tested: .{20,}", TESTS[key])
        return
    module = ast.parse((ROOT / "tests" / named[1]).read_text())
    assert named[2] in {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
