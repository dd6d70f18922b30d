"""The optional packages, and the extra of this package that installs each."""

from __future__ import annotations

import importlib.util

__all__ = ["EXTRAS", "install_command", "installed_extras", "missing_package"]

EXTRAS = {
    "train": ("torch", "deepspeed", "transformers", "tokenizers"),
    "eval": ("lm_eval",),
    "monitor": ("tensorboard", "wandb"),
    "datasets": ("datasets", "pyarrow"),
    "hf": ("accelerate", "torch", "transformers"),
    "trl": ("trl", "datasets"),
    "lightning": ("lightning", "torch"),
}
"""The modules that each extra installs, as in pyproject.toml. Commands that don't need an extra work without it."""


def install_command(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install 'seqlen-curriculum[{extra}]'"


def missing_package(module: str | None) -> str | None:
    """Return the error message for a missing module that an extra installs; None for other modules.

    ``module`` is the ``name`` of a ModuleNotFoundError. A missing submodule of an installed package returns None, because
    that is a mistake in that package.
    """
    for extra, modules in EXTRAS.items():
        if module in modules:
            return f"{module} is not installed; {install_command(extra)}"
    return None


def installed_extras() -> dict[str, bool]:
    """Return for each extra whether all its modules are installed, without importing them."""
    return {extra: all(map(importlib.util.find_spec, modules)) for extra, modules in EXTRAS.items()}
