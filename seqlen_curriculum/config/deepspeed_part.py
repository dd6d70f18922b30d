"""Separate DeepSpeed's part of a run's file: translate, drop and refuse keys as ``deepspeed_rules.py`` says."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from seqlen_curriculum.config.deepspeed import DeepSpeedKeys
from seqlen_curriculum.config.deepspeed_rules import (
    CLOSED,
    LISTED,
    MAY_BE_AUTO,
    MONITORS,
    PASSED,
    RENAMED,
    RULES,
    SECTIONS,
    TYPES,
    VALUES,
    VALUES_IN_ANY_CASE,
)
from seqlen_curriculum.fields import nearest, suggest
from seqlen_curriculum.strict_json import shown

__all__ = ["missing_packages", "read_by_deepspeed"]


def read_by_deepspeed(
    config: Mapping[str, Any], has_model: bool, problems: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the part of ``config`` that DeepSpeed gets, and one text for each dropped key without effect.

    ``has_model``: the file has a ``model`` section, so that this package's training loop runs. Without it the file is for a
    loop of the user's own, which may use every key that DeepSpeed reads. Refused keys are added to ``problems``.
    """
    automatic: list[str] = []
    config = _without_auto(config, "", automatic)
    config = _with_bf16(_without_max_grad_norm(config, problems), problems)
    if automatic:
        problems.append(
            f'{", ".join(automatic)}: "auto" is filled in by Hugging Face\'s Trainer only; write a value, or train with '
            "the Trainer and seqlen_curriculum.integrations.transformers"
        )
    ignored: list[str] = []
    return _apply(config, "", has_model, problems, ignored), ignored


def _without_auto(section: Mapping[str, Any], prefix: str, automatic: list[str]) -> dict[str, Any]:
    """Return a copy without keys whose value is ``"auto"``, which are added to ``automatic``."""
    kept: dict[str, Any] = {}
    for name, value in section.items():
        path = f"{prefix}{name}"
        if path not in MAY_BE_AUTO and isinstance(value, str) and value == "auto":
            automatic.append(path)
        elif path not in MAY_BE_AUTO and isinstance(value, Mapping) and path.count(".") < 4:
            kept[name] = _without_auto(value, f"{path}.", automatic)
        else:
            kept[name] = value
    return kept


def _apply(
    section: Mapping[str, Any], prefix: str, has_model: bool, problems: list[str], ignored: list[str]
) -> dict[str, Any]:
    """Return the keys of a section that DeepSpeed gets, as ``read_by_deepspeed`` does."""
    kept: dict[str, Any] = {}
    for name, value in section.items():
        path = f"{prefix}{name}"
        rule = RULES.get(path)
        applies = rule is not None and (has_model or rule.everywhere)
        is_section = isinstance(value, Mapping) and (applies or path in SECTIONS)
        if is_section and not isinstance(value.get("enabled", False), bool):
            problems.append(f"{path}.enabled: {shown(value['enabled'])} is not valid: write true or false")
        elif rule is not None and applies:
            if rule.off(value):
                continue
            if rule.has_no_effect:
                ignored.append(f"{path} ({rule.why})")
            else:
                problems.append(f"{path}: {shown(value)} is not supported: {rule.why}")
        elif is_section:
            kept[name] = _apply(value, f"{path}.", has_model, problems, ignored)
        else:
            kept[name] = value
            if path in SECTIONS and path not in DeepSpeedKeys.model_fields and value is not None:
                problems.append(f"{path}: {shown(value)} is not an object; write {{...}}")
            elif rule is None:
                _check_name(prefix, str(name), has_model, problems, ignored)
                problems += _wrong_value(path, value)
    return kept


def _check_name(prefix: str, name: str, has_model: bool, problems: list[str], ignored: list[str]) -> None:
    """Report a key that DeepSpeed does not know, unless another version of it is installed than ``LISTED``."""
    section, path = prefix.removesuffix("."), f"{prefix}{name}"
    known = SECTIONS.get(section, frozenset()) if section else PASSED | RENAMED
    # A leading underscore marks a comment.
    if name in known or name.startswith("_") or installed_deepspeed() not in ("", LISTED):
        return
    if section in CLOSED:
        meant = suggest(name, known)
        fix = f"; did you mean '{meant}'?" if meant else f"; valid names: {', '.join(sorted(known))}"
        problems.append(f"{path}: unknown key of DeepSpeed {LISTED}{fix}")
    elif has_model:
        ignored.append(f"{shown(path)[1:-1]} (DeepSpeed {LISTED} does not know it)")


def _wrong_value(path: str, value: object) -> Iterator[str]:
    """Yield one line for a value that DeepSpeed refuses."""
    if value is None or (
        path in DeepSpeedKeys.model_fields and not isinstance(value, str)
    ):  # the latter is reported there
        return
    text = str(value)[:99]
    lower = text.lower() if path in VALUES_IN_ANY_CASE else text
    if path in VALUES and not (isinstance(value, str) and lower in VALUES[path]):
        yield f"{path}: {shown(value)} is not valid{nearest(lower, VALUES[path])}"
    names = TYPES.get(path, frozenset())
    # A name that resembles none of them may be of a newer torch.
    if names and not {text, text.lower()} & names and (meant := suggest(text, names, cutoff=0.8)):
        yield f"{path}: {shown(value)} is not known; did you mean '{meant}'?"


@functools.cache
def installed_deepspeed() -> str:
    """Return the version of DeepSpeed, without importing it; empty if it is not installed."""
    try:
        return version("deepspeed")
    except PackageNotFoundError:
        return ""


def missing_packages(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each monitor that is enabled but whose package is not installed."""
    for section, package in MONITORS.items():
        monitor = config.get(section)
        enabled = isinstance(monitor, Mapping) and monitor.get("enabled")
        if enabled and importlib.util.find_spec(package) is None:
            install = package.replace("_", "-")
            yield f"{section}.enabled: true, but {package} isn't installed; pip install {install}, or set it to false"


def _with_bf16(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Rename ``bfloat16``, DeepSpeed's older name, to ``bf16`` in a copy; add a problem if both are given."""
    if "bfloat16" not in config:
        return dict(config)
    if "bf16" in config:
        problems.append("bfloat16: DeepSpeed's older name of bf16, which is given too; keep the latter")
    return {**{name: value for name, value in config.items() if name != "bfloat16"}, "bf16": config["bfloat16"]}


def _without_max_grad_norm(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Move ``optimizer.params.max_grad_norm`` to ``gradient_clipping`` in a copy; add a problem if they differ.

    DeepSpeed rejects ``max_grad_norm``, which old files still have.
    """
    optimizer = config.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, Mapping) else None
    if not isinstance(optimizer, Mapping) or not isinstance(params, Mapping) or "max_grad_norm" not in params:
        return dict(config)
    norm = params["max_grad_norm"]
    clipping = config.get("gradient_clipping", norm)
    if clipping != norm:
        problems.append(
            f"optimizer.params.max_grad_norm: {norm} differs from gradient_clipping {clipping}; keep the latter"
        )
    # Both are new mappings: the caller's file is never changed.
    rest = {name: value for name, value in params.items() if name != "max_grad_norm"}
    return {**config, "gradient_clipping": clipping, "optimizer": {**optimizer, "params": rest}}
