"""The page at /operate: what an operator may look at and do. Plain HTML forms, no script. Pure.

A form is good for an hour or two, and only on this page: it carries a code that is made from the health token. A
browser that knows the password would send it with another site's form as well.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import parse_qs

from stillroom.acts import ACTS, Button, Done, Form, Row
from stillroom.web.origin import is_of
from stillroom.web.status.document import HEADERS as STATUS_HEADERS
from stillroom.web.status.document import document
from stillroom.web.status.html import Html, el
from stillroom.web.status.numbers import clock_with_seconds, iso

BODY_LIMIT = 16 * 1024
FIELDS_LIMIT = 20
CODE_S = 3_600.0  # a code is good in the hour it was made in, and in the next
HOURS = (-1, 0, 1)  # and in the one before: the clock of who made it may be ahead
CODE_FIELD = "code"
HEADERS = tuple(
    (name, value.replace("form-action 'none'", "form-action 'self'"))
    for name, value in STATUS_HEADERS
)
# The acts that are offered at the top; the others are offered in the rows of these.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Cache": ("look", "invalidate", "invalidate_tag", "invalidate_pattern", "load"),
    "Sessions": ("sessions", "end_sessions"),
    "Bans": ("bans", "ban", "lift"),
    "Limits": ("limits", "peek", "reset"),
    "Workers": ("letters", "pause", "resume"),
}


def code(secret: bytes, now: float, ago: int = 0) -> str:
    """Return the code of the forms of this hour, or of one before it."""
    hour = int(now // CODE_S) - ago
    return hmac.new(secret, b"stillroom operate %d" % hour, hashlib.sha256).hexdigest()


def is_good(given: str, secret: bytes, now: float) -> bool:
    """Return whether a form has a code that is good now."""
    return any(hmac.compare_digest(given.encode(), code(secret, now, n).encode()) for n in HOURS)


def is_from_here(headers: Mapping[str, str]) -> bool:
    """Return whether a form may come from this site. A client that is no browser does not say, and may send it."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = headers.get("origin")
    return origin is None or is_of(origin, headers.get("host", ""))


def form_of(body: bytes) -> dict[str, str]:
    """Return the fields of a form; none of a body that is no form."""
    try:
        given = parse_qs(body.decode(), max_num_fields=FIELDS_LIMIT)
    except ValueError:
        return {}
    return {name: values[-1] for name, values in given.items()}


def render(secret: bytes, now: float, done: Done | None = None, wrong: str = "") -> str:
    """Return the whole page, with what came of the act before."""
    hidden = code(secret, now)
    groups = [
        el(
            "section",
            el("h2", title),
            el("ul", *(_form_of_act(name, hidden) for name in names), class_="acts"),
        )
        for title, names in GROUPS.items()
    ]
    body = el(
        "body",
        el(
            "header",
            el("p", el("strong", "Stillroom"), " operate", class_="brand"),
            el("p", el("a", "Status", href="status"), class_="checked"),
        ),
        el("main", _outcome(done, wrong, hidden), *groups),
    )
    return document("Operate – Stillroom", body)


def _outcome(done: Done | None, wrong: str, hidden: str) -> Html:
    if wrong:
        return el("section", el("p", wrong, class_="what"), class_="outcome fail", role="alert")
    if done is None:
        return el("section", el("p", "Every act leaves a line in the log.", class_="nothing"))
    said = el("p", done.said, class_="what", role="status")
    if not done.rows:
        return el("section", said, class_="outcome")
    heads = el("tr", *(el("th", head, scope="col") for head in done.heads), el("th", ""))
    rows = [_row(row, done.heads, hidden) for row in done.rows]
    table = el("table", el("thead", heads), el("tbody", *rows))
    return el("section", said, el("div", table, class_="stacks"), class_="outcome")


def _row(row: Row, heads: tuple[str, ...], hidden: str) -> Html:
    labels = [*heads, *[""] * len(row.cells)]
    cells = [
        el("td", el("span", _cell(cell)), data_label=label or None)
        for cell, label in zip(row.cells, labels, strict=False)
    ]
    return el("tr", *cells, el("td", *(_button(one, hidden) for one in row.buttons)))


def _cell(cell: str | float) -> str:
    if isinstance(cell, str):
        return cell
    try:
        said = f"{iso(cell)[:10]} {clock_with_seconds(cell)} UTC"
    except (ValueError, OverflowError, OSError):  # another program wrote what no calendar has
        return f"{cell:g}"
    return el("time", said, datetime=iso(cell))


def _form_of_act(name: str, hidden: str) -> Html:
    act = ACTS[name]
    fields = [
        el(
            "label",
            el("span", field.label),
            el(
                "input",
                name=field.name,
                placeholder=field.example or None,
                required="" if field.is_needed else None,
                autocomplete="off",
            ),
        )
        for field in act.fields
    ]
    kind = "changes" if act.changes else None
    return el("li", _form(name, {}, hidden, *fields, el("button", act.title, class_=kind)))


def _button(button: Button, hidden: str) -> Html:
    kind = "changes" if ACTS[button.act].changes else None
    return _form(button.act, button.form, hidden, el("button", button.label, class_=kind))


def _form(name: str, given: Form, hidden: str, *inner: Html) -> Html:
    fields = {CODE_FIELD: hidden, "act": name, **given}
    inputs = [el("input", type="hidden", name=key, value=text) for key, text in fields.items()]
    return el("form", *inputs, *inner, method="post")
