"""The cache against a model with one rule.

The rule: a read that began after an invalidation had returned never yields a value that was made before that
invalidation began. After a soft one it may, and then it is stale. A `set` that returned True is an invalidation of
what its key held before. What an app ordered from workers is done in the end. No call raises what it does not
promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, ClassVar
from unittest.mock import patch

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from stillroom import Freshness, LoadFailed, RedisUnavailable, Settings, Stillroom
from stillroom.cache.loaders import Loader
from tests.explorer.explorer import Broken, Model
from tests.explorer.world import Actor, World
from tests.support.entries import Recording

KEYS = ("a1", "a2", "b1")
WEIGHTS_OF_KEYS = (6, 1, 2)  # most of what happens is about one key
GLOBS = ("*", "a*", "a1", "[ab]1", "x*")
WORKER = 2  # the process that works in the background
EVERYTHING = "everything"


def tags_of(key: str) -> list[str]:
    """An entry's tags; one key has none."""
    return [] if key == "b1" else [f"t:{key}", "t:all"]


@cache
def _arguments() -> Any:
    return TypeAdapter(TypedDict("load arguments", {"key": str}))


def _known_arguments(_: Loader) -> Any:
    """Return the type of each loader's arguments, which is the same in all processes: to make one takes long."""
    return _arguments()


TAGS = ("t:a1", "t:a1", "t:a2", "t:all", "t:none")


@dataclass
class Made:
    """A value: of which key, and when it was made.

    A loaded one is as old as the call of its loader. A `set` may act at any moment until it has returned, and not
    later, whatever it returned.
    """

    key: str
    at: float


@dataclass
class Invalidation:
    """Holds what was invalidated, and by which call."""

    what: str
    is_soft: bool
    call: Actor
    process: int | None = None  # None: every process is to know; else it was deferred there

    def names(self, key: str) -> bool:
        kind, _, name = self.what.partition(" ")
        if kind == "tag":
            return name in tags_of(key)
        return (
            kind == EVERYTHING
            or (kind == "key" and name == key)
            or (kind == "glob" and fnmatchcase(key, name))
        )

    def forbids(self, made: Made, read: Actor) -> bool:
        returned = self.call.returned
        return (
            returned is not None
            and self.process in (None, read.process)
            and returned < read.began
            and made.at < self.call.began
            and self.names(made.key)
        )


class CacheModel(Model):
    """Two processes and a worker on one cache."""

    SETTINGS: ClassVar[dict[str, Any]] = {
        "ttl": 60.0,
        "swr": 300.0,
        "jitter": 0.0,  # every step follows from the seed
        "life_limit": 900.0,
        "lease": 2.0,
        "wait": 3.0,
        "refresh_lease": 2.0,
        "lease_limit": 5.0,
        "backoff": 1.0,
        "backoff_limit": 4.0,
        "breaker_failures": 1_000_000,
        "breaker_calls": 1_000_000,
        "outbox_limit": 3,
    }
    WEIGHTS: ClassVar[dict[str, float]] = {
        "read": 7,
        "write": 5,
        "invalidate": 6,
        "work": 2,
        "order": 1.5,
        "lose": 1.2,
        "die": 0.8,
    }

    def __init__(self, world: World, settings: Settings, weights: Mapping[str, float]) -> None:
        super().__init__(world, settings, weights)
        self.dispatch = Recording()
        self.rooms = [self._room() for _ in range(3)]
        self.loaders = [self._loaders(room) for room in self.rooms]
        self.made: dict[int, Made] = {}
        self.failed: list[float] = []  # when loads have failed
        self.invalidations: list[Invalidation] = []
        self.ordered: list[tuple[str, Actor, int]] = []  # what, by which call, on which server

    def _loaders(self, room: Stillroom) -> Any:
        def load(key: str) -> int:
            return self._load(key)

        tags: Any = [lambda value: tags_of(self.made[value].key)]
        with patch.object(Loader, "_arguments_type", _known_arguments):
            return room.cache.cached("{key}", tags=tags, name="load")(load)

    def _make(self, key: str) -> int:
        self.made[len(self.made)] = Made(key, self.world.tick())
        return len(self.made) - 1

    def _load(self, key: str) -> int:
        """Return the database's value when the loader is called. It may take a while to arrive."""
        value = self._make(key)
        for _ in range(self.world.random.randint(0, 3)):
            self.world.pause()
        if self.world.chance(0.1):
            self.failed.append(self.world.tick())
            raise OSError("the database is away")
        return value

    # Events

    def act(self) -> None:
        process = self.world.random.randint(0, 1)
        self._acts()[self._next()](process)

    def _acts(self) -> dict[str, Callable[[int], None]]:
        """Return the events of WEIGHTS, each of which happens in a process."""
        return {
            "read": self._read,
            "write": self._write,
            "invalidate": self._invalidate,
            "work": self._work,
            "order": self._order,
            "lose": self._lose,
            "die": self._begin_anew,
        }

    def _key(self) -> str:
        return self.world.random.choices(KEYS, WEIGHTS_OF_KEYS)[0]

    def _read(self, process: int) -> None:
        key = self._key()
        cache, load = self.rooms[process].cache, self.loaders[process]
        others = list({key, self.world.random.choice(KEYS)})

        def load_many(keys: list[str]) -> dict[str, int]:
            return {key: self._load(key) for key in keys}

        tagged: Any = {"tags": [lambda value: tags_of(self.made[value].key)]}
        ways: dict[str, Callable[[], Any]] = {
            "get": lambda: cache.get(key, int),
            "get_entry": lambda: cache.get_entry(key, int),
            "get_or_set": lambda: cache.get_or_set(
                key, lambda: self._load(key), type=int, **tagged
            ),
            "call": lambda: load(key),
            "get_many": lambda: cache.get_many(others, int),
            "get_or_set_many": lambda: cache.get_or_set_many(others, load_many, type=int, **tagged),
        }
        way = self.world.random.choice(list(ways))
        self._call(f"{way} {key}", process, ways[way], self._check_read)

    def _write(self, process: int) -> None:
        key = self._key()
        cache, value = self.rooms[process].cache, self._make(key)
        self.made[value].at = math.inf
        kept: Any = {"tags": tags_of(key), "type": int}
        ways: dict[str, Callable[[], Any]] = {
            "set": lambda: cache.set(key, value, **kept),
            "set_many": lambda: cache.set_many({key: value}, **kept)[key],
            "add": lambda: cache.add(key, value, **kept),
            "touch": lambda: cache.touch(key),
        }
        way = self.world.random.choice(["set", "set", *ways])

        def check(call: Actor) -> None:
            self._expect(call, ())
            self.made[value].at = call.returned or 0
            if call.value is True and way in ("set", "set_many"):
                self.invalidations.append(Invalidation(f"key {key}", False, call))

        self._call(f"{way} {key}={value}", process, ways[way], check)

    def _invalidate(self, process: int) -> None:
        chance, cache = self.world.random, self.rooms[process].cache
        defer, soft = chance.random() < 0.2, chance.random() < 0.3
        key, tag, glob = self._key(), chance.choice(TAGS), chance.choice(GLOBS)
        what, is_soft, act = chance.choice(
            [
                (f"key {key}", False, lambda: cache.invalidate(key, defer=defer)),
                (f"key {key}", False, lambda: cache.invalidate_many([key])),
                (
                    f"tag {tag}",
                    soft,
                    lambda: cache.invalidate_by_tag(tag, soft=soft, defer=defer),
                ),
                (
                    f"tag {tag}",
                    soft,
                    lambda: cache.invalidate_by_tag(tag, soft=soft, defer=defer),
                ),
                (f"glob {glob}", False, lambda: cache.invalidate_by_pattern(glob, defer=defer)),
                (EVERYTHING, False, lambda: cache.clear(defer=defer)),
            ]
        )

        def check(call: Actor) -> None:
            self._expect(call, (RedisUnavailable,))
            if call.error is None:
                own = process if cache.deferred else None
                self.invalidations.append(Invalidation(what, is_soft, call, own))

        self._call(f"invalidate{' softly' if is_soft else ''} {what}", process, act, check)

    def _work(self, _: int) -> None:
        """Begin some work of workers: refresh, reclaim or trim."""
        chance, cache = self.world.random, self.rooms[WORKER].cache
        orders = self.dispatch.orders
        if orders and chance.random() < 0.6:
            order = orders[chance.randrange(len(orders))]
            if chance.random() < 0.8:
                orders.remove(order)
            work: Callable[[], Any] = lambda: cache.refresh(order)  # noqa: E731  # one of several
            name = f"refresh {order.key}"
        else:
            name, work = chance.choice(
                [
                    ("reclaim", lambda: cache.reclaim(budget=0.05)),
                    ("reclaim", lambda: cache.reclaim(budget=0.05)),
                    ("trim_marks", cache.trim_marks),
                    ("trim_indexes", cache.trim_indexes),
                ]
            )
        self._call(name, WORKER, work, lambda call: self._expect(call, (RedisUnavailable, OSError)))

    def _order(self, process: int) -> None:
        """Order work from workers, as an app does. A value that was loaded by order replaces an older one."""
        chance, tasks = self.world.random, self.rooms[process].tasks
        key, tag, glob = chance.choice(KEYS), chance.choice(TAGS), chance.choice(GLOBS)
        what, order = chance.choice(
            [
                (f"key {key}", lambda: tasks.load(self.loaders[process], key)),
                (f"key {key}", lambda: tasks.invalidate_keys(key)),
                (f"tag {tag}", lambda: tasks.invalidate_tags(tag)),
                (f"glob {glob}", lambda: tasks.invalidate_pattern(glob)),
            ]
        )

        def check(call: Actor) -> None:
            self._expect(call, (RedisUnavailable,))
            if call.error is None:
                self.ordered.append((what, call, self.world.place))

        self._call(f"order {what}", process, order, check)

    def _lose(self, _: int) -> None:
        """Let keys be evicted or run out, or scripts be lost."""
        keys, chance = self.rooms[0].keys, self.world.random
        key = chance.choice(KEYS).encode()
        lost: dict[str, list[bytes]] = {
            "clock": [keys.clock],
            "marks": [keys.marks],
            "globs": [keys.globs],
            "marks and globs": [keys.marks, keys.globs],
            "todo": [keys.todo],
            "lease": [keys.lease(key)],
            "entry": [keys.entry(key)],
            "index": [keys.index(b"t:all")],
        }
        what = chance.choice([*lost, "scripts", "all"])
        self.world.note(f"lost: {what}")
        if what == "scripts":
            self.world.lose_scripts()
        elif what == "all":
            self.world.ask("FLUSHALL")
            self.ordered.clear()
        else:
            self.world.ask("DEL", *lost[what])

    def _begin_anew(self, process: int) -> None:
        """End a process, or the worker, without a word, and begin another one."""
        process = WORKER if self.world.chance(0.4) else process
        self.world.kill(process)
        # What was deferred there is lost.
        self.invalidations = [one for one in self.invalidations if one.process != process]
        self.rooms[process] = self._room()
        self.loaders[process] = self._loaders(self.rooms[process])

    # Invariants

    def end(self) -> None:
        world = self.world
        if self.ordered:
            self._carry_out_orders()
        newcomer = len(self.rooms)
        self.rooms.append(self._room())
        for process in (0, 1, newcomer):
            for key in KEYS:
                look = partial(self.rooms[process].cache.get_entry, key, int)
                self._check_read(world.run(f"last get_entry {key}", process, look))

    def _carry_out_orders(self) -> None:
        """Time goes on, and a worker looks now and then: in the end all orders are done."""
        world, cache = self.world, self.rooms[WORKER].cache
        for _ in range(12):
            world.pass_time(30.0)
            call = world.run("reclaim", WORKER, lambda: cache.reclaim(budget=1.0))
            self._expect(call, (RedisUnavailable,))
        for what, call, place in self.ordered:
            if place == world.place:
                done = Actor(world, f"order {what}", WORKER, lambda: None)
                done.began, done.returned = call.began, world.tick()
                self.invalidations.append(Invalidation(what, False, done))

    def _call(
        self, name: str, process: int, act: Callable[[], Any], check: Callable[[Actor], None]
    ) -> None:
        """Begin a call; it is checked as soon as it has ended."""
        self.world.call(name, process, act, check)

    def _check_read(self, call: Actor) -> None:
        self._expect(call, (OSError, LoadFailed))
        if isinstance(call.error, LoadFailed) and not any(at > call.began for at in self.failed):
            raise Broken(f"{call.name} was told of a failure that is older than it: {call.error}")
        if call.error is not None or call.value is None:
            return
        seen = call.value
        if isinstance(seen, dict):
            for key, value in seen.items():
                self._check_value(call, key, value, None)
        elif isinstance(seen, int):
            self._check_value(call, call.name.split()[-1], seen, None)
        else:
            self._check_value(call, call.name.split()[-1], seen.value, seen.freshness)

    def _check_value(self, call: Actor, key: str, value: int, freshness: Freshness | None) -> None:
        made = self.made[value]
        if made.key != key:
            raise Broken(f"{call.name} saw a value of {made.key}")
        for one in self.invalidations:
            if one.forbids(made, call) and (not one.is_soft or freshness is Freshness.FRESH):
                raise Broken(
                    f"{call.name}, begun at {call.began}, saw value {value}, made at {made.at}, in spite of "
                    f"{one.call.name}, begun at {one.call.began} and ended at {one.call.returned}"
                )


class ShardsModel(CacheModel):
    """The same in a cache of several shards, on one server."""

    SETTINGS: ClassVar[dict[str, Any]] = CacheModel.SETTINGS | {"shards": 3}
