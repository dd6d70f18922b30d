"""Versions of the packages that a run depends on, and the tested range of DeepSpeed versions."""

from __future__ import annotations

import functools
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

import deepspeed

from seqlen_curriculum.launchers import global_rank

__all__ = ["TESTED_DEEPSPEED", "check_deepspeed_version", "package_versions"]

TESTED_DEEPSPEED = (0, 19)
"""Major and minor version; setup.py has the same range. tests/test_deepspeed_internals.py lists the reasons."""
_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "seqlen-curriculum")


@functools.cache  # once per process
def check_deepspeed_version() -> None:
    """Warn once on rank 0 if the version of DeepSpeed is outside the tested range."""
    major, minor = (int(part) for part in deepspeed.__version__.split(".")[:2])
    if (major, minor) == TESTED_DEEPSPEED or global_rank() != 0:
        return
    tested_major, tested_minor = TESTED_DEEPSPEED
    tested = f"deepspeed>={tested_major}.{tested_minor},<{tested_major}.{tested_minor + 1}"
    warnings.warn(
        f"deepspeed {deepspeed.__version__} is outside the tested range {tested}; training relies on internals of DeepSpeed "
        f'that may have changed. Install a tested version: pip install "{tested}"',
        stacklevel=3,
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
