"""OpenTelemetry: a span for each call of a service, for each load and for each task; and how long they took.

Needs the extra `stillroom[otel]`, which is the API alone: an app brings its SDK, and says where spans go. Names and
attributes are those of the conventions for clients of databases (1.33) where they have one, else `stillroom.…`.
No key, no value, no user and no message of an error is in an attribute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stillroom.errors import SettingsError
from stillroom.events import Event, Watch

try:
    from opentelemetry import context, metrics, propagate, trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode
except ImportError:  # pragma: no cover - the extra is not installed
    raise SettingsError(
        "STILLROOM_OTEL needs OpenTelemetry: pip install 'stillroom[otel]'"
    ) from None

SCOPE = "stillroom"
DURATION = "db.client.operation.duration"
BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
CARRIED = ("traceparent", "tracestate")
_LOCAL = ("load", "task")  # no calls of Redis


class Telemetry:
    """Observes a room. Spans of what a loader does, the app's own, are children of the load's."""

    def __init__(self, tracer_provider: Any = None, meter_provider: Any = None) -> None:
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
        self._duration = meter.create_histogram(
            DURATION,
            unit="s",
            description="Duration of the calls of Stillroom's services.",
            explicit_bucket_boundaries_advisory=list(BOUNDS),
        )
        self._loads = meter.create_histogram(
            "stillroom.load.duration",
            unit="s",
            description="Duration of loads.",
            explicit_bucket_boundaries_advisory=list(BOUNDS),
        )
        self._lookups = meter.create_counter(
            "stillroom.cache.lookups", description="Lookups in the cache, by result and loader."
        )

    def began(self, event: Event) -> tuple[Span, Any]:
        """Open a span; what happens until it ends is inside it."""
        kind = SpanKind.INTERNAL if event.service in _LOCAL else SpanKind.CLIENT
        name = f"{event.service} {event.operation}"
        span = self._tracer.start_span(name, kind=kind, attributes=_of_call(event))
        return span, context.attach(trace.set_span_in_context(span))

    def ended(self, token: tuple[Span, Any] | None, event: Event) -> None:
        """End the span, and count."""
        if token is None:
            return
        span, before = token
        context.detach(before)
        span.set_attributes(_of_outcome(event))
        if event.error:
            span.set_status(Status(StatusCode.ERROR))
        span.end()
        self._count(event)

    def _count(self, event: Event) -> None:
        known = {"error.type": event.error} if event.error else {}
        if event.service == "load":
            self._loads.record(event.seconds, {"stillroom.loader": event.name, **known})
            return
        if event.service == "task":
            return
        self._duration.record(event.seconds, {**_of_call(event), **known})
        if event.outcome in ("hit", "stale", "miss"):
            said = {"stillroom.outcome": event.outcome}
            self._lookups.add(1, said | ({"stillroom.loader": event.name} if event.name else {}))


def _of_call(event: Event) -> dict[str, str]:
    if event.service in _LOCAL:
        return {}
    return {
        "db.system.name": "redis",
        "db.operation.name": event.operation,
        "stillroom.service": event.service,
    }


def _of_outcome(event: Event) -> dict[str, str]:
    what = {"load": "stillroom.loader", "limits": "stillroom.limits", "cache": "stillroom.loader"}
    said = {
        "stillroom.outcome": event.outcome,
        what.get(event.service, "stillroom.name"): event.name,
        "error.type": event.error,
        "stillroom.degraded": event.degraded,
    }
    return {name: text for name, text in said.items() if text}


# From the read that found a value stale to the worker that loads it again


def carried() -> dict[str, str]:
    """Return the headers that carry the span that is open to another process."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return {name: headers[name] for name in CARRIED if name in headers}


@contextmanager
def inside(headers: Mapping[str, Any]) -> Iterator[None]:
    """Have what happens inside belong to the span that the headers carry."""
    given = {key: str(headers[key]) for key in CARRIED if headers.get(key)}
    before = context.attach(propagate.extract(given))
    try:
        yield
    finally:
        context.detach(before)


@contextmanager
def task(known: Watch, name: str, headers: Mapping[str, Any]) -> Iterator[None]:
    """Tell of a task of a worker, inside the span of whoever asked for it."""
    with inside(headers), known.event("task", name):
        yield
