"""What is searched for a run, in the paper's units: multiples of its learning rate warmup."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.curriculum_config import BLOCK, RampCurriculum
from seqlen_curriculum.schedule.schedule_config import DURATIONS, SIGNIFICANT
from seqlen_curriculum.tuning.search import Space

__all__ = ["Settings", "scheduled", "space_of", "warmup_steps"]

_RAMPS = ("fixed_linear", "fixed_root")
_DIFFICULTY_STEP = 8  # the paper's, for tensor cores at 16 bits


@dataclass(frozen=True)
class Settings:
    """How to search; the defaults are the paper's where it tells, all of them flags of ``scripts/tune.py``."""

    min_difficulty: int = 8
    """The first length to try; each next one is twice as long."""
    first_warmups: float = 4
    """T that lengths are tried with, in LR warmups: "a few"."""
    beginning_warmups: float = 1
    """How long the very beginning is, in LR warmups."""
    probe_warmups: float = 3
    """For how long a T must be stable, in LR warmups: the paper's 10K steps are 3.3."""
    resolution: float = 1.25
    """The ratio of one T to the next; quality depends little on T (the paper's Section 4)."""
    most_of_run: float = 0.8
    """The largest T as a share of the steps of the run it makes; of the paper's the largest is 0.77 (1.5B, batch 4K)."""
    ratio: float = SIGNIFICANT
    """A perplexity of over so many times the best before it is a significant fluctuation."""
    warmup_steps: int | None = None
    """Steps of the LR warmup, where the file doesn't tell."""
    eval_interval: int | None = None
    """Steps between a probe's evaluations; None: an eighth of the LR warmup, or the file's where that is less."""
    eval_rows: int | None = None
    """Rows of a probe's evaluations; None: the file's."""

    def check(self) -> None:
        """Raises ConfigError."""
        least = {"min_difficulty": 1, "eval_interval": 1, "eval_rows": 1, "warmup_steps": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{_flag(name)}: {value} is not valid; give {low} or more")
        for name in ("first_warmups", "beginning_warmups", "probe_warmups"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{_flag(name)}: {getattr(self, name)} is not valid; give LR warmups above 0")
        for name in ("resolution", "ratio"):
            if not 1 < getattr(self, name) < math.inf:
                raise ConfigError(f"{_flag(name)}: {getattr(self, name)} is not valid; give a ratio above 1")
        if not 0 < self.most_of_run <= 1:
            raise ConfigError(f"{_flag('most_of_run')}: {self.most_of_run} is no share of a run; give one up to 1")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def scheduled(raw: Mapping[str, Any], min_difficulty: int, **duration: float) -> dict[str, Any]:
    """The file ``raw`` with a ramp from ``min_difficulty`` of a ``duration``, such as ``total_curriculum_step=100``.

    The rest of its schedule stays; without one it gets the paper's, linear in multiples of 8. ConfigError if it is no ramp.
    """
    changed = copy.deepcopy(dict(raw))
    block = changed.get(BLOCK)
    if not isinstance(block, dict) or block.get("enabled") is False:
        full_length = changed.get("data", {}).get("seq_length")
        block = {"curriculum_type": "seqlen", "max_difficulty": full_length, "schedule_type": "fixed_linear"}
        block["schedule_config"] = {"difficulty_step": _DIFFICULTY_STEP}
    if block.get("schedule_type") not in _RAMPS:
        raise ConfigError(
            f"{BLOCK}.schedule_type: {block.get('schedule_type')!r} has no T to search; give {' or '.join(_RAMPS)}, or "
            "leave the block out"
        )
    kept = {name: value for name, value in block.get("schedule_config", {}).items() if name not in DURATIONS}
    block = {**block, "enabled": True, "min_difficulty": min_difficulty, "schedule_config": {**duration, **kept}}
    changed[BLOCK] = block
    return changed


def warmup_steps(config: RunConfig) -> int | None:
    """Steps of the LR warmup at full length, None where the file tells none."""
    if config.scheduler is None or config.data is None:
        return None
    params, rows = config.scheduler.params, config.global_batch
    tokens = params.warmup_tokens or (params.warmup_samples or 0) * config.data.seq_length
    return params.warmup_steps or -(-tokens // (rows * config.data.seq_length)) or None


def space_of(raw: Mapping[str, Any], settings: Settings) -> Space:
    """The space for the run of the file ``raw``. Raises ConfigError."""
    settings.check()
    config = RunConfig.from_dict(scheduled(raw, settings.min_difficulty, curriculum_fraction=settings.most_of_run))
    warmup = settings.warmup_steps or warmup_steps(config)
    if warmup is None:
        raise ConfigError(
            "scheduler.params: tells no LR warmup, and the search counts in it; give warmup_steps, warmup_samples or "
            "warmup_tokens of TokenCosineLR there, or --warmup-steps"
        )
    beginning, probe = (math.ceil(warmups * warmup) for warmups in (settings.beginning_warmups, settings.probe_warmups))
    interval = _eval_interval(config, settings, warmup)
    shortest = min(beginning, probe)
    if 2 * interval > shortest:
        raise ConfigError(
            f"--eval-interval: {interval} leaves fewer than two evaluations to compare in {shortest} steps; lower it, or "
            "raise --beginning-warmups and --probe-warmups"
        )
    longest = config.curriculum_scheduler().pacing.settles_at
    assert longest is not None
    totals = _totals(min(warmup, longest), longest, settings.resolution)
    first = settings.first_warmups * warmup
    return Space(
        lengths=_lengths(settings.min_difficulty, config),
        totals=totals,
        first_total=min(totals, key=lambda total: abs(math.log(total / first))),
        beginning_steps=beginning,
        probe_steps=probe,
        eval_interval=interval,
    )


def _eval_interval(config: RunConfig, settings: Settings, warmup: int) -> int:
    own = config.training.eval_interval if config.training else 0
    return settings.eval_interval or min(max(1, warmup // 8), own or warmup)


def _totals(shortest: int, longest: int, resolution: float) -> tuple[int, ...]:
    """From the longest down, each shorter by ``resolution``, to about the shortest."""
    count = round(math.log(longest / shortest) / math.log(resolution))
    return tuple(sorted({max(1, round(longest / resolution**number)) for number in range(count + 1)}))


def _lengths(shortest: int, config: RunConfig) -> tuple[int, ...]:
    """From the first length on, doubling, below full length."""
    curriculum = config.curriculum
    assert isinstance(curriculum, RampCurriculum)
    step, longest = curriculum.schedule_config.difficulty_step, curriculum.max_difficulty
    first = -(-shortest // step) * step
    if first >= longest:
        raise ConfigError(
            f"--min-difficulty: {shortest} is not below the longest length {longest} (in multiples of {step}); lower it"
        )
    return tuple(first * 2**number for number in range(longest.bit_length()) if first * 2**number < longest)
