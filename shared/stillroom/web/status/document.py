"""An HTML document of ours: its head, its one style sheet, and the headers that it is sent with. Pure."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from stillroom.web.status.html import Html, el

STYLE = files(__package__).joinpath("style.css").read_text("utf-8")
# The one style sheet, named by its hash; images: the icon of the tab, which is in the page too.
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = (
    ("Content-Type", "text/html; charset=utf-8"),
    (
        "Content-Security-Policy",
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
)


def document(
    title: str, body: Html, *, icon: str | None = None, reload_s: int | None = None
) -> str:
    """Return the document.

    `icon`: the address of the icon in the browser's tab. `reload_s`: the browser reloads after so many seconds.
    """
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="robots", content="noindex"),
        el("meta", http_equiv="refresh", content=str(reload_s)) if reload_s else "",
        el("title", title),
        "" if icon is None else el("link", rel="icon", href=icon),
        el("style", Html(STYLE)),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"
