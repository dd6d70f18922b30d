"""Test data that isn't part of the repository."""

import os
from pathlib import Path

import pytest

from helpers.launching import ROOT


def shared(name):
    """Return the path of a test data file that isn't part of the repository; skip the test without it."""
    folder = Path(os.environ.get("SEQLEN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / name).exists():
        pytest.skip(f"{name} not found; SEQLEN_SHARED_DATA is the folder of the test data")
    return folder / name
