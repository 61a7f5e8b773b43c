"""Checks what a worker tells those who watch, before they keep it.

Flower keeps each event in memory and in its file, and shows it on its pages: one that is not as Celery's own are,
and these and its metrics are errors until that file is deleted. Whoever may publish as a worker writes any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stillroom.shown import shown
from stillroom_workers.hygiene import is_name

NUMBER_LIMIT = 1e11  # seconds since 1970 that a calendar has


def flaw_in_events(body: Any) -> str | None:
    """Return what is wrong with a message's decoded body, which is one event or several, or None."""
    flaws = (_flaw_in_event(one) for one in (body if isinstance(body, list) else [body]))
    return next((flaw for flaw in flaws if flaw is not None), None)


def _flaw_in_event(event: Any) -> str | None:
    kind = event.get("type") if isinstance(event, dict) else None
    if not isinstance(kind, str) or kind not in EVENTS:
        return "it is no event of a worker's"
    needed = ("hostname", "timestamp", *(["uuid"] if kind.startswith("task-") else []))
    for name in needed:
        if event.get(name) is None:
            return f"the event has no {name}"
    for name, value in event.items():
        is_right = EVENT_FIELDS.get(name)
        if is_right is None or not is_right(value):
            return f"{shown(name, 60)} is not what it is in a worker's events"
    return None


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) < NUMBER_LIMIT  # no NaN either


def _is_clock(value: Any) -> bool:
    """Return whether this can be a clock. A worker counts on from the largest clock that it hears of."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_load(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 3 and all(map(_is_number, value))


def _is_text_or_none(value: Any) -> bool:
    """Return whether it is a text that a page can show: half of a surrogate pair is none."""
    if not isinstance(value, str):
        return value is None
    return value.isascii() or not any("\ud800" <= one <= "\udfff" for one in value)


def _is_plain_or_none(value: Any) -> bool:
    return value is None or isinstance(value, bool) or _is_number(value) or is_name(value)


def _is_name_or_none(value: Any) -> bool:
    return is_name(value, optional=True)


EVENTS = frozenset(
    [f"worker-{what}" for what in ("online", "heartbeat", "offline")]
    + [f"task-{what}" for what in ("sent", "received", "started", "succeeded", "failed")]
    + [f"task-{what}" for what in ("rejected", "revoked", "retried", "cancelled")]
    + ["task-progress"]  # our own: see tell() in tasks/invalidation.py
)
# Each field of a worker's events, and whether a value is one that it may have.
EVENT_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("type", "hostname", "uuid"), is_name),
    **dict.fromkeys(("name", "root_id", "parent_id"), _is_name_or_none),
    **dict.fromkeys(("sw_ident", "sw_ver", "sw_sys"), is_name),
    **dict.fromkeys(("timestamp", "utcoffset", "pid", "freq", "active"), _is_number),
    **dict.fromkeys(("processed", "runtime", "retries"), _is_number),
    **dict.fromkeys(("args", "kwargs", "result", "exception", "traceback"), _is_text_or_none),
    **dict.fromkeys(("eta", "expires", "queue", "exchange", "routing_key"), _is_name_or_none),
    **dict.fromkeys(("terminated", "signum", "expired", "requeue"), _is_plain_or_none),
    **dict.fromkeys(("seen", "deleted", "refreshed"), _is_number),
    "total": _is_plain_or_none,
    "clock": _is_clock,
    "loadavg": _is_load,
}
