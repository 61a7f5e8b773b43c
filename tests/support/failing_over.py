"""A history of reads and invalidations while Redis fails over again and again; see history.py for the check.

Several rooms stand for processes. The database is a dict, which no accident touches. An invalidation that was
refused, or that no replica had in time, has promised nothing: it is no floor.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Self

from stillroom import InlineDispatch, RedisUnavailable, Settings, Stillroom
from tests.support.history import Floor, Read
from tests.support.threads import Threads

KINDS = ("key", "many", "tag", "value", "pattern", "set", "clear")
EACH = 3  # keys of each kind
READERS = 3  # rooms that read and load, each in two threads
TTL, SWR = 0.2, 60.0  # many reads meet a stale entry, which is refreshed at once
PAUSE_S = 0.002


class Database:
    """The newest version of each key, and how long a read of one takes."""

    def __init__(self) -> None:
        self._versions: Counter[str] = Counter()

    def next(self, key: str) -> int:
        self._versions[key] += 1
        return self._versions[key]

    def read(self, key: str) -> dict[str, Any]:
        time.sleep(random.uniform(0, PAUSE_S))
        found = {"version": self._versions[key], "shelf": key}
        time.sleep(random.uniform(0, PAUSE_S))
        return found


class History(Threads):
    """Readers and a writer that go on through everything that happens within the `with` block."""

    def __init__(self, url: str, *, pause_s: float = PAUSE_S, **changes: Any) -> None:
        """`pause_s`: of each thread between two calls."""
        super().__init__()
        self._pause_s = pause_s
        self._settings = Settings(**{"redis_url": url, "ttl": TTL, "swr": SWR} | changes)
        self.keys = [f"{kind}:{n}" for kind in KINDS for n in range(EACH)]
        self.reads: list[Read] = []
        self.floors: list[Floor] = []
        self.done = 0  # invalidations that have returned …
        self.unconfirmed = 0  # … those among them that too few replicas had in time …
        self.refused = 0  # … and those that have not
        self._database = Database()
        self._written = threading.Condition()

    def await_writes(self, count: int, within_s: float) -> float:
        """Wait until that many more invalidations have returned; return how many seconds that took."""
        began, wanted = time.monotonic(), self.done + count
        with self._written:
            done = self._written.wait_for(lambda: self.done >= wanted, within_s)
        assert done, f"no {count} writes within {within_s} s"
        return time.monotonic() - began

    def __enter__(self) -> Self:
        rooms = [self._room() for _ in range(READERS + 1)]
        for room in rooms[1:] * 2:
            self.start(partial(self._read, room))
        self.start(partial(self._write, rooms[0]))
        return self

    def _room(self) -> Stillroom:
        room = Stillroom(self._settings, dispatch=InlineDispatch())
        return self._stack.enter_context(room)

    # Reading

    def _read(self, room: Stillroom) -> None:
        tags: list[Any] = ["all:{key}", lambda value: [f"shelf:{value['shelf']}"]]
        load = room.cache.cached("{key}", tags=tags)(self._loader())
        while not self._stop.is_set():
            key = random.choice(self.keys)
            ways = [self._get, self._get_many, self._get_or_set, lambda room, key: {key: load(key)}]
            how, began = random.choice(ways), time.monotonic_ns()
            for name, value in how(room, key).items():
                if value is not None:
                    self.reads.append(Read(name, began, value["version"]))
            time.sleep(self._pause_s)

    def _loader(self) -> Callable[[str], dict[str, Any]]:
        def load(key: str) -> dict[str, Any]:
            return self._database.read(key)

        return load

    def _get(self, room: Stillroom, key: str) -> Mapping[str, Any]:
        return {key: room.cache.get(key)}

    def _get_many(self, room: Stillroom, key: str) -> Mapping[str, Any]:
        names = {key, *random.sample(self.keys, 3)}
        if random.random() < 0.5:
            return room.cache.get_many(names)
        found = lambda value: [f"all:{value['shelf']}", f"shelf:{value['shelf']}"]  # noqa: E731
        return room.cache.get_or_set_many(names, self._load_many, tags=[found])

    def _load_many(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        return {key: self._database.read(key) for key in keys}

    def _get_or_set(self, room: Stillroom, key: str) -> Mapping[str, Any]:
        tags = [f"all:{key}", f"shelf:{key}"]
        return {key: room.cache.get_or_set(key, lambda: self._database.read(key), tags=tags)}

    # Writing

    def _write(self, room: Stillroom) -> None:
        weights = [0.05 if key.startswith("clear") else 1.0 for key in self.keys]
        while not self._stop.wait(self._pause_s):
            key = random.choices(self.keys, weights)[0]
            version = self._database.next(key)
            with room.request() as request:
                try:
                    is_done = self._tell(room, key, version)
                except RedisUnavailable:
                    is_done = False
            if not is_done:
                self.refused += 1
                continue
            if request.unconfirmed:
                self.unconfirmed += 1
            else:
                self.floors.append(Floor(key, time.monotonic_ns(), version))
            with self._written:
                self.done += 1
                self._written.notify_all()

    def _tell(self, room: Stillroom, key: str, version: int) -> bool:
        cache = room.cache
        match key.partition(":")[0]:
            case "key":
                cache.invalidate(key)
            case "many":
                cache.invalidate_many([key, "another"])
            case "tag":
                cache.invalidate_by_tag(f"all:{key}")
            case "value":
                cache.invalidate_by_tag(f"shelf:{key}")
            case "pattern":
                cache.invalidate_by_pattern(f"{key[:-1]}[{key[-1]}{random.choice('abcdef')}]")
            case "clear":
                cache.clear()
            case "set":
                tags = [f"all:{key}", f"shelf:{key}"]
                return cache.set(key, {"version": version, "shelf": key}, tags=tags)
        return True


def behind_by(reads: Iterable[Read], floors: Iterable[Floor]) -> list[tuple[float, Read, Floor]]:
    """Return the reads that saw less than the cache had been told before they began, and by how many seconds."""
    by_key: dict[str, list[Floor]] = defaultdict(list)
    for floor in floors:
        by_key[floor.key].append(floor)
    found = []
    for read in reads:
        missed = [
            f for f in by_key[read.key] if f.returned < read.began and f.version > read.version
        ]
        if missed:
            first = missed[0]
            found.append(((read.began - first.returned) / 1e9, read, first))
    return found
