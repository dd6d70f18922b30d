"""The order in which xdist's workers take the test files: the longest first, because the last one sets the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LONG = (
    *("matrix", "engine", "spikes", "causal_lm_training", "report_page", "training", "tuning", "reshard", "docs"),
    *("trainer_ranks", "pretrain_data", "launched", "architecture_matrix", "adaptive", "hf_trainer", "lightning_ranks"),
    *("megatron", "deepspeed_legacy", "cli_launch", "resumable_preparation", "package", "prepare", "readme", "trl"),
)
"""The test files of more than 15 seconds on one of two workers, longest first."""


def longest_first(items: Iterable[Any]) -> list[Any]:
    """Return the tests with those of ``LONG`` at the beginning, and otherwise in their order."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    return sorted(items, key=lambda item: places.get(item.path.name, len(places)))
