"""The runs of a study: its cases, crossed with variants, learning rates and seeds."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seqlen_curriculum.config.run import RunConfig

__all__ = ["RATE", "SEED", "Arm", "PlannedRun", "StudyPlan", "merge_patch"]

RATE, SEED = "optimizer.params.lr", "training.seed"
"""The keys that a study sets."""


@dataclass(frozen=True)
class Arm:
    """A case with one of its variants."""

    case: str
    variant: str
    """Empty in a study without variants."""
    raw: dict[str, Any]
    """Its configuration, with the learning rate and the seed of the base."""

    @property
    def name(self) -> str:
        """``CASE``, or ``CASE.VARIANT``."""
        return f"{self.case}.{self.variant}" if self.variant else self.case


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    arm: Arm
    rate: float | None
    """Its learning rate; None for that of its configuration."""
    seed: int
    raw: dict[str, Any]
    """Its configuration."""

    @property
    def config(self) -> RunConfig:
        """The parsed configuration."""
        return RunConfig.from_dict(self.raw)

    @property
    def name(self) -> str:
        """The name of its folder: ``CASE.VARIANT/lr0.003-seed1``."""
        rate = "" if self.rate is None else f"lr{self.rate!r}-"
        return f"{self.arm.name}/{rate}seed{self.seed}"


@dataclass(frozen=True)
class StudyPlan:
    """A checked study."""

    arms: list[Arm]
    rates: list[float]
    """Learning rates that are tried for each arm; empty if each keeps its own."""
    tuning_seeds: list[int]
    seeds: list[int]
    """Seeds of the comparison, disjoint from ``tuning_seeds``."""
    reference: str
    """The name of a case, or of an arm."""

    @property
    def tried(self) -> list[float | None]:
        """The rates at which each arm is trained; None is its own."""
        return [*self.rates] or [None]

    def run(self, arm: Arm, rate: float | None, seed: int) -> PlannedRun:
        """Return one run."""
        raw = copy.deepcopy(arm.raw)
        if isinstance(raw.get("training"), dict):
            raw["training"]["seed"] = seed
        optimizer = raw.get("optimizer")
        if rate is not None and isinstance(optimizer, dict):
            optimizer["params"] = {**(optimizer.get("params") or {}), "lr": rate}
        return PlannedRun(arm, rate, seed, raw)

    def tuning_runs(self) -> list[PlannedRun]:
        """Return the runs that compare the rates of each arm, one seed after the other."""
        order = itertools.product(self.tuning_seeds, self.arms, self.rates)
        return [self.run(arm, rate, seed) for seed, arm, rate in order]

    def measured_runs(self, rates: Mapping[str, float | None]) -> list[PlannedRun]:
        """Return the runs that compare the arms named in ``rates``, each at its rate there."""
        arms = [arm for arm in self.arms if arm.name in rates]
        return [self.run(arm, rates[arm.name], seed) for seed, arm in itertools.product(self.seeds, arms)]

    def references(self) -> list[Arm]:
        """Return the arms that ``reference`` names: one, or all variants of a case."""
        return [arm for arm in self.arms if self.reference in (arm.case, arm.name)]


def merge_patch(target: Any, patch: Any) -> Any:
    """Return ``target`` after a JSON merge patch (RFC 7386): objects are merged, null deletes, all else replaces."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged
