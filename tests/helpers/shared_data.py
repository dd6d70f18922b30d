"""Test data that isn't part of the repository."""

import os
from pathlib import Path

import pytest

from helpers.launching import ROOT


def shared(name):
    """A file of the test data, which isn't part of the repository; the test is skipped without it."""
    folder = Path(os.environ.get("SEQLEN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / name).exists():
        pytest.skip(f"{name} is not here; SEQLEN_SHARED_DATA names the folder of the test data")
    return folder / name
