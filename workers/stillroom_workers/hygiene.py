"""Checks a message before a worker takes it: it must be small, plain, and about nothing but its own task.

Whoever may publish writes messages as he likes, and is not to gain a worker's rights by it. Celery lets a
message name queues to which the worker sends on (callbacks, errbacks, chains, chords), the queue to which it
is given back, headers that become attributes of the running task, an encoding that unfolds 200 kB to 200 MB,
and a time until which the worker holds it in memory. None of Stillroom's tasks needs any of that.

These functions look at plain values and say what is wrong, or None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from time import time
from typing import Any

from celery.utils.time import maybe_iso8601
from pydantic_core import from_json

from stillroom.dispatch import MESSAGE_LIMIT
from stillroom.shown import shown

JSON = "application/json"
RAW_LIMIT = MESSAGE_LIMIT  # bytes of a message …
WAITING_RAW_LIMIT = 8 * 1024  # … of one that waits for its time, in the memory of a worker …
WAITING_LIMIT = 1_000  # … and how many may: 8 MB with what Celery keeps of each
AHEAD_S = 3_600.0  # the visibility timeout: a message that is held longer is delivered again anyway
NAME_LIMIT = 255  # characters of an id or a name
REASON_LENGTH = 200  # characters that are shown of a reason: it may quote the message, which holds people's data
RETRIES_LIMIT = 1_000

CALLS = ("callbacks", "errbacks", "chain", "chord")
# The headers that a request is made of. Any other one would become an attribute of the running task.
HEADERS = frozenset(
    {
        *("lang", "task", "id", "root_id", "parent_id", "group"),
        *("eta", "expires", "retries", "ignore_result"),
    }
)
CARRIED = ("traceparent", "tracestate")  # where the spans of the task belong
PROTOCOL_1 = HEADERS | {"args", "kwargs", "utc"}

_TRACE = re.compile(
    r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}|[\w@/*=,.+: -]{1,512}", re.ASCII
)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def flaw_in_envelope(envelope: Any, queue: str | None) -> str | None:
    """`envelope` is what lies in the queue, decoded from JSON. `queue` is where it lay; None: on no queue."""
    if not isinstance(envelope, dict):
        return f"it is a {type(envelope).__name__}, not an object"
    headers, properties = envelope.get("headers"), envelope.get("properties")
    if isinstance(headers, dict) and headers.get("compression"):
        return "it is compressed; Stillroom unfolds nothing"
    if flaw := flaw_in_content(envelope.get("content-type")):
        return flaw
    if not isinstance(properties, dict):
        return "it has no properties"
    if not is_name(properties.get("delivery_tag")):
        return "delivery_tag is not a name"
    if not is_name(properties.get("correlation_id"), optional=True):
        return "correlation_id is not a name"
    if not isinstance(properties.get("priority"), int | None):
        return "priority is not a whole number"
    if (reply_to := properties.get("reply_to")) and not _is_uuid(reply_to):
        return "reply_to is not a UUID"
    return None if queue is None else _flaw_in_route(properties.get("delivery_info"), queue)


def flaw_in_content(kind: Any) -> str | None:
    """Return what is wrong with the content type of a body that is not decoded yet, or None.

    kombu trusts two types besides the accepted ones, and takes their encoding for the name of a codec of Python:
    `bz2` makes 20 GB of 1 MB, and `punycode` needs hours.
    """
    return None if kind == JSON else f"its content type is {shown(repr(kind), 60)}, not {JSON}"


def flaw_in_json(text: bytes | memoryview | str) -> str | None:
    """Return what is wrong with JSON that is about to be decoded, or None. No message is nested 200 levels deep.

    Python reads as deep as its stack has room. So it could read one in one place, and in another, where a worker
    notes what it has taken or gives it back, neither write nor read it.
    """
    try:
        from_json(text if isinstance(text, str) else bytes(text))
    except ValueError as error:
        return str(error)
    return None


def _flaw_in_route(route: Any, queue: str) -> str | None:
    """Return the flaw in the route, by which a message is given back."""
    match route:
        case {"exchange": str() | None as exchange, "routing_key": str(key)}:
            if key == queue and exchange in (None, "", queue):
                return None
            return f"it is routed to {shown(key, 60)!r}, and lay in {queue!r}"
    return "delivery_info has no exchange and routing_key"


def flaw_in_task(headers: Any, body: Any, held: Callable[[], tuple[int, int]]) -> str | None:
    """`headers` and `body` are a message's, decoded. `held` is asked of one that waits for its time: how many
    bytes it has, and how many messages this worker has taken and not acknowledged."""
    fields, embed = _parts(headers, body)
    if fields is None:
        names_none = isinstance(headers, dict) and "task" not in headers
        return "it names no task" if names_none else "the body is not [args, kwargs, embed]"
    for name in CALLS:
        if fields.get(name) or embed.get(name):
            return f"it has {name}; no task of Stillroom's calls another"
    if unknown := sorted(set(embed) - set(CALLS)):
        return f"embed has {shown(unknown[0], 60)!r}"
    return _flaw_in_fields(fields) or _flaw_in_time(fields.get("eta"), held)


def _parts(headers: Any, body: Any) -> tuple[Mapping[Any, Any] | None, Mapping[Any, Any]]:
    """Return the fields of a task and its embedded parts in either protocol, or None where neither fits."""
    match headers, body:
        case {"task": _}, [[*_], dict(), dict() | None as embed]:
            return headers, embed or {}
        case dict(), {"args": [*_] | None} | {"kwargs": dict() | None}:
            return {**body, **headers}, {}
    return None, {}


def _flaw_in_fields(fields: Mapping[Any, Any]) -> str | None:
    for name in ("id", "task"):
        if not is_name(fields.get(name)):
            return f"{name} is not a name of at most {NAME_LIMIT} printable characters"
    for name in ("root_id", "parent_id", "group"):
        if not is_name(fields.get(name), optional=True):
            return f"{name} is not a name of at most {NAME_LIMIT} printable characters"
    match fields.get("shadow"), fields.get("timelimit"):
        case str() | None, None | [] | [int() | float() | None, int() | float() | None]:
            pass
        case _:
            return "shadow is not a string, or timelimit is not [hard, soft]"
    match fields.get("retries"), fields.get("stamped_headers"):
        case int() | None as retries, None | [*_] as stamps:
            if not 0 <= (retries or 0) <= RETRIES_LIMIT:
                return f"retries is not between 0 and {RETRIES_LIMIT}"
            if not all(isinstance(stamp, str) for stamp in stamps or ()):
                return "stamped_headers is not a list of strings"
        case _:
            return "retries is not a number, or stamped_headers is not a list"
    return None


def _flaw_in_time(eta: Any, held: Callable[[], tuple[int, int]]) -> str | None:
    """Return the flaw in the time, because a worker holds every task that waits for its time in memory."""
    if eta is None:
        return None
    try:
        at = maybe_iso8601(eta)
        ahead = 0.0 if at is None else _seconds_ahead(at)
    except (ValueError, TypeError, AttributeError, OverflowError):
        return "eta is not a date"
    if ahead > AHEAD_S:
        return f"eta is more than {AHEAD_S:,.0f} s ahead"
    size, waiting = held()
    if size > WAITING_RAW_LIMIT:
        return (
            f"it has {size:,} bytes; one that waits for its eta has at most {WAITING_RAW_LIMIT:,}"
        )
    if waiting > WAITING_LIMIT:
        return f"{WAITING_LIMIT:,} messages wait for their eta here already"
    return None


def _seconds_ahead(at: datetime) -> float:
    """Return the seconds until that date.

    Raises OverflowError for a date that the machine's time zone has no form of: Celery would drop its task.
    """
    aware = at if at.tzinfo else at.replace(tzinfo=UTC)
    return aware.astimezone().timestamp() - time()


def keep_what_a_task_needs(headers: Mapping[Any, Any], body: Any) -> dict[Any, Any]:
    """Return the headers that a request is made of. A body of protocol 1, which is made into headers, is cut in
    place. Where it has null for its arguments, as clients in other languages write, it gets none.
    """
    if isinstance(body, dict):
        for name in set(body) - PROTOCOL_1:
            del body[name]
        body["args"], body["kwargs"] = body.get("args") or [], body.get("kwargs") or {}
    kept = {name: headers[name] for name in HEADERS & set(headers)}
    return kept | {name: headers[name] for name in CARRIED if _is_trace(headers.get(name))}


def _is_trace(value: Any) -> bool:
    """Return whether it is a header of W3C's trace context: an id in its form, or a short list of vendors."""
    return isinstance(value, str) and _TRACE.fullmatch(value) is not None


def is_name(value: Any, *, optional: bool = False) -> bool:
    if value is None or value == "":
        return optional
    return isinstance(value, str) and len(value) <= NAME_LIMIT and value.isprintable()


def _is_uuid(value: Any) -> bool:
    return isinstance(value, str) and _UUID.fullmatch(value) is not None
