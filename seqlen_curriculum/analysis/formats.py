"""Format numbers for people to read."""

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
    """Format as ``330,000``."""
    return f"{value:,.0f}"


def compact(value: float) -> str:
    """Format with three digits: ``157B``, ``4.00M``, ``330K``, ``512``."""
    for unit, size in _UNITS.items():
        # With three digits, 999.5 and above round up to 1000: 999,600 is 1.00M, not 1000K.
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".removesuffix(".") + unit
    return f"{value:.3g}"


def tick(value: float) -> str:
    """Format the label of a tick: ``0.002``, ``400``, ``2.5K``, ``4M``."""
    for unit, size in _UNITS.items():
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def duration(hours: float) -> str:
    """Format as ``37.2 h``, ``84.0 min`` or ``8.3 s``, in the largest unit that gives at least 1.5."""
    for unit, size in {"h": 1.0, "min": 1 / 60}.items():
        if hours >= 1.5 * size:
            return f"{hours / size:,.1f} {unit}"
    return f"{hours * 3600:.1f} s"


def ratio(value: float) -> str:
    """Format as ``1.8x``, as in Table 2 of the paper."""
    return f"{value:.1f}x"


def share(value: float) -> str:
    """Format as ``3.68%``."""
    return f"{value:.2%}"


def plain(value: float) -> str:
    """Format losses and their ratios, with three decimals."""
    return f"{value:.3f}"


def significant(value: float) -> str:
    """Format perplexities, learning rates and norms, with four digits."""
    return f"{value:.4g}" if value < 10_000 else f"{value:,.0f}"


def p_value(value: float) -> str:
    """Format as ``0.032`` or ``1.2e-18``, and as ``< 1e-300`` if it is too small for a float."""
    return f"{value:.2g}" if value else "< 1e-300"


def gibibytes(value: float) -> str:
    """Format bytes as ``128.0 GiB``."""
    return f"{value / 2**30:.1f} GiB"


def setting(value: Any) -> str:
    """Format a value as in a configuration file, and a missing one as a dash."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
