"""Numbers as a person reads them."""

from __future__ import annotations

import json
from typing import Any

__all__ = [
    "compact",
    "count",
    "duration",
    "gibibytes",
    "p_value",
    "plain",
    "ratio",
    "setting",
    "share",
    "significant",
    "tick",
]

_UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "K": 1e3}


def count(value: float) -> str:
    """Return ``330,000``."""
    return f"{value:,.0f}"


def compact(value: float) -> str:
    """Return three digits: ``157B``, ``4.00M``, ``330K``, ``512``."""
    for unit, size in _UNITS.items():
        # From 999.5 on three digits round up to 1000: 999,600 is 1.00M, not 1000K.
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".removesuffix(".") + unit
    return f"{value:.3g}"


def tick(value: float) -> str:
    """Return a number at an axis: ``0.002``, ``400``, ``2.5K``, ``4M``."""
    for unit, size in _UNITS.items():
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def duration(hours: float) -> str:
    """Return ``37.2 h``, ``84.0 min`` or ``8.3 s``, in the largest unit that gives at least 1.5."""
    for unit, size in {"h": 1.0, "min": 1 / 60}.items():
        if hours >= 1.5 * size:
            return f"{hours / size:,.1f} {unit}"
    return f"{hours * 3600:.1f} s"


def ratio(value: float) -> str:
    """Return ``1.8x``, as in Table 2 of the paper."""
    return f"{value:.1f}x"


def share(value: float) -> str:
    """Return ``3.68%``."""
    return f"{value:.2%}"


def plain(value: float) -> str:
    """Return three decimals, for losses and their ratios."""
    return f"{value:.3f}"


def significant(value: float) -> str:
    """Return four digits, for perplexities, learning rates and norms."""
    return f"{value:.4g}" if value < 10_000 else f"{value:,.0f}"


def p_value(value: float) -> str:
    """Return ``0.032`` or ``1.2e-18``; ``< 1e-300`` where it is too small for a float."""
    return f"{value:.2g}" if value else "< 1e-300"


def gibibytes(value: float) -> str:
    """Return bytes as ``128.0 GiB``."""
    return f"{value / 2**30:.1f} GiB"


def setting(value: Any) -> str:
    """Return a value as a configuration file has it; a dash for a key that isn't there."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
