"""Group the runs that differ only in their seed: judging a method takes several."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from seqlen_curriculum.analysis.run import Run

__all__ = ["SeedGroup", "over_seeds", "seed_groups", "shared_name"]

_SEED = "training.seed"


class SeedGroup(NamedTuple):
    """Runs that differ only in their seed."""

    name: str
    """The common start of the names of its runs."""
    members: list[int]
    """Their indices among all runs."""


def seed_groups(runs: Sequence[Run]) -> list[SeedGroup]:
    """Return the groups in the order of their first runs. A run of unknown configuration forms its own group."""
    members: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        settings = {key: value for key, value in run.settings.items() if key != _SEED}
        group = json.dumps(settings, sort_keys=True)
        # An average would count a repeated seed twice, so the repeat forms its own group.
        repeated = any(runs[member].settings.get(_SEED) == run.settings.get(_SEED) for member in members.get(group, ()))
        if repeated or not settings:
            group = f"run {number}"
        members.setdefault(group, []).append(number)
    names = [shared_name([runs[n].name for n in numbers]) for numbers in members.values()]
    # Two groups may get the same name, for example two sweeps of slw-seed1 and slw-seed2. Then their first runs name them.
    if len(set(names)) < len(names):
        names = [runs[numbers[0]].name for numbers in members.values()]
    return [SeedGroup(name, numbers) for name, numbers in zip(names, members.values(), strict=True)]


def shared_name(names: Sequence[str]) -> str:
    """Return the common start of the names without the seed: ``slw`` for ``slw-seed1`` and ``slw-seed2``."""
    if len(names) == 1:
        return names[0]
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    shared = "".join(column[0] for column in letters)
    if all(name[len(shared) :][:1].isdigit() or name == shared for name in names):
        shared = shared.rstrip("0123456789")  # slw-seed1 and slw-seed12 share slw-seed1, whose 1 belongs to the seed
    return re.sub(r"[-_./ ]*(seed)?[-_= ]?$", "", shared) or names[0]


def over_seeds(runs: Sequence[Run], numbers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one summary per seed group, or an empty list if no two runs differ only in their seed.

    ``numbers`` are the runs' entries in the report. Each summary has ``name``, ``runs``, and one value per run of
    ``spikes``, ``max_loss_ratio`` and ``final_valid_loss`` (None for a run that has not finished) with its
    ``mean_final_valid_loss``. Each run is compared with the first group's run of the same seed: ``compared`` is the number
    of runs that have one, ``reached`` the number of those that reached its best validation perplexity, and
    ``consumed_tokens_ratio`` and ``hours_ratio`` are their medians (None if none reached it).
    """
    groups = seed_groups(runs)
    if all(len(group.members) == 1 for group in groups):
        return []
    best_by_seed = {runs[n].settings.get(_SEED): numbers[n]["best"] for n in groups[0].members}
    return [
        {**_summarise_seeds(group, numbers), **_compare_by_seed([runs[n] for n in group.members], best_by_seed)}
        for group in groups
    ]


def _summarise_seeds(group: SeedGroup, numbers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of the runs of a group, and the mean of their final losses."""
    members = [numbers[n] for n in group.members]
    losses = [run["final"]["valid_loss"] if run["finished"] and run["final"] else None for run in members]
    known = [loss for loss in losses if loss is not None]
    return {
        "name": group.name,
        "runs": [run["name"] for run in members],
        "spikes": [run["stability"]["spikes"] for run in members],
        "max_loss_ratio": [run["stability"]["max_loss_ratio"] for run in members],
        "final_valid_loss": losses,
        "mean_final_valid_loss": statistics.mean(known) if len(known) == len(losses) else None,
    }


def _compare_by_seed(runs: Sequence[Run], best_by_seed: Mapping[Any, dict[str, Any] | None]) -> dict[str, Any]:
    """Return the reduction of tokens and hours to reach the best of the reference run of the same seed (medians)."""
    # Runs of the same seed start from the same weights and read the same samples in the same order, so the ratio of such a
    # pair shows the method. The median of 4.0, 5.5 and 40 is 5.5. Their mean, 16.5, would show the outlier.
    compared = [run for run in runs if run.settings.get(_SEED) in best_by_seed]
    tokens_ratios, hours_ratios = [], []
    for run in compared:
        best = best_by_seed[run.settings.get(_SEED)]
        reached = run.reached(best)
        if best and reached and reached["hours"]:
            tokens_ratios.append(best["consumed_tokens"] / reached["consumed_tokens"])
            hours_ratios.append(best["hours"] / reached["hours"])
    return {
        "compared": len(compared),
        "reached": len(tokens_ratios),
        "consumed_tokens_ratio": statistics.median(tokens_ratios) if tokens_ratios else None,
        "hours_ratio": statistics.median(hours_ratios) if hours_ratios else None,
    }
