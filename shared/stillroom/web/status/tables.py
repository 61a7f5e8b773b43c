"""Tables that can be read on a phone: there each row is a card, and each value stands beside its name. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stillroom.web.status.html import Html, el


class Column(NamedTuple):
    """Describe a column. One column of a table names the row."""

    head: str
    is_number: bool = False
    is_name: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], labelled_by: str) -> Html:
    """Return a table, in a card. `labelled_by`: the id of its heading.

    The roles are said, because a row that is shown as a block has none for some screen readers.
    """
    heads = [
        el("th", column.head, scope="col", role="columnheader", class_=_class(column))
        for column in columns
    ]
    body = [el("tr", *map(_cell, columns, row), role="row") for row in rows]
    return el(
        "div",
        el(
            "table",
            el("thead", el("tr", *heads, role="row"), role="rowgroup"),
            el("tbody", *body, role="rowgroup"),
            role="table",
            aria_labelledby=labelled_by,
        ),
        class_="stacks",
    )


def _cell(column: Column, value: str) -> Html:
    if column.is_name:
        return el("th", value, scope="row", role="rowheader", data_label=column.head)
    # One element for the value: on a phone it stands opposite its name, whatever it is made of.
    inner = el("span", value)
    return el("td", inner, role="cell", data_label=column.head, class_=_class(column))


def _class(column: Column) -> str | None:
    return "number" if column.is_number else None
