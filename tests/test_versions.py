"""A DeepSpeed that is not tested is warned of, once; the versions of a run are recorded."""

import re
import warnings
from pathlib import Path

import deepspeed
import pytest

from seqlen_curriculum.launchers import launch
from seqlen_curriculum.training.versions import TESTED_DEEPSPEED, check_deepspeed_version, package_versions


@pytest.fixture(autouse=True)
def _fresh():
    for cached in (check_deepspeed_version, launch):
        cached.cache_clear()
    yield
    for cached in (check_deepspeed_version, launch):
        cached.cache_clear()


def check_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_deepspeed_version()


@pytest.mark.parametrize("version", ["0.19.0", "0.19.8", "0.19.9+cu128", "0.19.1rc1"])
def test_a_tested_version_is_silent(version, monkeypatch):
    monkeypatch.setattr(deepspeed, "__version__", version)
    check_silent()


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.19.0+unknown"])
def test_another_version_is_warned_of_once(version, monkeypatch):
    monkeypatch.setattr(deepspeed, "__version__", version)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.warns(UserWarning, match=rf"{re.escape(version)} .*deepspeed>=0\.19,<0\.20"):
        check_deepspeed_version()
    check_silent()


def test_other_ranks_are_silent(monkeypatch):
    monkeypatch.setattr(deepspeed, "__version__", "0.20.0")
    monkeypatch.setenv("RANK", "1")
    check_silent()


def test_the_range_is_that_of_the_packaging():
    major, minor = TESTED_DEEPSPEED
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"deepspeed>={major}.{minor},<{major}.{minor + 1}"' in pyproject


def test_the_versions_of_a_run_are_known():
    assert package_versions()["deepspeed"] == deepspeed.__version__
    assert {"python", "torch", "transformers", "numpy"} <= package_versions().keys()
