"""A short history of reads and invalidations in many processes, and the check that it holds no stale read.

Each key has a version in a "database", a plain Redis key. One writer makes a new version and then lets the
cache know: by key, by tag, by a tag that only the value knows, softly, by pattern, by clearing everything, or by
setting it. When that has returned it notes the floor: **a read that begins from now on must not see an older
version**. Readers note when they began and what they saw. CLOCK_MONOTONIC is one clock for all processes
of a machine.

Run in processes of its own, by tests/support/processes.py: `from tests.support.history import …`.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import redis
from stillroom import Freshness
from stillroom.cache.body import CacheBody
from stillroom.keys import sanitized
from stillroom.operation import Operation
from tests.support.crowd import Crowd, ToRedis, patient_room

# How the cache is told of a new version.
KINDS = ("key", "tag", "value", "soft", "set", "many", "pattern", "clear")
EACH = 2  # keys of each kind
TTL, SWR = 0.05, 60.0  # seconds: many reads meet a stale entry, and refreshes go on all the time
LEASE = 1.0  # seconds; as long after it was invalidated, a pattern that was swept is dropped
# Seconds at most that a load takes before and after it reads the database.
BEFORE, AFTER = 0.002, 0.004
READERS = 2  # threads in each process, and one more that refreshes
DATABASE = "database:"


class Read(NamedTuple):
    """One read: when it began, in ns, and the version it saw."""

    key: str
    began: int
    version: int


class Floor(NamedTuple):
    """The cache was told of a version, and the call had returned."""

    key: str
    returned: int
    version: int


def stale_reads(reads: Iterable[Read], floors: Iterable[Floor]) -> list[tuple[Read, Floor]]:
    """Return the reads that began after the cache had been told of a version, and saw an older one."""
    by_key: dict[str, list[Floor]] = defaultdict(list)
    for floor in sorted(floors, key=lambda floor: floor.returned):
        by_key[floor.key].append(floor)
    found = []
    for read in reads:
        known = by_key[read.key]
        before = bisect_right(known, read.began, key=lambda floor: floor.returned)
        if before and read.version < known[before - 1].version:
            found.append((read, known[before - 1]))
    return found


class Library:
    """The cache, its loaders and the database, as one process sees them."""

    def __init__(self, url: str) -> None:
        self.keys = [f"{kind}:{n}" for kind in KINDS for n in range(EACH)]
        self.orders = ToRedis(url)
        self.room = patient_room(
            url, self.orders, ttl=TTL, swr=SWR, lease=LEASE, refresh_lease=LEASE, lease_limit=LEASE
        )
        self._database: Any = redis.Redis.from_url(url, socket_timeout=None)
        self._tags: list[Any] = ["all:{key}", lambda value: [f"shelf:{value['shelf']}"]]
        self._load = self.room.cache.cached("{key}", tags=self._tags)(self.fetch)

    def fetch(self, key: str) -> dict[str, Any]:
        """Return the database's value."""
        time.sleep(random.uniform(0, BEFORE))
        version = int(self._database.get(DATABASE + key) or 0)
        time.sleep(random.uniform(0, AFTER))
        return {"version": version, "shelf": key}

    def write(self, key: str) -> Floor:
        """Write a new version to the database, then tell the cache."""
        version = int(self._database.incr(DATABASE + key))
        self._tell(key, version)
        return Floor(key, time.monotonic_ns(), version)

    def _tell(self, key: str, version: int) -> None:
        cache = self.room.cache
        match key.partition(":")[0]:
            case "key":
                cache.invalidate(key)
            case "many":
                cache.invalidate_many([key, "another"])
            case "set":
                tags = [f"all:{key}", f"shelf:{key}"]
                assert cache.set(key, {"version": version, "shelf": key}, tags=tags)
            case "pattern":
                others = "".join(random.choices("abcdefgh", k=4))  # many patterns, each seldom
                cache.invalidate_by_pattern(f"{key[:-1]}[{key[-1]}{others}]")
            case "clear":
                cache.clear()
            case "value":
                cache.invalidate_by_tag(f"shelf:{key}")
            case kind:
                cache.invalidate_by_tag(f"all:{key}", soft=kind == "soft")

    def read(self) -> list[Read]:
        """Read some key in one of several ways; return the record to check."""
        key = random.choice(self.keys)
        how = random.choice(
            [self._get, self._get_entry, self._load_it, self._get_or_set, self._get_many]
        )
        began = time.monotonic_ns()
        seen = how(key)
        if key.startswith("soft") and how != self._get_entry:
            return []  # may well be old, and does not say so
        return [Read(name, began, value["version"]) for name, value in seen.items() if value]

    def _get(self, key: str) -> Mapping[str, Any]:
        return {key: self.room.cache.get(key)}

    def _get_entry(self, key: str) -> Mapping[str, Any]:
        entry = self.room.cache.get_entry(key)
        if entry is None:
            return {}
        is_told = key.startswith("soft") and entry.freshness is Freshness.STALE
        return {} if is_told else {key: entry.value}

    def _load_it(self, key: str) -> Mapping[str, Any]:
        return {key: self._load(key)}

    def _get_or_set(self, key: str) -> Mapping[str, Any]:
        tags = [f"all:{key}", self._tags[1]]
        return {key: self.room.cache.get_or_set(key, lambda: self.fetch(key), tags=tags)}

    def _get_many(self, key: str) -> Mapping[str, Any]:
        names = {key, *(name for name in random.sample(self.keys, 3) if "soft" not in name)}
        way = random.randrange(3)
        if way == 0:
            return self.room.cache.get_many(names)
        if way == 1:
            return dict(zip(names, self._load.many(names), strict=True))
        return self.room.cache.get_or_set_many(names, self._fetch_many, tags=self._many_tags())

    def _fetch_many(self, keys: Iterable[str]) -> dict[str, Any]:
        return {key: self.fetch(key) for key in keys}

    def _many_tags(self) -> list[Any]:
        return [lambda value: [f"all:{value['shelf']}", f"shelf:{value['shelf']}"]]

    def note_dropped(self, patterns: int) -> None:
        self._database.hincrby("dropped", "patterns", patterns)

    def close(self) -> None:
        self.room.close()
        self.orders.close()
        self._database.close()


def take_part(url: str, seconds: float, mutant: str, writes: bool) -> None:
    """Run one process of the history, of which only one writes. Print its records as one line of JSON."""
    sys.setswitchinterval(1e-5)  # threads take turns between almost any two steps
    MUTANTS[mutant]()
    library, crowd = Library(url), Crowd(url)
    records: list[Read | Floor] = []
    stop = threading.Event()
    acts: list[Callable[[], None]] = [
        *[lambda: records.extend(_reads(library, stop))] * READERS,
        lambda: _work(library, stop),
        *[lambda: _reclaim(library, stop)] * writes,
        *[lambda: records.extend(_writes(library, stop))] * writes,
    ]
    threads = [threading.Thread(target=act) for act in acts]
    crowd.ready()
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    library.close()
    print("records", json.dumps([[isinstance(r, Read), *r] for r in records]), flush=True)


def records_of(told: str) -> tuple[list[Read], list[Floor]]:
    """Return (reads, floors) from a process's output."""
    records = json.loads(told)
    reads = [Read(*fields) for is_read, *fields in records if is_read]
    floors = [Floor(*fields) for is_read, *fields in records if not is_read]
    return reads, floors


def _reads(library: Library, stop: threading.Event) -> Iterator[Read]:
    while not stop.is_set():
        yield from library.read()


def _work(library: Library, stop: threading.Event) -> None:
    """Run refreshes as a worker does."""
    while not stop.wait(0.001):
        for order in library.orders.take():
            library.room.cache.refresh(order)


def _reclaim(library: Library, stop: threading.Event) -> None:
    """Reclaim invalidated memory and drop patterns as a worker does."""
    while not stop.wait(0.01):
        report = library.room.cache.reclaim(budget=0.5)
        library.note_dropped(report["patterns_dropped"])


def _writes(library: Library, stop: threading.Event) -> Iterator[Floor]:
    yield from map(library.write, library.keys)  # each kind at least once, however busy the machine
    # A cache that is always empty is never wrong, and has no pattern old enough to be dropped.
    weights = [0.01 if key.startswith("clear") else 1.0 for key in library.keys]
    while not stop.wait(random.uniform(0, AFTER)):
        yield library.write(random.choices(library.keys, weights)[0])


# Caches that are wrong on purpose: the check has to find them out


def _stamp_at_commit() -> None:
    """Stamp a value with the clock as it is when it is stored, as most caches do that stamp at all."""
    right = CacheBody._store

    def store(
        self: CacheBody, name: bytes, held: bytes, clock: bytes, *rest: Any
    ) -> Operation[bool]:
        (now,) = yield [(b"GET", self.keys.clock)]
        return (yield from right(self, name, held, now or clock, *rest))

    CacheBody._store = store  # type: ignore[assignment, method-assign]


def _leave_the_lease() -> None:
    """Invalidate a key, and leave the load of it that is under way alone."""

    def invalidate(self: CacheBody, *keys: str, defer: bool = False) -> Operation[int]:
        (count,) = yield [(b"UNLINK", *[self.keys.entry(sanitized(key)) for key in keys])]
        return int(count)

    CacheBody.invalidate = invalidate  # type: ignore[method-assign]


MUTANTS: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "stamped at commit": _stamp_at_commit,
    "lease left alone": _leave_the_lease,
}
