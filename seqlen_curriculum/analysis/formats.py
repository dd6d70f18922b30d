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


def count(value: float) -> str:
    """``330,000``."""
    return f"{value:,.0f}"


def compact(value: float) -> str:
    """``157B``, ``4.00M``, ``330K``, ``512``: three digits."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".removesuffix(".") + unit
    return f"{value:.3g}"


def tick(value: float) -> str:
    """A number at an axis: ``0.002``, ``400``, ``2.5K``, ``4M``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def duration(hours: float) -> str:
    """``37.2 h``, ``1.4 min``, ``8.3 s``."""
    for size, unit in ((1.0, "h"), (1 / 60, "min")):
        if hours >= 1.5 * size:
            return f"{hours / size:,.1f} {unit}"
    return f"{hours * 3600:.1f} s"


def ratio(value: float) -> str:
    """``1.8x``, as in Table 2."""
    return f"{value:.1f}x"


def share(value: float) -> str:
    """``3.68%``."""
    return f"{value:.2%}"


def plain(value: float) -> str:
    """Three decimals, of losses and their ratios."""
    return f"{value:.3f}"


def significant(value: float) -> str:
    """Four digits, of perplexities, learning rates and norms."""
    return f"{value:.4g}" if value < 10_000 else f"{value:,.0f}"


def p_value(value: float) -> str:
    """``0.032``, ``1.2e-18``; what is too small for a float is told so."""
    return f"{value:.2g}" if value else "< 1e-300"


def gibibytes(value: float) -> str:
    """Bytes as ``128.0 GiB``."""
    return f"{value / 2**30:.1f} GiB"


def setting(value: Any) -> str:
    """A value of a configuration as its file has it; a key that isn't there is a dash."""
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
