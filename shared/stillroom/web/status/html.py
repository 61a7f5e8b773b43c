"""HTML and SVG, element by element. The one place where text becomes markup, so the one that escapes. Pure."""

from __future__ import annotations

import html

from stillroom.shown import visible

VOID = ("meta", "link", "input")


class Html(str):
    """Text that is markup already. All other text is escaped on its way into an element."""

    __slots__ = ()


def el(name: str, /, *children: str, **attributes: str | float | None) -> Html:
    """Return an element. An attribute that is None is left out; `class_` is class, `aria_label` is aria-label.

    >>> el("a", "1 < 2", href='/"', class_="x", title=None)
    '<a href="/&quot;" class="x">1 &lt; 2</a>'
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items())
    opening = f"<{name}{given}>"
    return Html(opening if name in VOID else f"{opening}{joined(*children)}</{name}>")


def joined(*children: str) -> Html:
    """Return several pieces, one behind the other."""
    return Html("".join(map(_markup, children)))


def _markup(child: str) -> str:
    return child if isinstance(child, Html) else html.escape(visible(child))


def _attribute(name: str, value: str | float | None) -> str:
    if value is None:
        return ""
    spelled = name.rstrip("_").replace("_", "-")
    return f' {spelled}="{html.escape(_number(value) if not isinstance(value, str) else value)}"'


def _number(value: float) -> str:
    """Write a number with two decimals, a hundredth of a pixel or of a percent of one."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
