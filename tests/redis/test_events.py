"""Each operation makes one event, which an app's hooks, spans and metrics all see."""

from __future__ import annotations

import asyncio
import logging
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import signals
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from stillroom import (
    AsyncStillroom,
    InlineDispatch,
    InvalidArgument,
    Limit,
    NoDispatch,
    RedisUnavailable,
    Settings,
    Stillroom,
)
from stillroom.dispatch import REFRESH_TASK, CeleryDispatch, RefreshOrder
from stillroom.events import Event
from stillroom.integrations.pending import blocking_cache
from stillroom.otel import Telemetry, carried, task
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room
from tests.support.processes import run_to_end

CANARY = "canary-in-a-message"
ORDER = RefreshOrder(loader="page", args={"number": 1}, key="page:1", token="0" * 16)


@pytest.fixture(params=FACES)
def room(request: pytest.FixtureRequest, places: dict[str, Any]) -> Iterator[Any]:
    with open_room(request.param, Settings(**places | PATIENT), InlineDispatch()) as room:
        yield room


def inner(room: Any) -> Any:
    return getattr(room, "inner", room)


def told(events: list[Event]) -> list[tuple[str, str, str, str]]:
    return [(one.service, one.operation, one.outcome, one.name) for one in events]


def use(room: Any) -> None:
    """Use the room: a miss with its load, a hit, a denial, a session."""

    @room.cache.cached("page:{number}", ttl=60)
    def page(number: int) -> int:
        return number

    page(1)
    page(1)
    room.cache.get("nothing")
    for _ in range(2):
        room.limits.check("203.0.113.9", [Limit("narrow", 1, 60)])
    made = room.sessions.create("u1")
    room.sessions.get(made.token)
    room.sessions.get("no-such-token")


def test_each_operation_is_one_event(room: Any) -> None:
    """Each operation is one event with service, name, outcome and time. A load is an event inside it."""
    events: list[Event] = []
    inner(room).on_event(events.append)
    use(room)
    assert told(events) == [
        ("load", "page", "done", "page"),
        ("cache", "cached", "miss", "page"),
        ("cache", "cached", "hit", "page"),
        ("cache", "get", "miss", ""),
        ("limits", "check", "allowed", "narrow"),
        ("limits", "check", "denied", "narrow"),
        ("sessions", "create", "done", ""),
        ("sessions", "get", "found", ""),
        ("sessions", "get", "none", ""),
    ]
    assert all(0 < one.seconds < 60 and abs(one.began - time.time()) < 60 for one in events)


def use_the_cache(room: Any) -> None:
    """Use the cache by key, by several keys and for all keys, and call a loader alone and for several values."""

    @room.cache.cached("page:{number}", ttl=60)
    def page(number: int) -> int:
        return number

    room.cache.clear()
    for number in range(6):
        page(number)
        room.cache.set(f"k:{number}", number)
        room.cache.get(f"k:{number}")
    page.many([*range(6)])
    room.cache.get_many([f"k:{number}" for number in range(6)])
    room.cache.set_many({f"k:{number}": 1 for number in range(6)})
    room.cache.invalidate("k:1", "k:2")
    room.cache.invalidate_by_tag("t")


@pytest.mark.parametrize("face", FACES)
def test_a_cache_in_shards_makes_the_same_events(face: str, places: dict[str, Any]) -> None:
    """A call of the cache is one event, whichever of the shards does it and however many do."""
    seen: dict[int, list[Event]] = {}
    for shards in (1, 4):
        given = Settings(**places | PATIENT | {"shards": shards, "namespace": f"s{shards}"})
        with open_room(face, given, InlineDispatch()) as room:
            inner(room).on_event(seen.setdefault(shards, []).append)
            use_the_cache(room)
    assert told(seen[4]) == told(seen[1])
    assert [one.operation for one in seen[4]].count("get") == 6


def test_a_lookup_of_several_calls_is_one_event(room: Any) -> None:
    """A look for several calls at once is one event, and each load behind it is one with its call."""
    events: list[Event] = []

    @room.cache.cached("page:{number}", ttl=60)
    def page(number: int) -> int:
        return number

    page(1)
    inner(room).on_event(events.append)
    assert page.many([1, 1]) == [1, 1]
    assert page.many([1, 2]) == [1, 2]
    assert told(events) == [
        ("cache", "gather", "done", ""),
        ("cache", "gather", "done", ""),
        ("load", "page", "done", "page"),
        ("cache", "cached", "miss", "page"),
    ]


def test_what_a_thread_invalidates_for_an_async_room_is_an_event(settings: Settings) -> None:
    """An async room's cache makes events in a thread too, where a commit invalidates."""
    events: list[Event] = []
    room = AsyncStillroom(settings, dispatch=NoDispatch())
    room.on_event(events.append)
    blocking_cache(room).invalidate("k")
    assert told(events) == [("cache", "invalidate", "done", "")]
    asyncio.run(room.close())


def test_the_event_of_a_load_is_about_that_load(settings: Settings) -> None:
    """A value that the process keeps does not change the event of the load that asks for it."""
    events: list[Event] = []
    with Stillroom(settings, dispatch=InlineDispatch()) as room:

        @room.cache.cached("rate:{number}", ttl=60, near=30)
        def rate(number: int) -> int:
            return number

        @room.cache.cached("page:{number}", ttl=60)
        def page(number: int) -> list[int]:
            return [rate(1), rate(1)]

        rate(1)
        rate(1)  # read, and kept
        room.on_event(events.append)
        page(1)
        assert told(events) == [
            ("cache", "cached", "hit", "rate"),  # Redis is asked whether the kept value is good
            ("load", "page", "done", "page"),
            ("cache", "cached", "miss", "page"),
        ]


def test_an_error_is_an_event_too(room: Any) -> None:
    """An error is an event with the same fields and the error's kind, and without its message."""
    events: list[Event] = []
    inner(room).on_event(events.append)

    def load() -> int:
        raise ConnectionError(CANARY)

    with pytest.raises(ConnectionError):
        room.cache.get_or_set("k", load)
    assert [(one.service, one.outcome, one.error) for one in events] == [
        ("load", "error", "ConnectionError"),
        ("cache", "error", "ConnectionError"),
    ]
    assert CANARY not in repr(events)


def test_a_hook_that_fails_breaks_nothing(room: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A hook that raises is logged, and the other hooks are called."""
    events: list[Event] = []

    def bad(event: Event) -> None:
        raise ValueError

    inner(room).on_event(bad)
    inner(room).on_event(events.append)
    with caplog.at_level(logging.CRITICAL):
        room.cache.set("k", 1)
        assert room.cache.get("k") == 1
    assert told(events)[-1] == ("cache", "get", "hit", "")


def test_a_hook_that_nobody_would_await_is_refused(room: Any) -> None:
    """A coroutine function is refused as a hook: its coroutines would never run."""

    async def tell(event: Event) -> None:
        raise AssertionError(event)

    with pytest.raises(InvalidArgument, match="on_event=tell: a plain function"):
        inner(room).on_event(tell)


def test_redis_away_is_told() -> None:
    """When Redis is away a fallback is an event without error, and a raised error is one with its reason."""
    events: list[Event] = []
    settings = Settings(redis_url="redis://127.0.0.1:1", **PATIENT)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.on_event(events.append)
        room.limits.check("203.0.113.9", [Limit("narrow", 1, 60)])
        with pytest.raises(RedisUnavailable):
            room.cache.invalidate("k")
    by_name = {one.operation: one for one in events}
    assert (by_name["check"].outcome, by_name["check"].error) == ("allowed", "")
    assert by_name["check"].degraded
    assert by_name["invalidate"].outcome == "error"


def test_who_watches_nothing_pays_nothing(settings: Settings) -> None:
    """Drivers are wrapped only once somebody asks for events."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        assert not any("run" in vars(one) for one in room._drivers())
        assert room.stats.watch is None
        room.on_event(lambda event: None)
        assert all("run" in vars(one) for one in room._drivers())


# OpenTelemetry


class Sdk:
    """The OpenTelemetry SDK as an app sets it up."""

    def __init__(self) -> None:
        self.spans = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        meters = MeterProvider(metric_readers=[self.reader])
        self.telemetry = Telemetry(self.tracers, meters)

    def metrics(self) -> dict[str, list[Any]]:
        data: Any = self.reader.get_metrics_data()
        found = data.resource_metrics[0].scope_metrics[0].metrics
        return {one.name: list(one.data.data_points) for one in found}


def test_calls_and_loads_are_spans(room: Any) -> None:
    """A load is a span inside its call's span, and the loader's own spans are inside the load's."""
    sdk = Sdk()
    inner(room).observe(sdk.telemetry)
    tracer = sdk.tracers.get_tracer("app")

    @room.cache.cached("page:{number}", ttl=60)
    def page(number: int) -> int:
        with tracer.start_as_current_span("SELECT"):
            return number

    with tracer.start_as_current_span("GET /page"):
        page(1)
    spans = {one.name: one for one in sdk.spans.get_finished_spans()}
    for child, parent in (
        ("SELECT", "load page"),
        ("load page", "cache cached"),
        ("cache cached", "GET /page"),
    ):
        assert spans[child].parent is not None
        assert spans[child].parent.span_id == spans[parent].context.span_id
    call = spans["cache cached"]
    assert call.kind is trace.SpanKind.CLIENT
    assert call.attributes is not None
    assert dict(call.attributes) == {
        "db.system.name": "redis",
        "db.operation.name": "cached",
        "stillroom.service": "cache",
        "stillroom.outcome": "miss",
        "stillroom.loader": "page",
    }


def test_a_failed_call_is_a_span_with_an_error(room: Any) -> None:
    """A failed call is a span with the error's kind and without its message."""
    sdk = Sdk()
    inner(room).observe(sdk.telemetry)

    def load() -> int:
        raise ConnectionError(CANARY)

    with pytest.raises(ConnectionError):
        room.cache.get_or_set("k", load)
    for span in sdk.spans.get_finished_spans():
        assert span.status.status_code is trace.StatusCode.ERROR
        assert (span.attributes or {})["error.type"] == "ConnectionError"
        assert CANARY not in span.to_json()


def test_calls_are_measured(room: Any) -> None:
    """Calls are measured by time and lookups by outcome, with Stillroom's labels."""
    sdk = Sdk()
    inner(room).observe(sdk.telemetry)
    use(room)
    metrics = sdk.metrics()
    durations = metrics["db.client.operation.duration"]
    counts = {dict(one.attributes)["db.operation.name"]: one.count for one in durations}
    assert (counts["check"], counts["create"]) == (2, 1)
    assert sum(one.count for one in metrics["stillroom.load.duration"]) == 1
    lookups = {
        tuple(sorted(one.attributes.items())): one.value
        for one in metrics["stillroom.cache.lookups"]
    }
    assert lookups[("stillroom.loader", "page"), ("stillroom.outcome", "hit")] == 1


def test_the_span_of_a_stale_read_is_carried_to_the_task(settings: Settings) -> None:
    """The span of a stale read travels in the message's header, and a worker's spans are inside it."""
    sdk = Sdk()
    given = Settings(**{"redis_url": settings.redis_url, "otel": True} | PATIENT)
    with Stillroom(given) as room:
        assert isinstance(room.dispatch, CeleryDispatch)
        assert room.dispatch.carry is carried
        room.observe(sdk.telemetry)
        with sdk.tracers.get_tracer("app").start_as_current_span("GET /page") as span:
            headers = room.dispatch.carry()
        with task(room.watch, "stillroom.refresh", headers):
            room.cache.get("k")
    spans = {one.name: one for one in sdk.spans.get_finished_spans()}
    asked, done = spans["GET /page"], spans["task stillroom.refresh"]
    assert done.parent is not None
    assert done.parent.span_id == span.get_span_context().span_id
    assert spans["cache get"].context.trace_id == asked.context.trace_id
    assert spans["cache get"].parent is not None


def test_an_order_is_published_inside_the_span_of_its_read(settings: Settings) -> None:
    """A tool that watches Celery sees the span of the read around the message of its order; none around a wake."""
    given = settings.model_copy(update={"otel": True})
    sent: queue.SimpleQueue[tuple[str, Any, SpanContext]] = queue.SimpleQueue()

    def seen(sender: str, headers: Any, **_: Any) -> None:
        current = trace.get_current_span().get_span_context()
        sent.put((sender, headers.get("traceparent"), current))

    signals.before_task_publish.connect(seen)
    with Stillroom(given) as room, Sdk().tracers.get_tracer("app").start_span("GET /page") as span:
        with trace.use_span(span):
            room.dispatch.send([ORDER], print)
        name, header, around = sent.get(timeout=10)
        asked = span.get_span_context()
        assert (name, around.span_id) == (REFRESH_TASK, asked.span_id)
        assert header == f"00-{asked.trace_id:032x}-{asked.span_id:016x}-{asked.trace_flags:02x}"
        room.dispatch.wake("stillroom.reclaim")
        name, header, around = sent.get(timeout=10)
        assert (name, header, around.is_valid) == ("stillroom.reclaim", None, False)


def test_it_is_not_imported_unless_it_is_on() -> None:
    """OpenTelemetry is imported only where it is on. Where it is on and missing, the error says what to install."""
    code = (
        "import sys, stillroom; stillroom.Stillroom(); assert 'stillroom.otel' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    missing = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import stillroom\n"
        "try: stillroom.Stillroom(otel=True)\n"
        "except stillroom.SettingsError as error: print(error)"
    )
    done = run_to_end([sys.executable, "-c", missing], timeout=60)
    assert "pip install 'stillroom[otel]'" in done.stdout
