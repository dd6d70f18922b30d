"""Versions of the packages that a run depends on, and the tested range of DeepSpeed versions."""

from __future__ import annotations

import functools
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

from seqlen_curriculum.launchers import global_rank

__all__ = ["TESTED_DEEPSPEED", "check_deepspeed_version", "package_versions", "untested_deepspeed"]

TESTED_DEEPSPEED = (0, 19)
"""Major and minor version, as in pyproject.toml. tests/test_deepspeed_internals.py lists the reasons."""
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "seqlen-curriculum")


@functools.cache  # once per process
def check_deepspeed_version() -> None:
    """Warn once on rank 0 if the version of DeepSpeed is outside the tested range."""
    import deepspeed

    message = untested_deepspeed(deepspeed.__version__)
    if message and global_rank() == 0:
        warnings.warn(message, stacklevel=3)


def untested_deepspeed(version: str) -> str:
    """Return a warning with the command that installs a tested version; empty for a version in the tested range."""
    if tuple(map(int, version.split(".")[:2])) == TESTED_DEEPSPEED:
        return ""
    major, minor = TESTED_DEEPSPEED
    tested = f"deepspeed>={major}.{minor},<{major}.{minor + 1}"
    return (
        f"deepspeed {version} is outside the tested range {tested}; training relies on internals of DeepSpeed that may have "
        f'changed. Install a tested version: pip install "{tested}"'
    )


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the results of a run, by name."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # on the path, but not installed
            continue
    return versions
