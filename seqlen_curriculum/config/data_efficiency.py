"""Read the curriculum of a file, from ``curriculum_learning`` or from DeepSpeed's ``data_efficiency`` section.

That section has the keys of the ``curriculum_learning`` block one metric deeper, beside those of a sampler that this package
doesn't have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from seqlen_curriculum.errors import ConfigError
from seqlen_curriculum.schedule.curriculum_config import (
    BLOCK,
    CurriculumConfig,
    constant_curriculum,
    curriculum_problems,
)
from seqlen_curriculum.strict_json import shown

__all__ = ["parse_curriculum", "with_one_curriculum"]

_METHODS = {"seqlen": "truncate", "seqlen_truncate": "truncate", "seqlen_reshape": "segment"}
"""How samples are shortened, by metric. Megatron-DeepSpeed names its two methods after these metrics."""
_OF_SAMPLER = ("index_to_sample_path", "index_to_metric_path", "difficulty_type", "clustering_type")
"""Keys of a metric that say how DeepSpeed's sampler finds samples of a difficulty."""
_SAMPLING = "data_efficiency.data_sampling"
_CURRICULUM = f"{_SAMPLING}.{BLOCK}"
_METRICS = f"{_CURRICULUM}.curriculum_metrics"
_OTHER_METHODS = {
    "data_routing.random_ltd": "random layer token dropping is not supported",
    "data_sampling.dynamic_batching": f"batches of mixed lengths are not supported ({BLOCK}.batch_growth has equal ones)",
}


def with_one_curriculum(raw: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, Any], str, list[str]]:
    """Return (``raw`` with the metric of ``data_efficiency`` as ``curriculum_learning``, its key path, unused keys).

    A section that is off is dropped. Adds problems for what can't be read: metrics other than a sequence length, random
    layer token dropping, dynamic batching, and a curriculum in both places.
    """
    rest = {name: value for name, value in raw.items() if name != "data_efficiency"}
    section = raw.get("data_efficiency")
    try:
        if section is None or not _is_on(section, "data_efficiency", required=False):
            return rest, BLOCK, []
        problems += _other_methods(section)
        found = _metric(section)
        if found is None:
            return rest, BLOCK, []
        if raw.get(BLOCK) is not None:
            raise ConfigError(
                f"{_CURRICULUM}: given beside {BLOCK}, the older place of the same block; keep one of them"
            )
    except ConfigError as error:
        problems += error.problems
        return rest, BLOCK, []
    metric, block = found
    unused = [f"{path} (training.seed orders the samples)" for path in _sampler_keys(section, metric)]
    kept = {name: value for name, value in block.items() if name not in _OF_SAMPLER}
    return {**rest, BLOCK: {"enabled": True, "method": _METHODS[metric], **kept}}, f"{_METRICS}.{metric}", unused


def parse_curriculum(raw: Mapping[str, Any], path: str, problems: list[str]) -> CurriculumConfig | None:
    """Read the block if it is enabled. DeepSpeed silently read a missing ``enabled`` as false; here it is required.

    ``path``: the key path of the block in the file, for messages.
    """
    block = raw.get(BLOCK)
    if block is None:
        return None
    if isinstance(block, Mapping) and "enabled" not in block:
        problems.append("curriculum_learning.enabled: required, but not given; write true or false")
    if isinstance(block, Mapping) and block.get("enabled") is False:
        full = block.get("max_difficulty")  # without a data section this is the only source of the full length
        if isinstance(full, int) and not isinstance(full, bool) and full > 0 and raw.get("data") is None:
            return constant_curriculum(full)
        return None
    config, block_problems = curriculum_problems(block)
    problems += [path + problem.removeprefix(BLOCK) for problem in block_problems]
    return config


def _object(value: object, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: {shown(value)} is not an object; write {{...}}")
    return value


def _is_on(value: object, path: str, required: bool = True) -> bool:
    """Return ``enabled`` of a section. DeepSpeed takes a missing one for false; here it may be ``required``."""
    section = _object(value, path)
    if "enabled" not in section:
        if required:
            raise ConfigError(f"{path}.enabled: required, but not given; write true or false")
        return True
    if not isinstance(section["enabled"], bool):
        raise ConfigError(f"{path}.enabled: {shown(section['enabled'])} is not valid; write true or false")
    return section["enabled"]


def _other_methods(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each other method that the section enables."""
    for path, reason in _OTHER_METHODS.items():
        outer, inner = path.split(".")
        block = section.get(outer)
        method = block.get(inner) if isinstance(block, Mapping) else None
        if method and _is_on(method, f"data_efficiency.{path}", required=False):
            yield f"data_efficiency.{path}: {reason}; remove it, or set enabled to false"


def _metric(section: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return the name and the block of the one metric; None without a curriculum that is on. Raises ConfigError."""
    sampling = section.get("data_sampling")
    if sampling is None or not _is_on(section, "data_efficiency") or not _is_on(sampling, _SAMPLING):
        return None
    curriculum = sampling.get(BLOCK)
    if curriculum is None or not _is_on(curriculum, _CURRICULUM):
        return None
    metrics = _object(curriculum.get("curriculum_metrics"), _METRICS)
    if refused := [f"{_METRICS}.{name}: is not supported" for name in metrics if name not in _METHODS]:
        raise ConfigError([f"{line}; keep one metric of {', '.join(_METHODS)}" for line in refused])
    if len(metrics) != 1:
        raise ConfigError(f"{_METRICS}: {', '.join(metrics) or 'none'} given; keep one metric of {', '.join(_METHODS)}")
    ((metric, value),) = metrics.items()
    block = _object(value, f"{_METRICS}.{metric}")
    if (kind := block.get("difficulty_type", "value")) != "value":
        raise ConfigError(
            f'{_METRICS}.{metric}.difficulty_type: {shown(kind)} counts samples, not tokens; set it to "value", and '
            "min_difficulty and max_difficulty to lengths in tokens"
        )
    return metric, block


def _sampler_keys(section: Mapping[str, Any], metric: str) -> Iterator[str]:
    """Yield the paths of the keys of DeepSpeed's sampler that are given."""
    sampling = section["data_sampling"]
    curriculum = sampling[BLOCK]
    places = {
        "data_efficiency": (section, ("seed",)),
        _SAMPLING: (sampling, ("num_epochs", "num_workers", "pin_memory")),
        _CURRICULUM: (curriculum, ("data_cluster_path",)),
        f"{_METRICS}.{metric}": (
            curriculum["curriculum_metrics"][metric],
            ("index_to_sample_path", "index_to_metric_path"),
        ),
    }
    for path, (place, names) in places.items():
        yield from (f"{path}.{name}" for name in names if name in place)
