"""Packages and where they lie; the rest of the packaging is in pyproject.toml.

``configs/`` and ``examples/`` lie beside the package, where users look for them, and are installed inside it.
"""

from setuptools import find_namespace_packages, find_packages, setup

BESIDE = find_namespace_packages(include=["configs", "configs.*", "examples"])

setup(
    packages=[
        *find_packages(include=["seqlen_curriculum", "seqlen_curriculum.*"]),
        *(f"seqlen_curriculum.{name}" for name in BESIDE),
    ],
    package_dir={f"seqlen_curriculum.{folder}": folder for folder in ("configs", "examples")},
    include_package_data=False,  # what MANIFEST.in adds is for the sdist alone
    package_data={"": ["py.typed", "templates/*", "*.json"]},
)
