"""docs/make_pictures.py draws the pictures that the documentation shows: all of them, small, the same on every call."""

import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
LARGEST = 60_000  # bytes


@pytest.fixture
def make_pictures(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))  # its custom schedule names itself by import path
    return importlib.import_module("make_pictures")


def test_every_picture_is_shown_and_every_shown_picture_is_drawn(make_pictures, tmp_path):
    make_pictures.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = {name for page in DOCS.glob("*.md") for name in re.findall(r"\(images/([\w.]+)\)", page.read_text())}
    assert drawn == shown == {path.name for path in (DOCS / "images").iterdir()}
    assert max(path.stat().st_size for path in [*tmp_path.iterdir(), *(DOCS / "images").iterdir()]) < LARGEST
    again = tmp_path / "again"
    make_pictures.main(again, ["method_window.svg"])
    assert (again / "method_window.svg").read_bytes() == (tmp_path / "method_window.svg").read_bytes()


def test_the_numbers_beside_the_pictures(make_pictures):
    plan = make_pictures.load().plan
    assert plan.steps == 172
    assert round(plan.timeline.consumed_tokens(100) / 500_000, 2) == 0.41  # "41 % of the tokens"
    grown = make_pictures.load(batch_growth=True, min_tokens_per_step=2048).plan
    assert grown.steps == 153
    assert [int(grown.timeline.rows(step)) for step in (1, 153)] == [256, 16]
    assert grown.timeline.seqlen(48) < 128 == grown.timeline.seqlen(49)
    assert [int(grown.timeline.rows(step)) for step in (48, 49)] == [32, 16]
    assert [plan.micro_batch_rows(16, length) for length in (8, 256)] == [16, 2]
