"""The search space of a run, in multiples of its learning rate warmup, as in the paper."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import Flags
from seqlen_curriculum.schedule.curriculum_config import BLOCK, RampCurriculum
from seqlen_curriculum.schedule.piecewise import ceil_div
from seqlen_curriculum.schedule.schedule_config import DURATIONS, SIGNIFICANT
from seqlen_curriculum.tuning.search import Space

__all__ = ["Budget", "Settings", "doubled_lengths", "scheduled", "space_of", "spaced_totals", "warmup_steps"]

_RAMPS = ("fixed_linear", "fixed_root")
_MOST_TOTALS = 1000
_DIFFICULTY_STEP = 8  # the paper's, for tensor cores at 16 bits


class Budget(Flags):
    """Limits for all probes together (flags of ``slw tune``). Raises ConfigError for values out of range."""

    max_share: float = Field(default=0.2, gt=0, lt=1e6)
    """Tokens as a fraction of the training tokens."""
    max_minutes: float = Field(default=math.inf, gt=0, allow_inf_nan=True)
    """Minutes over all calls."""


class Settings(Flags):
    """Settings of the search (flags of ``slw tune``), with the paper's values as defaults where it gives them.

    Raises ConfigError for values out of range.
    """

    min_difficulty: int = Field(default=8, ge=1)
    """The first length to try. Each next one is twice as long."""
    first_warmups: float = Field(default=4, gt=0)
    """The T used to probe lengths, in LR warmups (the paper: "a few")."""
    beginning_warmups: float = Field(default=1, gt=0)
    """The steps over which a length must be stable, in LR warmups."""
    probe_warmups: float = Field(default=3, gt=0)
    """The steps over which a T must be stable, in LR warmups (the paper's 10K steps are 3.3)."""
    resolution: float = Field(default=1.25, gt=1)
    """The ratio of successive values of T. Quality depends little on T (the paper's Section 4)."""
    most_of_run: float = Field(default=0.8, gt=0, le=1)
    """The largest T as a fraction of the steps of its run. The paper's largest is 0.77 (1.5B, batch 4K)."""
    ratio: float = Field(default=SIGNIFICANT, gt=1)
    """A perplexity above this multiple of the best before it is a significant fluctuation."""
    warmup_steps: int | None = Field(default=None, ge=1)
    """Steps of the LR warmup, if the configuration has none."""
    eval_interval: int | None = Field(default=None, ge=1)
    """Steps between evaluations of a probe. None: 1/8 of the LR warmup, or the configuration's interval if smaller."""
    eval_rows: int | None = Field(default=None, ge=1)
    """Rows of a probe's evaluations. None: as in the configuration."""


def scheduled(raw: Mapping[str, Any], min_difficulty: int, **duration: float) -> dict[str, Any]:
    """Return the configuration ``raw`` with a ramp from ``min_difficulty``.

    ``duration`` is one key, such as ``total_curriculum_step=100``. The rest of the schedule is kept; the default is the
    paper's, linear in multiples of 8. Raises ConfigError if the schedule is not a ramp.
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
    """Return the steps of the LR warmup at full length, None if the configuration has no warmup."""
    if config.scheduler is None or config.data is None:
        return None
    params = config.scheduler.params
    tokens = params.warmup_tokens or (params.warmup_samples or 0) * config.data.seq_length
    tokens_per_step = config.global_batch * config.data.seq_length
    return params.warmup_steps or ceil_div(tokens, tokens_per_step) or None


def space_of(raw: Mapping[str, Any], settings: Settings) -> Space:
    """Return the search space for the run of the configuration ``raw``. Raises ConfigError."""
    # A longer T also lengthens the run, because short steps consume fewer tokens. The configuration solves that for
    # ``curriculum_fraction``; the resulting T is the largest one to search.
    config = RunConfig.from_dict(scheduled(raw, settings.min_difficulty, curriculum_fraction=settings.most_of_run))
    warmup = settings.warmup_steps or warmup_steps(config)
    if warmup is None:
        raise ConfigError(
            "scheduler.params: no LR warmup, which is the unit of the search; give warmup_steps, warmup_samples or "
            "warmup_tokens there (scheduler.type TokenCosineLR, TokenLinearLR or TokenWSDLR), or --warmup-steps"
        )
    beginning = math.ceil(settings.beginning_warmups * warmup)
    probe = math.ceil(settings.probe_warmups * warmup)
    own_interval = config.training.eval_interval if config.training else 0
    interval = settings.eval_interval or min(max(1, warmup // 8), own_interval or warmup)
    # A ratio to the best so far needs two evaluations: with an interval of 3, a probe of 5 steps has only one.
    shortest_probe = min(beginning, probe)
    if 2 * interval > shortest_probe:
        raise ConfigError(
            f"--eval-interval: {interval} leaves fewer than two evaluations to compare in {shortest_probe} steps; lower it, "
            "or raise --beginning-warmups and --probe-warmups"
        )
    curriculum = config.curriculum
    assert isinstance(curriculum, RampCurriculum)
    longest = config.curriculum_scheduler().pacing.settles_at
    assert longest is not None
    totals = spaced_totals(min(warmup, longest), longest, settings.resolution)
    first = settings.first_warmups * warmup
    return Space(
        lengths=doubled_lengths(settings.min_difficulty, curriculum),
        totals=totals,
        # Nearest by ratio: for 4 warmups of 5 steps = 20, T 40 and T 10 are equally far, T 30 is nearer.
        first_total=min(totals, key=lambda total: abs(math.log(total / first))),
        beginning_steps=beginning,
        probe_steps=probe,
        eval_interval=interval,
    )


def spaced_totals(shortest: int, longest: int, resolution: float) -> tuple[int, ...]:
    """Return values of T, ascending, from about ``shortest`` to ``longest`` with the ratio ``resolution``."""
    # From 80 down to 5 by 2: log(80 / 5) / log(2) = 4 divisions, so 5, 10, 20, 40, 80.
    divisions = round(math.log(longest / shortest) / math.log(resolution))
    if divisions > _MOST_TOTALS:
        raise ConfigError(
            f"--resolution: {resolution} gives {divisions:,} values of T from {shortest} to {longest}, at most "
            f"{_MOST_TOTALS:,} are searched; raise it"
        )
    return tuple(sorted({max(1, round(longest / resolution**number)) for number in range(divisions + 1)}))


def doubled_lengths(shortest: int, curriculum: RampCurriculum) -> tuple[int, ...]:
    """Return lengths from ``shortest`` on, each twice the previous one, below full length. ConfigError if there are none."""
    step, full = curriculum.schedule_config.difficulty_step, curriculum.max_difficulty
    length = ceil_div(shortest, step) * step  # 5 in multiples of 4 is 8
    if length >= full:
        raise ConfigError(
            f"--min-difficulty: {shortest} is not below the longest length {full} (in multiples of {step}); lower it"
        )
    lengths = []
    while length < full:
        lengths.append(length)
        length *= 2
    return tuple(lengths)
