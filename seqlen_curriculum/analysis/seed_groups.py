"""Runs that differ in nothing but their seed, put together: it takes several to judge a method."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from seqlen_curriculum import fields
from seqlen_curriculum.analysis.run import Run

__all__ = ["SeedGroup", "over_seeds", "seed_groups"]

_SEED = "training.seed"
One = Mapping[str, Any]


class SeedGroup(NamedTuple):
    """Runs of one configuration, ``members`` by their numbers; ``name`` is what their names begin with."""

    name: str
    members: list[int]


def seed_groups(runs: Sequence[Run]) -> list[SeedGroup]:
    """The groups in the order of their first runs; a run of unknown configuration, or of a seed again, is by itself."""
    found: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        settings = {key: value for key, value in fields.flat(run.config) if key != _SEED}
        key = json.dumps(settings, sort_keys=True)
        again = any(_seed(runs[member]) == _seed(run) for member in found.get(key, ()))  # a repeat is no other seed
        found.setdefault(f"{number}" if again or not settings else key, []).append(number)
    groups = [SeedGroup(_shared_name([runs[n].name for n in members]), members) for members in found.values()]
    if len({group.name for group in groups}) == len(groups):
        return groups
    return [SeedGroup(runs[group.members[0]].name, group.members) for group in groups]


def _shared_name(names: Sequence[str]) -> str:
    """``slw-seed1`` and ``slw-seed2`` are ``slw``."""
    if len(names) == 1:
        return names[0]
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    shared = "".join(column[0] for column in letters)
    if all(name[len(shared) :][:1].isdigit() for name in names):
        shared = shared.rstrip("0123456789")  # of seed10 and seed11 the 1 is no name's
    return re.sub(r"[-_./ ]*(seed)?[-_=]?$", "", shared) or names[0]


def over_seeds(runs: Sequence[Run], told: Sequence[One]) -> list[dict[str, Any]]:
    """What the groups came to, of ``told``, the runs' numbers; empty where no two runs differ in nothing but their seed.

    Of each group ``name``, ``runs``, and a list of one value a run of ``spikes``, ``max_loss_ratio`` and
    ``final_valid_loss`` (None of a run that has not ended) with its ``mean_final_valid_loss``. A run is compared with the
    first group's run of the same seed: ``compared`` of them, ``reached`` of those its best validation perplexity, with
    ``consumed_tokens_ratio`` and ``hours_ratio``, medians over those that did, None if none did.
    """
    groups = seed_groups(runs)
    if all(len(group.members) == 1 for group in groups):
        return []
    references = {_seed(runs[number]): number for number in groups[0].members}
    return [_group(group, runs, told, references) for group in groups]


def _seed(run: Run) -> Any:
    return dict(fields.flat(run.config)).get(_SEED)


def _group(group: SeedGroup, runs: Sequence[Run], told: Sequence[One], references: Mapping[Any, int]) -> dict[str, Any]:
    ours = [told[number] for number in group.members]
    finals = [one["final"]["valid_loss"] if one["finished"] and one["final"] else None for one in ours]
    known = [loss for loss in finals if loss is not None]
    pairs = [(runs[n], told[references[_seed(runs[n])]]) for n in group.members if _seed(runs[n]) in references]
    ratios = [ratio for run, reference in pairs if (ratio := _ratio(run, reference))]
    return {
        "name": group.name,
        "runs": [one["name"] for one in ours],
        "spikes": [one["stability"]["spikes"] for one in ours],
        "max_loss_ratio": [one["stability"]["max_loss_ratio"] for one in ours],
        "final_valid_loss": finals,
        "mean_final_valid_loss": statistics.mean(known) if len(known) == len(ours) else None,
        "compared": len(pairs),
        "reached": len(ratios),
        "consumed_tokens_ratio": statistics.median(tokens for tokens, _ in ratios) if ratios else None,
        "hours_ratio": statistics.median(hours for _, hours in ratios) if ratios else None,
    }


def _ratio(run: Run, reference: One) -> tuple[float, float] | None:
    """How many times fewer tokens and hours ``run`` took to ``reference``'s best; None if it did not get there."""
    best, reached = reference["best"], run.reached(reference["best"])
    if reached is None or not reached["hours"]:
        return None
    return best["consumed_tokens"] / reached["consumed_tokens"], best["hours"] / reached["hours"]
