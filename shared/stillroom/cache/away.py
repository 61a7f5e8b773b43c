"""While Redis is away: one load at a time for each key of this process, and its value for a moment.

Without it an outage is the database's worst hour: every caller loads. Here a caller joins a load that began after
he came, so that it holds all that was true then. He may also join one that began earlier, if this process has
invalidated nothing of it since. What other processes invalidate meanwhile can't be known: such a value may be as
old as the load took, and a kept one `away_ttl` older. With `away_ttl=0` nobody joins a load that began before he
came, and nothing is kept.

What is kept is the entry as Redis would have it. It is decoded for each caller: nobody shares a list with anybody.

A load knows its own flight, and so does all that runs in its context: a load that asks for its own key does not
wait for itself.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from stillroom.cache.failures import again, is_of_the_caller
from stillroom.cache.glob import compile_glob
from stillroom.cache.outbox import EVERYTHING, KEY
from stillroom.codec import MISS
from stillroom.keys import original
from stillroom.oldest import oldest
from stillroom.operation import Operation, Pause
from stillroom.unsettled import is_unsettled
from stillroom.wire import leases_of_loads, reset_after_fork

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.01  # between two looks at a load one waits for
OVERHEAD = 300  # bytes that keeping an entry takes beside it

# Loads these keys under these leases: a mapping, which may lack some.
Load: TypeAlias = Callable[[list[bytes], Sequence[bytes]], Generator[Any, Any, Mapping[bytes, Any]]]


class Packed(NamedTuple):
    """A value as it is kept."""

    raw: bytes
    tags: Sequence[bytes]
    ttl: float  # seconds


class Taken(NamedTuple):
    """A loaded value: as others may have it, or None where it can't be shared; and as its own caller gets it."""

    packed: Packed | None
    back: Any


class Form(NamedTuple):
    """Convert values for keeping. `take` makes a Taken from a key and its loaded value.

    `unpack` makes the value again from a key and the kept bytes, or returns MISS.
    """

    take: Callable[[bytes, Any], Taken]
    unpack: Callable[[bytes, bytes], Any]


class Flight:
    """One load that is under way, and how it ended for one key."""

    __slots__ = (
        "began",
        "failure",
        "has_value",
        "is_done",
        "is_old",
        "is_settled",
        "lease",
        "packed",
    )

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.lease = b"away.%b" % secrets.token_hex(8).encode()  # by which its load knows it
        self.is_old = False  # something of it was invalidated since
        self.is_done = False
        self.is_settled = False  # it was not given up on the way
        self.has_value = False
        self.packed: Packed | None = None  # None: there is no value, or it can't be kept
        self.failure: Exception | None = None

    def is_good_for(self, came: float, *, keeps: bool) -> bool:
        """Return whether the load has ended and its result is new enough for a caller that came at `came`.

        `keeps`: values are kept, so a load that began before will do, unless something of it was invalidated since.
        """
        is_new = came <= self.began or (keeps and not self.is_old)
        return self.is_done and self.is_settled and is_new


class Kept(NamedTuple):
    """A value that was loaded a moment ago."""

    packed: Packed
    until: float  # time.monotonic()


class Away:
    """The loads of one process while Redis is away, and what is kept of them.

    `ttl` in seconds; `limit` in bytes; `patience`: how long a caller waits for another's load, in seconds.
    """

    def __init__(self, ttl: float, limit: int, patience: float) -> None:
        self._ttl = ttl
        self._limit = limit
        self._patience = patience
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Keep nothing, and have no load under way: threads of the parent had those."""
        self._lock = threading.RLock()  # a signal handler may call while this thread holds it
        self._flights: dict[bytes, Flight] = {}
        self._kept: dict[bytes, Kept] = {}  # the oldest first
        self._tagged: dict[bytes, set[bytes]] = {}
        self.size = 0  # bytes that are kept

    # Loading

    def obtain(
        self, names: Sequence[bytes], load: Load, form: Form, *, is_open: bool
    ) -> Operation[dict[bytes, Any]]:
        """Return the values under these keys; those that the load has none for are absent.

        `is_open`: the breaker is, so what is kept is served. Raises what the load raises, also another's.
        """
        if is_unsettled():  # uncommitted data is shared with no other caller
            return (yield from _alone(names, load, form))
        came = time.monotonic()
        values: dict[bytes, Any] = {}
        left = list(names)
        while left:
            if is_open and (served := self._served(left, form)):
                values |= served
                left = [name for name in left if name not in served]
                continue
            ours, others = self._take_off(left)
            if ours:
                values |= yield from self._fly(ours, load, form)
                left = list(others)
            elif own := [n for n, flight in others.items() if flight.lease in leases_of_loads()]:
                values |= yield from _alone(own, load, form)
                left = [name for name in left if name not in own]
            elif (yield from self._await_one(others, came + self._patience)):
                shared, alone, left = self._landed(others, came, form)
                values |= shared
                if alone:
                    values |= yield from _alone(alone, load, form)
            else:
                values |= yield from _alone(left, load, form)
                break
        return values

    def _served(self, names: Sequence[bytes], form: Form) -> dict[bytes, Any]:
        now = time.monotonic()
        found = {name: kept for name in names if (kept := self._kept.get(name)) is not None}
        values = {
            name: form.unpack(name, kept.packed.raw)
            for name, kept in found.items()
            if now < kept.until
        }
        return {name: value for name, value in values.items() if value is not MISS}

    def _take_off(self, names: Sequence[bytes]) -> tuple[dict[bytes, Flight], dict[bytes, Flight]]:
        """Return (loads that this caller starts, loads that are under way)."""
        with self._lock:
            others = {name: self._flights[name] for name in names if name in self._flights}
            ours = {name: Flight() for name in names if name not in others}
            self._flights |= ours
        return ours, others

    def _fly(
        self, ours: Mapping[bytes, Flight], load: Load, form: Form
    ) -> Operation[dict[bytes, Any]]:
        """Load, and tell every waiter how the load ended."""
        try:
            loaded = yield from load(list(ours), [flight.lease for flight in ours.values()])
            taken = {name: form.take(name, loaded[name]) for name in ours if name in loaded}
            for name, flight in ours.items():
                if name in taken:
                    flight.has_value, flight.packed = True, taken[name].packed
                flight.is_settled = True
        except Exception as error:
            if not is_of_the_caller(error):
                for flight in ours.values():
                    flight.failure, flight.is_settled = error, True
            raise
        finally:  # also where it was cancelled: then it is somebody else's turn
            self._land(ours)
        return {name: one.back for name, one in taken.items()}

    def _land(self, ours: Mapping[bytes, Flight]) -> None:
        with self._lock:
            for name, flight in ours.items():
                self._flights.pop(name, None)
                if flight.packed is not None and not flight.is_old:
                    self._keep(name, flight.packed)
                flight.is_done = True

    def _await_one(self, others: Mapping[bytes, Flight], deadline: float) -> Operation[bool]:
        """Wait until one of these loads is done. Return False when this caller's time is over."""
        pause = FIRST_PAUSE_S
        while not any(flight.is_done for flight in others.values()):
            if time.monotonic() > deadline:
                return False
            yield Pause(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 1.5, LONGEST_PAUSE_S)
        return True

    def _landed(
        self, others: Mapping[bytes, Flight], came: float, form: Form
    ) -> tuple[dict[bytes, Any], list[bytes], list[bytes]]:
        """Return (the values of these loads, keys whose values cannot be shared, keys still to load).

        Raises the error of a load that failed.
        """
        shared: dict[bytes, Any] = {}
        alone: list[bytes] = []
        left: list[bytes] = []
        for name, flight in others.items():
            if not flight.is_good_for(came, keeps=self._ttl > 0):
                left.append(name)
            elif flight.failure is not None:
                raise again(flight.failure)
            elif flight.has_value:
                packed = flight.packed
                value = MISS if packed is None else form.unpack(name, packed.raw)
                if value is MISS:
                    alone.append(name)
                else:
                    shared[name] = value
        return shared, alone, left

    # Keeping

    def forget(self, names: Iterable[bytes]) -> None:
        """Forget names that this process invalidates (see outbox.py), or has stored another value under."""
        if not (self._kept or self._flights):
            return
        with self._lock:
            for name in names:
                self._forget_one(name[:2], name[2:])

    def clear(self) -> None:
        """Keep nothing any more: Redis is back."""
        self.forget([EVERYTHING])

    def _forget_one(self, kind: bytes, what: bytes) -> None:
        if kind == EVERYTHING:
            self._drop([*self._kept])
            self._outdate(self._flights)
        elif kind == KEY:
            self._drop([what])
            self._outdate([what])
        elif kind == b"p:":
            matches = compile_glob(what)
            self._drop([name for name in self._kept if matches(original(name))])
            self._outdate([name for name in self._flights if matches(original(name))])
        else:
            self._drop([*self._tagged.get(what, ())])
            self._outdate(self._flights)  # their tags are not known yet

    def _outdate(self, names: Iterable[bytes]) -> None:
        for name in names:
            if (flight := self._flights.get(name)) is not None:
                flight.is_old = True

    def _keep(self, name: bytes, packed: Packed) -> None:
        now, size = time.monotonic(), _size_of(name, packed)
        if min(self._ttl, packed.ttl) <= 0 or size > self._limit:
            return
        self._drop([name])
        self._kept[name] = Kept(packed, now + min(self._ttl, packed.ttl))
        self.size += size
        for tag in packed.tags:
            self._tagged.setdefault(tag, set()).add(name)
        while (first := oldest(self._kept, 1)) != [name] and self._has_to_go(first, now):
            self._drop(first)

    def _has_to_go(self, names: Sequence[bytes], now: float) -> bool:
        """Return whether one of these values is over, or takes the room of newer ones."""
        found = [kept for name in names if (kept := self._kept.get(name)) is not None]
        return any(self.size > self._limit or kept.until < now for kept in found)

    def _drop(self, names: Iterable[bytes]) -> None:
        for name in names:
            kept = self._kept.pop(name, None)
            if kept is None:
                continue
            self.size -= _size_of(name, kept.packed)
            for tag in kept.packed.tags:
                self._untag(tag, name)

    def _untag(self, tag: bytes, name: bytes) -> None:
        names = self._tagged.get(tag)
        if names is not None:
            names.discard(name)
            if not names:
                self._tagged.pop(tag, None)


def _alone(names: Sequence[bytes], load: Load, form: Form) -> Operation[dict[bytes, Any]]:
    """Load for this caller only."""
    loaded = yield from load(list(names), ())
    return {name: form.take(name, value).back for name, value in loaded.items()}


def _size_of(name: bytes, packed: Packed) -> int:
    return len(packed.raw) + len(name) + sum(map(len, packed.tags)) + OVERHEAD
