"""A history of requests, reads outside of them and changes of all kinds, where processes keep copies near.

Each process owns keys, one of each kind, and is the only one to write them: a new version in the "database", a
plain Redis key, then the change of the cache. When that has returned it notes the floor. Everybody reads all keys.
What a read must not be older than depends on who changed the key and where it is read: see `Read.since`.

Run in processes of its own, by tests/support/processes.py: `from tests.support.near_history import …`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import random
import sys
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

import redis
from stillroom import AsyncStillroom, Settings, Stillroom
from stillroom.operation import Operation
from tests.support.crowd import PATIENT, Crowd, ToRedis

KINDS = (
    *("key", "many", "tag", "value", "soft", "pattern", "clear"),
    *("set", "set_many", "add", "incr", "touch", "load"),
)
NEAR = 0.05  # seconds for which a read outside of a request may be old
TTL, SWR, LEASE = 2.0, 60.0, 2.0
NOBODY = -1
READERS = 3  # threads, tasks or greenlets in each process
DATABASE = "database:"
# Of the processes, in turn; `plain` keeps nothing.
FACES = ("threads", "plain", "asyncio", "gevent")


class Read(NamedTuple):
    """What a read saw of a key, when it began, and when began what makes it as old as it may be, both in ns."""

    key: str
    reader: int
    began: int
    may_be_from: int
    version: int

    def since(self, writer: int) -> int:
        """Return from when on all changes of this process must show."""
        return self.began if writer == self.reader else self.may_be_from


class Floor(NamedTuple):
    """The cache was told of a version, and the call had returned."""

    key: str
    writer: int
    returned: int
    version: int


class Torn(NamedTuple):
    """A request that read two versions of a key, though its own process has changed nothing in between."""

    key: str
    first: int
    second: int
    age: float  # of the request then, seconds


def broken(reads: Iterable[Read], floors: Iterable[Floor]) -> list[tuple[Read, Floor]]:
    """Return the reads that saw an older version than they may."""
    by_key: dict[str, list[Floor]] = defaultdict(list)
    for floor in sorted(floors, key=lambda floor: floor.returned):
        by_key[floor.key].append(floor)
    found = []
    for read in reads:
        known = by_key[read.key]
        if not known:
            continue
        since = read.since(known[0].writer)
        before = bisect_right(known, since, key=lambda floor: floor.returned)
        if before and read.version < known[before - 1].version:
            found.append((read, known[before - 1]))
    return found


class Party:
    """One process: its room, and what it reads and writes. Written once, for all faces."""

    def __init__(self, url: str, number: int, processes: int, face: str) -> None:
        self.number, self.face = number, face
        self.orders = ToRedis(url)
        settings = Settings(
            **{"redis_url": url}
            | PATIENT
            | {"ttl": TTL, "swr": SWR}
            | {"lease": LEASE, "refresh_lease": LEASE, "lease_limit": LEASE}
        )
        kind: Any = AsyncStillroom if face == "asyncio" else Stillroom
        self.room: Any = kind(settings, dispatch=self.orders)
        self.room.stats.due = float("inf")  # its counts stay here
        self.keys = [f"{kind}:{n}" for kind in KINDS for n in range(processes)]
        self.own = [key for key in self.keys if key.endswith(f":{number}")]
        self._first = iter(self.own)
        self.near = None if face == "plain" else NEAR
        self._database: Any = redis.Redis.from_url(url, socket_timeout=None)
        self._tags: list[Any] = ["all:{key}", shelves]
        self._load = self.room.cache.cached(
            "{key}", tags=self._tags, near=self.near, name="fetch", lease=LEASE
        )(self.fetch)
        self.records: list[Read | Floor | Torn] = []
        self.hits = 0

    def fetch(self, key: str) -> Any:
        """Return the version in the database."""
        version = int(self._database.get(DATABASE + key) or 0)
        time.sleep(random.uniform(0, 0.002))
        return as_value(key, version)

    # Reading

    async def request(self) -> None:
        """Read some keys in one request, some of them twice."""
        keys = random.sample(self.keys, 4)
        began = time.monotonic_ns()
        seen: dict[str, tuple[int, Any]] = {}
        with self.room.request():
            for key in random.choices(keys, k=10):
                changes = self._changes()
                at = time.monotonic_ns()
                version = await self._read(random.choice(self._ways(True)), key)
                if version is None:
                    continue
                self.records.append(Read(key, self.number, at, began if self.near else at, version))
                first, before = seen.get(key, (version, None))
                is_same = before is changes is self._changes()
                if self.near and is_same and first != version:
                    age = (time.monotonic_ns() - began) / 1e9
                    self.records.append(Torn(key, first, version, age))
                seen[key] = version, changes

    async def outside(self) -> None:
        """Reads outside of a request."""
        for key in random.choices(self.keys, k=4):
            began = time.monotonic_ns()
            way = random.choice(self._ways(False))
            version = await self._read(way, key)
            if version is not None:
                may_be_from = began - int((self.near or 0) * 1e9)
                self.records.append(Read(key, self.number, began, may_be_from, version))

    def _changes(self) -> Any:
        return getattr(self.room, "inner", self.room).cache._body._memo.changes

    def _ways(self, is_request: bool) -> list[Callable[[str], Any]]:
        cache, near = self.room.cache, self.near
        if is_request and near:
            near = random.choice([True, near])
        ways = [self._load, self._load, self._among_many, lambda key: cache.get(key, near=near)]
        if self.face != "asyncio":
            ways.append(self._get_or_set)
        return ways

    async def _among_many(self, key: str) -> Any:
        keys = [*random.sample(self.keys, 2), key]
        return (await awaited(self._load.many(keys)))[-1]

    def _get_or_set(self, key: str) -> Any:
        tags = [f"all:{key}", shelves]
        return self.room.cache.get_or_set(key, lambda: self.fetch(key), tags=tags, near=self.near)

    async def _read(self, way: Callable[[str], Any], key: str) -> int | None:
        value = await awaited(way(key))
        return None if value is None else version_of(value)

    # Writing

    async def write(self) -> None:
        """Write a new version of an own key, then tell the cache."""
        key = next(self._first, "")  # each kind at least once, however busy the machine
        weights = [0.02 if key.startswith("clear") else 1.0 for key in self.own]
        await self.change(key or random.choices(self.own, weights)[0])
        await self.pause(random.uniform(0, 0.01))

    async def change(self, key: str) -> None:
        version = int(self._database.incr(DATABASE + key))
        if await self._tell(key, version):
            # A refresh by a worker is no change of this process.
            writer = NOBODY if key.startswith("soft") else self.number
            self.records.append(Floor(key, writer, time.monotonic_ns(), version))

    async def _tell(self, key: str, version: int) -> bool:
        """Return whether the cache has taken the change: then no read may show an older version."""
        cache, value = self.room.cache, as_value(key, version)
        tags = [f"all:{key}", f"shelf:{key}"]
        others = "".join(random.choices("abcdefgh", k=3))  # many patterns, each seldom
        invalidate: dict[str, Callable[[], Any]] = {
            "key": lambda: cache.invalidate(key),
            "many": lambda: cache.invalidate_many([key, "another"]),
            "tag": lambda: cache.invalidate_by_tag(f"all:{key}"),
            "value": lambda: cache.invalidate_by_tag(f"shelf:{key}"),
            "pattern": lambda: cache.invalidate_by_pattern(f"{key[:-1]}[{key[-1]}{others}]"),
            "clear": cache.clear,
        }
        kind = key.partition(":")[0]
        if kind in invalidate:
            await awaited(invalidate[kind]())
            return True
        return await {
            "set": self._set,
            "set_many": self._set_many,
            "add": self._add,
            "incr": self._incr,
            "touch": self._touch,
            "load": self._order,
            "soft": self._soften,
        }[kind](key, value, tags)

    async def _set(self, key: str, value: Any, tags: list[str]) -> bool:
        return bool(await awaited(self.room.cache.set(key, value, tags=tags)))

    async def _set_many(self, key: str, value: Any, tags: list[str]) -> bool:
        return bool((await awaited(self.room.cache.set_many({key: value}, tags=tags)))[key])

    async def _add(self, key: str, value: Any, tags: list[str]) -> bool:
        await awaited(self.room.cache.invalidate(key))
        await awaited(self.room.cache.add(key, value, tags=tags))
        return True

    async def _touch(self, key: str, value: Any, tags: list[str]) -> bool:
        stored = await self._set(key, value, tags)
        await awaited(self.room.cache.touch(key, ttl=random.choice([0.01, 1.0]), swr=SWR))
        return stored

    async def _incr(self, key: str, value: Any, tags: list[str]) -> bool:
        is_next = await awaited(self.room.cache.incr(key)) == value
        return is_next or await self._set(key, value, tags)

    async def _order(self, key: str, value: Any, tags: list[str]) -> bool:
        order = type("Order", (), {"loader": "fetch", "args": {"key": key}})()
        report = await awaited(self.room.upkeep.load(order))
        return bool(report["outcome"] == "loaded")

    async def _soften(self, key: str, value: Any, tags: list[str]) -> bool:
        """Return whether this value has replaced the one that was invalidated softly."""
        await awaited(self.room.cache.invalidate_by_tag(tags[0], soft=True))
        for _ in range(100):
            entry = await awaited(self.room.cache.get_entry(key))
            if entry is not None and version_of(entry.value) >= version_of(value):
                return True
            await awaited(self._load(key))
            await self.pause(0.005)
        return False

    # The background

    async def work(self) -> None:
        """Run refreshes, as a worker does, and free what was invalidated."""
        for order in self.orders.take():
            await awaited(self.room.upkeep.refresh(order))
        if self.number == 0 and random.random() < 0.1:
            await awaited(self.room.upkeep.reclaim(budget=0.2))
        await self.pause(0.003)

    async def pause(self, seconds: float) -> None:
        if self.face == "asyncio":
            await asyncio.sleep(seconds)
        else:
            time.sleep(seconds)

    # Running

    def acts(self) -> list[Callable[[], Awaitable[None]]]:
        return [*[self.request] * READERS, self.outside, self.write, self.work]

    def play(self, seconds: float) -> None:
        """Run all of it side by side for so long."""
        if self.face == "asyncio":
            asyncio.run(self._play_in_loop(seconds))
            return
        until = time.monotonic() + seconds
        failures: list[BaseException] = []

        def repeat(act: Callable[[], Coroutine[Any, Any, None]]) -> None:
            try:
                while time.monotonic() < until:
                    at_once(act())
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=repeat, args=(act,)) for act in self.acts()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.hits = self.room.stats.counts["near_hits"]
        self.room.close()
        if failures:
            raise failures[0]

    async def _play_in_loop(self, seconds: float) -> None:
        until = time.monotonic() + seconds

        async def repeat(act: Callable[[], Awaitable[None]]) -> None:
            while time.monotonic() < until:
                await act()
                await asyncio.sleep(0)

        async with self.room:
            await asyncio.gather(*[repeat(act) for act in self.acts()])
            self.hits = self.room.stats.counts["near_hits"]


def shelves(value: Any) -> list[str]:
    """Return the tag that only the value knows."""
    return [f"shelf:{value['key']}"] if isinstance(value, dict) else []


def as_value(key: str, version: int) -> Any:
    return version if key.startswith("incr") else {"version": version, "key": key}


def version_of(value: Any) -> int:
    return int(value["version"]) if isinstance(value, dict) else int(value)


async def awaited(given: Any) -> Any:
    """Return the result of a call of either face."""
    return await given if inspect.isawaitable(given) else given


def at_once(act: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that awaits nothing."""
    try:
        act.send(None)
    except StopIteration:
        return
    raise AssertionError("a blocking room gave something to await")


def take_part(
    url: str, seconds: float, number: int, processes: int, face: str, mutant: str = ""
) -> None:
    """Run one process of the history. Print its records as one line of JSON."""
    sys.setswitchinterval(1e-5)
    MUTANTS[mutant]()
    party, crowd = Party(url, number, processes, face), Crowd(url)
    crowd.ready()
    party.play(seconds)
    kinds = {Read: "r", Floor: "f", Torn: "t"}
    told = [[kinds[type(record)], *record] for record in party.records]
    print("records", json.dumps([party.hits, told]), flush=True)


class History(NamedTuple):
    reads: list[Read]
    floors: list[Floor]
    torn: list[Torn]
    hits: list[int]  # of copies, by process

    def broken(self) -> list[Any]:
        """Return whatever breaks the promise."""
        return [*broken(self.reads, self.floors), *self.torn]


def history_of(told: Iterable[str]) -> History:
    """Return the history from the output of the processes."""
    history = History([], [], [], [])
    places: dict[str, Any] = {
        "r": (Read, history.reads),
        "f": (Floor, history.floors),
        "t": (Torn, history.torn),
    }
    for one in told:
        hits, records = json.loads(one)
        history.hits.append(hits)
        for kind, *fields in records:
            make, place = places[kind]
            place.append(make(*fields))
    return history


# Processes that are wrong on purpose: the check has to find them out


def _forget_own_changes() -> None:
    from stillroom.cache.memo import Memo

    Memo.changed = lambda self, names=None: None  # type: ignore[method-assign]


def _forget_own_keys() -> None:
    from stillroom.cache.memo import Memo

    right = Memo.changed

    def changed(self: Memo, names: Sequence[bytes] | None = None) -> None:
        if names is None:
            right(self)

    Memo.changed = changed  # type: ignore[method-assign]


def _prove_after_the_read() -> None:
    from stillroom.cache.near import Near, Proof

    right = Near.learn

    def learn(self: Near, asked: Proof, *rest: Any) -> Operation[int]:
        return (yield from right(self, self.asking(), *rest))

    Near.learn = learn  # type: ignore[method-assign]


MUTANTS: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "own change forgotten": _forget_own_changes,
    "own key forgotten": _forget_own_keys,
    "proved after the read": _prove_after_the_read,
}
