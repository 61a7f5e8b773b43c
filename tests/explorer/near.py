"""The cache against the rules of the copies that processes keep.

The first: a read in a request never yields a value that was made before an invalidation that had returned when the
request began, or, where the reader's own process made that invalidation, when the read began. Outside of a request
a read may be `near` seconds behind what other processes have invalidated. The second: what a load is made of is as
new as the load, whatever invalidates both. The third: in a request one key has one value, as long as the reader's
process changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

from stillroom import LoadFailed, RedisUnavailable, Settings, Stillroom
from stillroom.cache.judge import Judge
from stillroom.cache.loaders import Loader
from stillroom.cache.memo import KEPT_S, Memo
from stillroom.cache.near import Near, Store
from tests.explorer.cache import WORKER, CacheModel, Invalidation, _known_arguments, tags_of
from tests.explorer.explorer import CALM, Broken
from tests.explorer.world import World

NEAR_S = 2.0  # for which a read outside of a request may be behind
READS = 5  # of a request
# Where a thread may be interrupted besides each command.
BOUNDARIES: tuple[tuple[Any, str], ...] = (
    *((Store, name) for name in ("put", "drop", "name")),
    *((Near, name) for name in ("usable", "keep", "learn_names", "learn_own")),
    *((Judge, "learn"), (Judge, "learn_own"), (Memo, "changed"), (Memo, "remember")),
)


@dataclass
class NearRead:
    """A read of a key, and from when on it has to show what its own process, or another one, has invalidated."""

    name: str
    process: int
    own_since: int  # ticks
    others_since: float  # ticks, or seconds outside of a request
    is_in_request: bool

    def must_show(self, one: Invalidation) -> bool:
        """Return whether this read must show an invalidation."""
        returned = one.call.returned
        if returned is None or one.process not in (None, self.process):
            return False
        if one.call.process == self.process:
            return returned < self.own_since
        return (returned if self.is_in_request else one.call.returned_s) < self.others_since


class NearModel(CacheModel):
    """Two processes that keep copies, and a worker."""

    # Nobody joins a load that began before he came, whatever others have invalidated since.
    SETTINGS: ClassVar[dict[str, Any]] = CacheModel.SETTINGS | {"away_ttl": 0.0}
    WEIGHTS: ClassVar[dict[str, float]] = CacheModel.WEIGHTS | {
        "request": 10,
        "outside": 3,
        "read": 2,
        "write": 4,
        "order": 0.5,
    }

    def __init__(self, world: World, settings: Settings, weights: Mapping[str, float]) -> None:
        self.fallbacks = 0
        self.parts: dict[int, int] = {}  # what a value was made of
        super().__init__(world, settings, weights)
        self._is_calm = world.fates is CALM

    def _loaders(self, room: Stillroom) -> Any:
        def load(key: str) -> int:
            return self._load(key)

        def fall_back(operation: str, error: RedisUnavailable) -> None:
            self.fallbacks += 1
            falls_back(operation, error)

        body: Any = room.cache._body
        falls_back, body._fall_back = body._fall_back, fall_back
        tags: Any = [lambda value: tags_of(self.made[value].key)]
        with patch.object(Loader, "_arguments_type", _known_arguments):
            return room.cache.cached("{key}", tags=tags, name="load", near=NEAR_S)(load)

    def _load(self, key: str) -> int:
        """Make a value, one of b1 sometimes of what this process keeps of a1."""
        value = super()._load(key)
        process = self.world.current.process if self.world.current else WORKER
        if key == "b1" and process != WORKER and self.world.chance(0.8):
            part = self._value(partial(self.loaders[process], "a1"))
            if part is not None:
                self.parts[value] = part
        return value

    def _read(self, process: int) -> None:
        """Read as a process that keeps nothing."""
        kept = self.loaders[process]
        self.loaders[process] = partial(self.rooms[process].cache.get, type=int)
        super()._read(process)
        self.loaders[process] = kept

    def _acts(self) -> dict[str, Callable[[int], None]]:
        return super()._acts() | {"request": self._request, "outside": self._outside}

    def _ways(self, process: int, key: str, near: Any) -> list[Callable[[], Any]]:
        cache, load = self.rooms[process].cache, self.loaders[process]
        tagged: Any = {"tags": [lambda value: tags_of(self.made[value].key)]}
        return [
            lambda: load(key),
            lambda: load(key),
            lambda: load.many([key])[0],
            lambda: cache.gather(partial(load, key), partial(load, "a2"))[0],
            lambda: cache.get(key, int, near=near),
            lambda: cache.get_or_set(key, lambda: self._load(key), type=int, near=near, **tagged),
        ]

    def _request(self, process: int) -> None:
        """Read some keys in one request, some of them twice."""
        world, room = self.world, self.rooms[process]
        keys = [self._key() for _ in range(world.random.randint(1, READS))]

        def request() -> None:
            with room.request():
                began, began_s = world.tick(), world.monotonic
                seen: dict[str, tuple[int, Any]] = {}
                for key in keys:
                    way = world.random.choice(self._ways(process, key, True))
                    read = NearRead(f"near {key}", process, world.tick(), began, True)
                    changes = self._changes(process)
                    value = self._value(way)
                    if value is not None:
                        self._check_near(read, key, value)
                        first, before = seen.get(key, (value, None))
                        is_same = changes == self._changes(process)
                        is_short = self._is_calm and world.monotonic < began_s + KEPT_S
                        if value != first and before == changes and is_same and is_short:
                            raise Broken(f"one request saw {first} and {value} of {key}")
                        seen[key] = value, changes if is_same else None
                    if world.chance(0.5):
                        world.pause()

        self._call(f"request {' '.join(keys)}", process, request, self._check_near_call)

    def _changes(self, process: int) -> Any:
        """Return what is another one once the process has changed something, or a call went without Redis."""
        room: Any = self.rooms[process]
        return room.cache._body._memo.changes, self.fallbacks

    def _outside(self, process: int) -> None:
        """Read outside of a request."""
        world, key = self.world, self._key()
        way = world.random.choice(self._ways(process, key, NEAR_S))

        def outside() -> None:
            since_s = world.monotonic - NEAR_S
            read = NearRead(f"outside {key}", process, world.tick(), since_s, False)
            if (value := self._value(way)) is not None:
                self._check_near(read, key, value)

        self._call(f"outside {key}", process, outside, self._check_near_call)

    def _value(self, way: Callable[[], Any]) -> int | None:
        try:
            value: int | None = way()
        except (OSError, LoadFailed):
            return None
        return value

    def _check_near_call(self, call: Any) -> None:
        self._look()
        if call.error is not None:
            if isinstance(call.error, Broken):
                raise call.error
            raise Broken(f"{call.name} raised {call.error!r}") from call.error

    def _check_near(self, read: NearRead, key: str, value: int) -> None:
        made = self.made[value]
        if made.key != key:
            raise Broken(f"{read.name} saw a value of {made.key}")
        part = self.made.get(self.parts.get(value, -1), made)
        for one in self.invalidations:
            if one.is_soft or not (one.names(key) and read.must_show(one)):
                continue
            if made.at < one.call.began or (one.names(part.key) and part.at < one.call.began):
                raise Broken(
                    f"{read.name} in process {read.process}, begun at {read.own_since} and {read.others_since}, "
                    f"saw value {value}, made at {made.at} of what was made at {part.at}, in spite of "
                    f"{one.call.name}, begun at {one.call.began} and ended at {one.call.returned} in process "
                    f"{one.call.process}"
                )

    def _lose(self, process: int) -> None:
        keys = self.rooms[0].keys
        if self.world.chance(0.4):
            what, key = self.world.random.choice([("registry", keys.near), ("names", keys.named)])
            self.world.note(f"lost: {what}")
            self.world.ask("DEL", key)
        else:
            super()._lose(process)


@contextmanager
def interrupted(world: World, probability: float = 0.15) -> Iterator[None]:
    """Let a thread be interrupted at more places than its commands."""

    def wrapped(right: Any) -> Any:
        def wrapper(*args: Any, **options: Any) -> Any:
            if (
                world.current is not None
                and not world.current.is_dead
                and world.chance(probability)
            ):
                world.pause()
            return right(*args, **options)

        return wrapper

    with ExitStack() as stack:
        for owner, name in BOUNDARIES:
            stack.enter_context(patch.object(owner, name, wrapped(getattr(owner, name))))
        yield
