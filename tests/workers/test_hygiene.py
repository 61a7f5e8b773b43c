"""A publisher cannot make a worker write where only workers may, end it, or write into its log."""

from __future__ import annotations

import base64
import bz2
import json
import time
import uuid
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom import Settings
from stillroom.embedded import EmbeddedServer
from stillroom_workers.app import make_app
from stillroom_workers.hygiene import (
    CALLS,
    HEADERS,
    RAW_LIMIT,
    WAITING_LIMIT,
    WAITING_RAW_LIMIT,
    flaw_in_envelope,
    flaw_in_task,
    keep_what_a_task_needs,
)
from tests.support.celery_process import CeleryProcess, until

StartWorker = Callable[..., CeleryProcess]
QUEUE = "stillroom.maintenance"
VICTIM = "stillroom:{0}:todo"  # a list in its place would end all invalidation
TASK = "stillroom.trim_marks"
MIB = 1024 * 1024


def signature(queue: str) -> dict[str, Any]:
    """Return a task to be called afterwards, by way of a key."""
    options = {"queue": queue, "routing_key": queue, "exchange": ""}
    return {"task": "x", "args": [], "kwargs": {}, "options": options, "immutable": True}


def ahead(**span: float) -> str:
    return (datetime.now(UTC) + timedelta(**span)).isoformat()


def message(
    task: str = TASK,
    fields: Any = None,
    *,
    embed: Any = None,
    headers: Any = None,
    properties: Any = None,
    route: Any = None,
    raw: bytes | None = None,
    content: Any = None,
) -> str:
    """Return what a Celery client sends, with some of it changed."""
    task_id = str(uuid.uuid4())
    body = json.dumps([[], fields or {}, embed or {}]).encode() if raw is None else raw
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "py", "task": task, "id": task_id, "root_id": task_id}
            | (headers or {}),
            "properties": {
                "correlation_id": task_id,
                "reply_to": str(uuid.uuid4()),
                "delivery_info": route or {"exchange": "", "routing_key": QUEUE},
                "delivery_tag": str(uuid.uuid4()),
                "body_encoding": "base64",
                "priority": 0,
            }
            | (properties or {}),
        }
        | (content or {})
    )


def encoded(body: bytes, encoding: str, kind: str = "application/data") -> str:
    """Return a message whose body kombu decodes by a codec of Python: it trusts this type, as it does text."""
    content = {"content-type": kind, "content-encoding": encoding}
    return message("stillroom.reclaim", raw=body, content=content)


def protocol_1(**changes: Any) -> str:
    """Return the message of an older client, with everything in the body."""
    body = {"task": TASK, "id": str(uuid.uuid4()), "args": [], "kwargs": {}, "retries": 0} | changes
    envelope = json.loads(message(raw=json.dumps(body).encode()))
    return json.dumps(envelope | {"headers": {}})


def nested(depth: int, text: str) -> str:
    """Return a message with lists in the place of "@". Python itself may write none that is nested so deep."""
    return text.replace('"@"', "[" * depth + "]" * depth)


# Python reads these where it has just been taken, and can't where it is noted or given back.
DEPTHS = (250, *range(900, 970, 6))
CALL = signature(VICTIM)
# Each names a key that its sender has no right to, or takes a worker's memory.
HOSTILE: dict[str, str] = {
    **{f"embedded {name}": message(embed={name: [CALL]}) for name in CALLS},
    **{f"{name} in a header": message(headers={name: [CALL]}) for name in CALLS},
    **{f"{name} of protocol 1": protocol_1(**{name: [CALL]}) for name in CALLS},
    "a chord's body": message(embed={"chord": CALL}),
    "errbacks for a task that fails": message(fields={"no": 1}, embed={"errbacks": [CALL]}),
    "something else embedded": message(embed={"reply_to": VICTIM}),
    "reply_to": message(properties={"reply_to": VICTIM}),
    "routing key": message(route={"exchange": "", "routing_key": VICTIM}),
    "exchange": message(route={"exchange": VICTIM, "routing_key": QUEUE}),
    "no route": message(route={"x": 1}),
    "compressed": message(
        raw=zlib.compress(b" " * 50_000_000), headers={"compression": "application/x-gzip"}
    ),
    "compressed by another name": message(raw=b"{}", headers={"compression": "zstd"}),
    "compressed as data": encoded(bz2.compress(b"[[], {}, {}]"), "bz2"),
    "compressed as text": encoded(zlib.compress(b"[[], {}, {}]"), "zip", "application/text"),
    "of a type that is none": message(content={"content-type": ["application/json"]}),
    "large": message(fields={"keys": ["a" * RAW_LIMIT]}),
    "far eta": message(headers={"eta": ahead(hours=2)}),
    "far eta, naive": message(headers={"eta": "2099-12-31T23:59:59"}),
    "far eta of protocol 1": protocol_1(eta=ahead(hours=2)),
    "large with an eta": message(
        fields={"keys": ["a" * WAITING_RAW_LIMIT]}, headers={"eta": ahead(minutes=5)}
    ),
    "large header with an eta": message(
        headers={"eta": ahead(minutes=5), "origin": "a" * WAITING_RAW_LIMIT}
    ),
    "long id": message(headers={"id": "i" * 50_000}),
    "long root id": message(headers={"root_id": "i" * 300}),
    "long parent id": message(headers={"parent_id": "i" * 300}),
    "long group": message(headers={"group": "i" * 300}),
    "long id of protocol 1": protocol_1(id="i" * 300),
    "long task": message("t" * 300),
    "long tag": message(properties={"delivery_tag": "t" * 300}),
    "long correlation": message(properties={"correlation_id": "t" * 300}),
    "id with a line break": message(headers={"id": "a\nFORGED"}),
    "id with an escape": message(headers={"id": "a\x1b[31mFORGED"}),
    "id that turns the text around": message(headers={"id": "a\u202eFORGED"}),
    "task with a line break": message("a\nFORGED"),
    "many retries": message(headers={"retries": 10**9}),
    "retries below zero": message(headers={"retries": -(10**9)}),
    "retries that are text": message(headers={"retries": "x" * 1_000}),
    "a number that is none": message(headers={"x": {"__type__": "decimal", "__value__": "x"}}),
    "a priority that never ends": message(
        properties={"priority": {"__type__": "decimal", "__value__": "1E+999999999"}}
    ),
    **{f"an id of {n} lists": nested(n, message(headers={"id": "@"})) for n in DEPTHS},
    **{f"{n} lists": nested(n, message(headers={"x": "@"})) for n in DEPTHS},
    **{
        f"a body of {n} lists": message(raw=nested(n, '[[], {"x": "@"}, {}]').encode())
        for n in DEPTHS
    },
}


ITS_OWN = {
    "dead-letters",
    "counts",
    "ticks",
    "workers",
    "clock",
    "marks",
    str(int(time.time() / 60)),
}


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    loaders = {"STILLROOM_LOADERS": "tests.support.shop_app", "STILLROOM_WORKER_THREADS": "2"}
    return environment | loaders


def test_no_message_is_run_that_asks_for_more_than_its_task(
    start_worker: StartWorker, db: Any
) -> None:
    """Each becomes a dead letter with its reason, and one line of the log. No other key is made; the worker
    works on."""
    worker = start_worker()
    before = set(db.keys("*"))
    db.lpush(QUEUE, *HOSTILE.values(), message())
    worker.await_line("stillroom.trim_marks[")
    until(lambda: "succeeded in" in worker.log, "the sound one to be done")
    until(lambda: db.xlen("stillroom:dead-letters") == len(HOSTILE), "a letter for each other")
    assert not db.exists(VICTIM)
    new = {key.decode() for key in set(db.keys("*")) - before}
    assert {key.rsplit(":", 1)[-1] for key in new} <= ITS_OWN
    until(lambda: not db.exists("stillroom:unacked"), "the sound one to be acknowledged")
    forged = [line for line in worker.log.splitlines() if line.lstrip().startswith("FORGED")]
    assert forged == []
    assert "\x1b" not in worker.log
    assert "\u202e" not in worker.log
    assert max(map(len, worker.log.splitlines())) < 1_000
    assert worker.log.count("received") == 1


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_what_stands_among_the_unacknowledged_messages_stops_nobody(
    start_worker: StartWorker, db: Any, pool: str
) -> None:
    """A worker starts whatever was noted as taken. What is no message of its queues becomes a dead letter, and
    what a killed worker held is carried out.
    """
    noted = json.loads(message())
    sound = [noted, "", QUEUE]
    bad = {
        "no JSON": b"garbage",
        "bytes": b"\xff\xfe\x00",
        "a number": b"5",
        "two of three": b"[1, 2]",
        "deep": b"[" * 100_000,
        "no message": json.dumps(["x", "", QUEUE]),
        "headers that are a list": json.dumps([noted | {"headers": []}, "", QUEUE]),
        "no route": json.dumps([noted, None, None]),
        "an exchange": json.dumps([noted, "stillroom.refresh", QUEUE]),
        "another list": json.dumps([noted, "", "stillroom:bans:times"]),
        "a list of lists": json.dumps([noted, "", [QUEUE]]),
        "a date that is none": json.dumps([{"__type__": "datetime", "__value__": "x"}, "", QUEUE]),
    }
    for number, (tag, note) in enumerate([("sound", json.dumps(sound)), *bad.items()]):
        db.hset("stillroom:unacked", tag, note)
        db.zadd("stillroom:unacked_index", {tag: number + 1})  # the sound one was taken first
    worker = start_worker("-P", pool)
    until(lambda: db.zcard("stillroom:unacked_index") == 0, "all to be looked at")
    until(lambda: "succeeded in" in worker.log, "the sound one to be done")
    assert db.xlen("stillroom:dead-letters") == len(bad)
    assert not db.exists("stillroom:bans:times")
    assert "Traceback" not in worker.log
    assert worker.terminate() == 0


def test_a_bomb_takes_no_memory(start_worker: StartWorker, db: Any) -> None:
    """A body of 200 MB in 200 kB does not fill the worker's memory, and neither do a thousand of a megabyte."""
    worker = start_worker()
    before = memory_of(worker)
    bomb = zlib.compress(b'[[], {"keys": ["' + b"a" * 200_000_000 + b'"]}, {}]', 9)
    db.lpush(QUEUE, message(raw=bomb, headers={"compression": "application/x-gzip"}))
    db.lpush(QUEUE, encoded(bomb, "zlib"))
    db.lpush(QUEUE, encoded(b"a-" + b"9" * 200_000, "punycode"))  # needs an hour
    for _ in range(100):
        db.lpush(QUEUE, message(fields={"keys": ["a" * RAW_LIMIT]}))
    db.lpush(QUEUE, message())
    until(lambda: "succeeded in" in worker.log, "the sound one to be done", 60)
    assert peak_of(worker) < before + 40 * MIB


@pytest.mark.timeout(300)
@pytest.mark.parametrize("eta", [{"days": 400}, {"minutes": 50}], ids=["far", "near"])
def test_a_flood_of_tasks_that_wait_takes_no_memory(
    start_worker: StartWorker, db: Any, eta: dict[str, float]
) -> None:
    """Of a flood of tasks that wait a worker holds a thousand small ones, and takes other work meanwhile."""
    worker = start_worker()
    before = memory_of(worker)
    waiting = message(headers={"eta": ahead(**eta)})
    for _ in range(10):
        db.lpush(QUEUE, *(waiting for _ in range(400)))
    db.lpush(QUEUE, message())
    until(lambda: "succeeded in" in worker.log, "the sound one to be done", 200)
    until(lambda: db.llen(QUEUE) == 0, "the queue to be read")
    assert db.hlen("stillroom:unacked") <= WAITING_LIMIT + 1
    assert memory_of(worker) < before + 60 * MIB


def test_a_command_is_answered_on_the_exchange_of_replies_alone(
    start_worker: StartWorker, own_server: EmbeddedServer, db: Any
) -> None:
    """A command to workers that names another place for its answer makes them write nothing there, whatever is
    bound to the exchange.
    """
    start_worker()
    bindings = "_kombu.binding.reply.stillroom.pidbox"
    db.sadd(bindings, "reply.stillroom.pidbox", b"\xff", "", f"evil\x06\x16\x06\x16{VICTIM}")
    for exchange, key in (("", VICTIM), ("stillroom.maintenance", VICTIM), ("", "evil")):
        reply_to = {"exchange": exchange, "routing_key": key}
        command = {"method": "ping", "arguments": {}, "ticket": "t", "reply_to": reply_to}
        db.publish("/0.stillroom.pidbox", message(raw=json.dumps(command).encode()))
    with make_app(Settings(redis_url=own_server.url)) as app:
        assert app.control.ping(timeout=10, limit=1)
    assert not db.exists(VICTIM)


def memory_of(worker: CeleryProcess) -> int:
    return int(psutil.Process(worker.process.pid).memory_info().rss)


def peak_of(worker: CeleryProcess) -> int:
    with open(f"/proc/{worker.process.pid}/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("stillroom.invalidate_keys", {"keys": ["a"], "z\nFORGED \x1b[31m": 1}),
        (
            "stillroom.refresh",
            {"loader": "product", "args": {"a\nFORGED \x1b[31m": 1}, "key": "k", "token": "0" * 16},
        ),
        (
            "stillroom.refresh",
            {"loader": "no\nFORGED \x1b[31m", "args": {}, "key": "k", "token": "0" * 16},
        ),
        ("stillroom.invalidate_keys", {f"field {n}\nFORGED": 1 for n in range(5_000)}),
        ("stillroom.trim_indexes", {f"\x1b[2J{n}": 1 for n in range(5_000)}),
    ],
)
def test_what_a_refused_order_says_is_shown_as_text(
    start_worker: StartWorker, db: Any, task: str, fields: dict[str, Any]
) -> None:
    """A refused order's log line writes out the names of its fields as text, and not all of them."""
    worker = start_worker()
    db.lpush(QUEUE, message(task, fields))
    worker.await_line("refused")
    assert not any(line.startswith("FORGED") for line in worker.log.splitlines())
    assert "\x1b" not in worker.log
    assert max(map(len, worker.log.splitlines())) < 1_000


# The checks alone


def checked(raw: str) -> str | None:
    envelope = json.loads(raw)
    body = json.loads(base64.b64decode(envelope["body"]))
    return flaw_in_envelope(envelope, QUEUE) or flaw_in_task(
        envelope["headers"], body, lambda: (len(raw), 0)
    )


@pytest.mark.parametrize(
    "sound",
    [
        message(),
        protocol_1(),
        message(route={"exchange": QUEUE, "routing_key": QUEUE}),
        message(properties={"reply_to": ""}),
        message(properties={"reply_to": None}),
        message(headers={"eta": ahead(minutes=59)}),
        message(headers={"eta": ahead(days=-3)}),
        message(headers={"eta": "2020-01-01T00:00:00Z"}),
        message(headers={"timelimit": [None, 3.5]}),
        message(headers={"root_id": None, "parent_id": "", "group": None}),
        message(headers={"id": "ein-Auftrag von Jürgen"}),
        message(embed=dict.fromkeys(CALLS)),
        message(embed={"callbacks": [], "errbacks": []}),
        message(headers={"stillroom_sent_ms": 1, "origin": "gen1@host", "argsrepr": "()"}),
    ],
)
def test_what_clients_send_is_let_through(sound: str) -> None:
    """Messages of either protocol, with the usual additions of Celery's clients and others, are let through."""
    assert checked(sound) is None


def test_a_thousand_may_wait() -> None:
    """A thousand tasks may wait; one more becomes a dead letter, and one that need not wait is not counted."""
    waits = {"task": TASK, "id": "x", "eta": ahead(minutes=1)}
    assert flaw_in_task(waits, [[], {}, {}], lambda: (10, WAITING_LIMIT)) is None
    assert "wait for their eta" in str(
        flaw_in_task(waits, [[], {}, {}], lambda: (10, WAITING_LIMIT + 1))
    )
    now = {"task": TASK, "id": "x"}
    assert flaw_in_task(now, [[], {}, {}], lambda: pytest.fail("asked")) is None


@pytest.mark.parametrize("none", [{"args": None}, {"kwargs": None}, {"args": None, "kwargs": None}])
def test_null_of_an_older_client_is_no_argument(none: dict[str, Any]) -> None:
    """A message of protocol 1 with null for its arguments runs without any, and keeps those that it has."""
    given = {"task": TASK, "id": "x", "args": [], "kwargs": {"keys": ["k"]}} | none
    assert flaw_in_task({}, given, lambda: (10, 0)) is None
    expected = {"args": [], "kwargs": {}} | {key: given[key] for key in given if given[key]}
    keep_what_a_task_needs({}, given)
    assert given == expected


TRACE = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.mark.parametrize(
    ("value", "is_kept"),
    [
        *[(TRACE, True), ("vendor=1,other@x=2", True)],
        *[(f"{TRACE}\n", False), ("a\x1b[31m", False), ("a" * 513, False), ("", False)],
        *[("ä", False), ([TRACE], False), ({"a": 1}, False), (None, False)],
    ],
)
def test_a_trace_is_kept_in_its_form_alone(value: Any, is_kept: bool) -> None:
    """The header that says where a task's span belongs is kept where it is one, and dropped in any other form."""
    headers = {"task": TASK, "id": "x", "traceparent": value, "tracestate": value}
    kept = keep_what_a_task_needs(headers, [[], {}, None])
    assert set(kept) == {"task", "id", *(["traceparent", "tracestate"] if is_kept else [])}


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=20)
    | st.just(VICTIM)
    | st.just(CALL),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [*HEADERS, *CALLS, "reply_to", "timelimit", "stamped_headers", "delivery_info", "is_eager"]
)


@given(st.dictionaries(NAMES, ANYTHING), st.dictionaries(NAMES, ANYTHING), st.booleans())
def test_nothing_but_what_a_task_needs_reaches_it(
    headers: dict[str, Any], embed: dict[str, Any], old: bool
) -> None:
    """Any message becomes a dead letter or runs with plain request fields that call nothing."""
    given_headers = {"task": TASK, "id": "x"} | headers
    body: Any = (
        {"task": TASK, "id": "x", "args": [], "kwargs": {}} | embed if old else [[], {}, embed]
    )
    flaw = flaw_in_task(given_headers, body, lambda: (10, 0))
    assert flaw is None or flaw.isprintable()
    if flaw is not None:
        return
    kept = keep_what_a_task_needs(given_headers, body)
    assert set(kept) <= HEADERS
    seen = {**body, **kept} if old else {**embed, **kept}
    assert not any(seen.get(name) for name in CALLS)
    for name in ("id", "task", "root_id", "parent_id", "group"):
        assert kept.get(name) is None or (len(kept[name]) <= 255 and kept[name].isprintable())


@given(ANYTHING)
def test_an_envelope_of_any_shape_is_judged(envelope: Any) -> None:
    """No shape of an envelope makes the check itself fail."""
    assert flaw_in_envelope(envelope, QUEUE)
    assert flaw_in_envelope({"headers": envelope, "properties": envelope}, None)


@pytest.mark.parametrize("eta", ["0001-01-01T00:00:00", "0001-01-01T00:00:00+00:00"])
def test_a_date_that_the_time_zone_has_no_form_of_becomes_a_dead_letter(
    monkeypatch: pytest.MonkeyPatch, eta: str
) -> None:
    """West of Greenwich the first day has no local time. Such a task is refused, and not dropped in silence."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "America/New_York")
        time.tzset()
        flaw = flaw_in_task({"task": TASK, "id": "x", "eta": eta}, [[], {}, None], lambda: (1, 0))
    time.tzset()
    assert flaw == "eta is not a date"
