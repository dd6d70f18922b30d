"""HTML from values: whatever isn't markup already is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["Markup", "joined", "table", "tag"]

_VOID = {"meta"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | None) -> Markup:
    """``<name class="x" data-key="y">...</name>`` of ``class_="x", data_key="y"``; an attribute of None is left out."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{told}>" if name in _VOID else f"<{name}{told}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Markup:
    """The parts one after the other."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], class_: str | None = None) -> Markup:
    """A table in a box that scrolls by itself; the first cell of a row names it. Nothing for no rows."""
    if not rows:
        return Markup()
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    heads = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    title = tag("caption", tag("span", caption))
    whole = tag("table", title, heads, tag("tbody", *body), class_=class_)
    return tag("div", whole, class_="scrolls", tabindex="0", role="region", aria_label=caption)
