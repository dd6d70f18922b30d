"""Read and check the file of a study before any of its runs starts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from seqlen_curriculum.config.run import RunConfig
from seqlen_curriculum.config.run_file import SCHEMA_KEY, absolute_paths, paths_beside, read_run_file
from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.fields import CountOrZero, Section, describe_errors, flat, nearest
from seqlen_curriculum.files import read_json
from seqlen_curriculum.shipped import shipped_configs, shipped_studies
from seqlen_curriculum.study.plan import RATE, SEED, Arm, StudyPlan, merge_patch

__all__ = ["StudyFile", "comparison_warnings", "read_study"]

_SECTIONS = ("optimizer", "model", "data", "training")
_MOST_RUNS = 10_000
_SCHEDULED_RATES = ("warmup_max_lr", "cycle_max_lr", "lr_range_test_min_lr", "max_lr", "base_lr")
"""Parameters of DeepSpeed's and torch's schedulers that replace the optimizer's learning rate."""
_DEFAULT_RATES = {"WarmupDecayLR": "warmup_max_lr", "LRRangeTest": "lr_range_test_min_lr"}
"""Parameters that replace it even if they are not given, by type of scheduler."""


def _as_folder(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"{name!r} is not valid as the name of a folder; use letters, digits, _ and -")
    return name


def _unlike(values: Sequence[Any]) -> Sequence[Any]:
    if repeated := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{repeated[0]} is given twice; give each once")
    return values


Name = Annotated[str, AfterValidator(_as_folder)]
Patches = dict[Name, dict[str, Any]]
Seeds = Annotated[list[CountOrZero], AfterValidator(_unlike)]
Rates = Annotated[list[Annotated[float, Field(gt=0)]], AfterValidator(_unlike)]


class StudyFile(Section):
    """The content of a study's file."""

    run: Annotated[str, Field(min_length=1)]
    """The base configuration: a run's file, relative to the study's, or the name of a shipped configuration."""
    cases: Annotated[Patches, Field(min_length=1)]
    """JSON merge patches (RFC 7386) of the base configuration by name. ``{}`` is the base itself, null deletes a key."""
    variants: Patches = Field(default_factory=dict)
    """Merge patches of each case. Every case is trained with every variant."""
    rates: Rates = Field(default_factory=list)
    """Values of ``optimizer.params.lr`` to try for each case and variant. Without them each keeps its own rate."""
    tuning_seeds: Seeds = Field(default_factory=list)
    """Values of ``training.seed`` on which the rates are compared."""
    seeds: Annotated[Seeds, Field(min_length=1)]
    """Values of ``training.seed`` on which the cases are compared, each at its best rate."""
    reference: str | None = None
    """The case, or CASE.VARIANT, to compare with; default: the first case. Of a case, the best-tuned variant."""

    @model_validator(mode="after")
    def _tunable(self) -> Self:
        if self.rates and not self.tuning_seeds:
            raise ValueError("tuning_seeds: required with rates, but not given; give one or more seeds")
        if self.tuning_seeds and not self.rates:
            raise ValueError("tuning_seeds: have no effect without rates; give rates too, or leave both out")
        if shared := sorted({*self.seeds} & {*self.tuning_seeds}):
            raise ValueError(
                f"seeds: {shared[0]} is one of tuning_seeds too; give other seeds, so that the comparison is on runs that "
                "tuning has not seen"
            )
        return self


def read_study(path: Path) -> StudyPlan:
    """Return the plan of a study, after checking the configuration of each of its runs.

    ``path`` is a file, or the name of a shipped study. The file may contain comments; top-level keys that start with ``_``
    are comments too. Raises ConfigError.
    """
    studies = shipped_studies()
    if not path.exists():
        if str(path) not in studies:
            raise ConfigError(f"is neither a file nor a shipped study{nearest(str(path), studies)}", str(path))
        path = studies[str(path)]
    raw = {key: value for key, value in read_json(path, comments=True).items() if key != SCHEMA_KEY and key[:1] != "_"}
    try:
        study = StudyFile.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, StudyFile), str(path)) from None
    base = read_run_file(_base_file(study.run, path))
    arms = [
        Arm(case, variant, _configured(base, patches, path.parent))
        for case, patch in study.cases.items()
        for variant, patches in ([(name, [patch, more]) for name, more in study.variants.items()] or [("", [patch])])
    ]
    plan = StudyPlan(arms, study.rates, study.tuning_seeds, study.seeds, study.reference or next(iter(study.cases)))
    problems = [*_reserved(study), *_unknown_reference(plan), *_too_many(plan)] or [*_run_problems(plan)]
    if problems := problems or [*_different_targets(plan)]:
        raise ConfigError(problems, str(path))
    return plan


def _base_file(run: str, study: Path) -> Path:
    """Return the file of the base configuration: beside the study's file, else a shipped one. Raises ConfigError."""
    beside = study.parent / run
    if beside.exists():
        return beside
    configs = shipped_configs()
    if run not in configs:
        raise ConfigError(
            f"run: {run!r} is neither a file nor a shipped configuration{nearest(run, configs)}", str(study)
        )
    return configs[run]


def _configured(base: Mapping[str, Any], patches: Sequence[Any], folder: Path) -> dict[str, Any]:
    raw: Any = base
    for patch in patches:
        raw = merge_patch(raw, patch)
    return absolute_paths(paths_beside(raw, folder))


def _reserved(study: StudyFile) -> Iterator[str]:
    """Yield a problem for each patch of a key that the study sets itself."""
    for group in ("cases", "variants"):
        for name, patch in getattr(study, group).items():
            keys = dict(flat(patch))
            if SEED in keys:
                yield f"{group}.{name}.{SEED}: the study sets it; give seeds instead"
            if RATE in keys and study.rates:
                yield f"{group}.{name}.{RATE}: rates sets it; leave one of them out"


def _unknown_reference(plan: StudyPlan) -> Iterator[str]:
    names = {name for arm in plan.arms for name in (arm.case, arm.name)}
    if plan.reference not in names:
        yield f"reference: {plan.reference!r} is not a case{nearest(plan.reference, names)}"


def _too_many(plan: StudyPlan) -> Iterator[str]:
    runs = len(plan.arms) * (len(plan.rates) * len(plan.tuning_seeds) + len(plan.seeds))
    if runs > _MOST_RUNS:
        yield f"cases: with variants, rates and seeds these are {runs:,} runs, at most {_MOST_RUNS:,} are possible"


def _run_problems(plan: StudyPlan) -> Iterator[str]:
    """Yield the problems of the configurations; each case is checked at each of its rates."""
    for arm in plan.arms:
        for rate in plan.tried:
            try:
                config = RunConfig.from_dict(plan.run(arm, rate, plan.seeds[0]).raw, require=_SECTIONS)
                config.for_ranks(1)
            except ConfigError as error:
                yield from (f"{arm.name}: {problem}" for problem in error.problems)
                break
            assert config.training is not None
            if not config.training.eval_interval:
                yield f"{arm.name}: training.eval_interval: required, because a study compares validation losses"
            if rate is not None and (scheduled := _scheduled_rate(config)):
                yield f"{arm.name}: scheduler.params.{scheduled}: replaces optimizer.params.lr, so rates have no effect"
                break


def _different_targets(plan: StudyPlan) -> Iterator[str]:
    """Yield a problem for each arm whose validation loss is the mean over other targets than that of the first arm."""
    targets = {arm.name: _validation_targets(plan.run(arm, None, plan.seeds[0]).config) for arm in plan.arms}
    first = plan.arms[0].name
    for name, own in targets.items():
        for key in [key for key, value in own.items() if value != targets[first][key]]:
            yield (
                f"{name}: {key}: {json.dumps(own[key])}, but {first} has {json.dumps(targets[first][key])}; validation "
                "losses are compared, so give all cases the same value"
            )


def _validation_targets(config: RunConfig) -> dict[str, Any]:
    """Return the settings that select the targets of a validation loss, by key."""
    data, training = config.data, config.training
    assert data is not None
    assert training is not None
    return {
        "data.train": data.train if data.valid is None else None,
        "data.split": data.split if data.valid is None else None,
        "data.valid": data.valid,
        "data.seq_length": data.seq_length,
        "data.eod_mask_loss": data.eod_mask_loss,
        "training.eval_rows": training.eval_rows,
        "training.objective": training.objective,
        "training.mlm_probability": training.mlm_probability,
    }


def comparison_warnings(plan: StudyPlan) -> Iterator[str]:
    """Yield a warning if the validation losses of some arms are those within documents."""
    attention = {arm.name: arm.raw["data"].get("attention", "row") for arm in plan.arms}
    if len({*attention.values()}) > 1:
        names = ", ".join(name for name, value in attention.items() if value == "document")
        yield f'{names}: with data.attention "document" a validation loss is that within documents, of the same targets'


def _scheduled_rate(config: RunConfig) -> str | None:
    """Return the parameter of the scheduler that replaces the optimizer's rate, None without one."""
    section = config.deepspeed.get("scheduler")
    if not isinstance(section, Mapping):
        return None
    params = section.get("params") or {}
    return next((key for key in _SCHEDULED_RATES if key in params), _DEFAULT_RATES.get(str(section.get("type"))))
