"""One event for each operation, with the same fields for all: for an app's own hooks, and for OpenTelemetry.

Off, it costs nothing: who watches a room puts itself in front of its drivers' `run`. What an operation knows itself
(whether a lookup was a hit, by which loader) it notes in the event that is open.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from stillroom.errors import InvalidArgument, RedisUnavailable, in_code
from stillroom.misuse import refuse_awaited, takes
from stillroom.operation import AsyncDriver, Driver, Operation

log = logging.getLogger("stillroom")

# Where an operation is written → the service it belongs to. What is in none of them is Stillroom's own business.
SERVICES = {
    "Core": "cache",
    "Bulk": "cache",
    "Changes": "cache",
    "Invalidations": "cache",
    "Images": "cache",
    "CacheBody": "cache",
    "Calls": "cache",
    "ShardedBody": "cache",
    "TracedBody": "cache",
    "SessionsBody": "sessions",
    "Creating": "sessions",
    "Many": "sessions",
    "LimitsBody": "limits",
    "AbuseBody": "abuse",
    "TasksBody": "tasks",
    "LocksBody": "locks",
    "Gate": "web",
}
# An operation whose generator has another name than the method that an app calls.
NAMES = {
    "obtain": "cached",
    "call": "cached",
    "call_many": "gather",
    "_call_many": "gather",
    "_decided": "check",
    "_waiting": "wait",
    "_reserved": "reserve",
    "_settled_at": "settle",
    "asking": "request",
}


@dataclass(slots=True)
class Event:
    """Tell what became of one operation. Hooks are given it when the operation has ended, and must not change it.

    - `service`: cache, sessions, limits, abuse, tasks, locks or web; `load` for one call of a loader, `task` for a
      task of a worker.
    - `operation`: get, cached, check …; for a load or a task its name.
    - `began`: seconds since 1970, by this machine's clock. `seconds`: how long it took.
    - `outcome`: hit, stale or miss; allowed, denied or banned; found or none; error; for all others done.
    - `name`: the loader, or the limits.
    - `error`: the error's class, or why Redis is away; never its message.
    - `degraded`: why Redis could not be asked, where that was not an error.
    """

    service: str
    operation: str
    began: float = field(default_factory=time.time)
    seconds: float = 0.0
    outcome: str = "done"
    name: str = ""
    error: str = ""
    degraded: str = ""


class Observer(Protocol):
    """An observer is told when an operation begins and when it has ended. It does not raise."""

    def began(self, event: Event) -> Any:
        """Return whatever `ended` is to be given."""

    def ended(self, token: Any, event: Event) -> None: ...


class _Hook:
    """An app's function that is called at the end of an operation."""

    def __init__(self, hook: Callable[[Event], object]) -> None:
        self._hook = hook

    def began(self, event: Event) -> None:
        pass

    def ended(self, _: None, event: Event) -> None:
        self._hook(event)


_open: ContextVar[Event | None] = ContextVar("stillroom_event", default=None)


class Watch:
    """The observers of one room."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []

    def note(self, outcome: str, name: str) -> None:
        """Say in the event that is open how a lookup ended."""
        event = _open.get()
        if event is not None:
            event.outcome = outcome
            event.name = name or event.name

    def event(self, service: str, operation: str, name: str = "") -> _Telling:
        """Return a context manager that tells the observers of its block, when the block has ended."""
        return _Telling(self.observers, Event(service, operation, name=name))


class _Telling:
    """Tells the observers of one event.

    This is no generator: contextlib assigns to an error that it lets pass, which a frozen dataclass refuses.
    """

    def __init__(self, observers: Sequence[Observer], event: Event) -> None:
        self._observers = observers
        self._event = event

    def __enter__(self) -> Event:
        self._started = time.perf_counter()
        self._tokens = [(one, _safely(one.began, self._event)) for one in self._observers]
        self._before = _open.set(self._event)
        return self._event

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        event = self._event
        if error is not None:
            event.outcome = "error"
            event.error = error.reason if isinstance(error, RedisUnavailable) else _kind(error)
        event.seconds = time.perf_counter() - self._started
        _open.reset(self._before)
        for observer, token in reversed(self._tokens):
            _safely(observer.ended, token, event)


def watch_drivers(drivers: list[Any], known: Watch) -> None:
    """Let these drivers tell of the operations that they run."""
    for driver in {id(one): one for one in drivers}.values():
        if "run" not in vars(driver):
            watched = _watched_async if isinstance(driver, AsyncDriver) else _watched
            driver.run = watched(driver, known)


def hook_to(known: Watch, function: Callable[[Event], object]) -> None:
    """Have a function called with each event. What it raises is logged. Raises InvalidArgument."""
    refuse_awaited("on_event", function)
    if not callable(function) or not takes(function, 1):
        raise InvalidArgument(
            f"on_event={in_code(function):.100}: a function that is called with one Event"
        )
    known.observers.append(_Hook(function))


def _watched(driver: Driver, known: Watch) -> Callable[[Operation[Any]], Any]:
    run = driver.run

    def watched(operation: Operation[Any]) -> Any:
        service, name = named(operation)
        if not service:
            return run(operation)
        with known.event(service, name) as event:
            result = run(operation)
            _read(event, result)
            return result

    return watched


def _watched_async(driver: AsyncDriver, known: Watch) -> Callable[[Operation[Any]], Any]:
    run = driver.run

    async def watched(operation: Operation[Any]) -> Any:
        service, name = named(operation)
        if not service:
            return await run(operation)
        with known.event(service, name) as event:
            result = await run(operation)
            _read(event, result)
            return result

    return watched


def named(operation: Any) -> tuple[str, str]:
    """Return the service and the name of an operation, by where it is written; empty if it is none of an app's."""
    where, _, name = operation.__qualname__.rpartition(".")
    return SERVICES.get(where.rpartition(".")[2], ""), NAMES.get(name, name.strip("_"))


def _read(event: Event, result: Any) -> None:
    """Note the outcome that the result of an operation shows."""
    if event.operation == "gather":  # each of its lookups has noted its own
        event.outcome, event.name = "done", ""
    elif event.service == "limits":
        decision = getattr(result, "decision", result)
        if hasattr(decision, "allowed"):
            event.outcome = _decided(decision)
            event.name = ",".join(limit.name for limit in decision.limits)
            event.degraded = decision.degraded
    elif event.service == "sessions" and event.operation in ("get", "touch", "rotate"):
        event.outcome = "none" if result is None else "found"


def _decided(decision: Any) -> str:
    if decision.allowed:
        return "allowed"
    return "banned" if decision.banned else "denied"


def _kind(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return type(error).__name__


def _safely(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception:
        log.exception("a hook for events failed")
        return None
