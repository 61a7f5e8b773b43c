"""While Redis is away a process runs one load at a time for each key and keeps its value for a moment."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from stillroom import AsyncStillroom, NoDispatch, Settings, Stillroom
from stillroom.cache.away import Away
from stillroom.embedded import EmbeddedServer
from tests.support.celery_process import until
from tests.support.faces import FACES, open_room
from tests.support.stepper import Stepper

NOBODY = "redis://127.0.0.1:1"
LOAD_S = 0.05
AWAY_S = 3.0
CALLERS = 20
MANY = 500  # calls


class Source:
    """A number that grows with each load, and whose load can be held back."""

    def __init__(self) -> None:
        self.loads = 0
        self.at_once = 0
        self.most = 0
        self.began = threading.Event()
        self.goes_on = threading.Event()
        self.goes_on.set()
        self._lock = threading.Lock()

    def hold(self) -> None:
        self.began.clear()
        self.goes_on.clear()

    def load(self) -> dict[str, int]:
        with self._lock:
            self.loads += 1
            number = self.loads
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        self.began.set()
        self.goes_on.wait(10)
        with self._lock:
            self.at_once -= 1
        return {"number": number}


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture(params=FACES)
def open_here(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    with ExitStack() as stack:

        def open_here(url: str = NOBODY, **changes: Any) -> Any:
            settings = Settings(**{"redis_url": url, "breaker_failures": 1} | changes)
            room = stack.enter_context(open_room(request.param, settings, NoDispatch()))
            room.cache.get("is it there")
            return room

        yield open_here


def obtained(room: Any, source: Source, key: str = "k", **options: Any) -> Any:
    return room.cache.get_or_set(key, source.load, **options)["number"]


# A moment


def test_a_value_serves_for_a_moment(open_here: Any, source: Source) -> None:
    """While Redis is away a value is kept for `away_ttl` seconds and no longer than its own ttl."""
    room = open_here(away_ttl=0.3)
    began = time.monotonic()
    found = [obtained(room, source) for _ in range(5)]
    assert found == [1] * 5 or time.monotonic() - began > 0.3
    until(lambda: obtained(room, source) == found[-1] + 1, "the next load", 2)
    patient = open_here(away_ttl=60)
    first = obtained(patient, source, "short", ttl=0.01)
    until(
        lambda: obtained(patient, source, "short", ttl=0.01) == first + 1, "the load after its ttl"
    )


def test_nobody_shares_an_object(open_here: Any, source: Source) -> None:
    """Callers do not share an object, so that one caller's change of a value is nobody else's."""
    room = open_here()
    mine = room.cache.get_or_set("k", source.load)
    mine["number"] = "spoilt"
    assert obtained(room, source) == 1


INVALIDATIONS: dict[str, Callable[[Any], Any]] = {
    "key": lambda cache: cache.invalidate("k", defer=True),
    "tag": lambda cache: cache.invalidate_by_tag("t", defer=True),
    "soft": lambda cache: cache.invalidate_by_tag("t", soft=True, defer=True),
    "pattern": lambda cache: cache.invalidate_by_pattern("[k]*", defer=True),
    "clear": lambda cache: cache.clear(defer=True),
    "set": lambda cache: cache.set("k", {"number": 0}),
    "set_many": lambda cache: cache.set_many({"k": {"number": 0}}),
    "add": lambda cache: cache.add("k", {"number": 0}),
}


@pytest.mark.parametrize("kind", INVALIDATIONS)
def test_what_this_process_invalidates_is_not_served(
    open_here: Any, source: Source, kind: str
) -> None:
    """An invalidation by key, tag, pattern or all, and another set, is obeyed while Redis is away."""
    room = open_here()
    assert obtained(room, source, tags=["t"]) == 1
    assert obtained(room, source, "other") == 2
    INVALIDATIONS[kind](room.cache)
    assert obtained(room, source, tags=["t"]) == 3
    assert obtained(room, source, "other") == (4 if kind == "clear" else 2)


def test_a_tag_that_only_the_value_knows_is_obeyed(open_here: Any, source: Source) -> None:
    """A tag made from the loaded value is obeyed while Redis is away."""
    room = open_here()
    tags = [lambda value: f"number:{value['number']}"]
    assert obtained(room, source, tags=tags) == 1
    room.cache.invalidate_by_tag("number:2", defer=True)
    assert obtained(room, source, tags=tags) == 1
    room.cache.invalidate_by_tag("number:1", defer=True)
    assert obtained(room, source, tags=tags) == 2


def test_a_refused_invalidation_is_obeyed_here_all_the_same(open_here: Any, source: Source) -> None:
    """An invalidation that raises, because no other process learned it, is obeyed in this process."""
    room = open_here()
    assert obtained(room, source) == 1
    with pytest.raises(Exception, match="unavailable"):
        room.cache.invalidate("k")
    assert obtained(room, source) == 2


def test_what_is_kept_has_a_bound_in_bytes(open_here: Any) -> None:
    """The kept values have a bound in bytes: the oldest goes first, and a larger value is not kept."""
    room = open_here(away_limit=10_000)
    loads: list[str] = []

    def load(key: str, size: int) -> Callable[[], str]:
        return lambda: loads.append(key) or "x" * size  # type: ignore[func-returns-value]

    for n in range(10):
        room.cache.get_or_set(f"k{n}", load(f"k{n}", 2_000))
    for key in ("k9", "k0", "huge", "huge"):
        room.cache.get_or_set(key, load(key, 20_000 if key == "huge" else 2_000))
    assert loads == [f"k{n}" for n in range(10)] + ["k0", "huge", "huge"]


def test_when_redis_is_back_nothing_is_kept(
    open_here: Any, own_server: EmbeddedServer, source: Source
) -> None:
    """When Redis is back nothing of the process is kept, and one load serves all processes."""
    patience = {"connect_timeout": 1, "command_timeout": 1, "call_timeout": 2}
    room = open_here(own_server.url, away_ttl=60, **patience)
    own_server.kill()
    until(lambda: room.cache.get("k") is None and room.wire.breaker.is_open, "the outage")
    assert [obtained(room, source) for _ in range(3)] == [1] * 3
    own_server.restart()
    until(lambda: not room.wire.breaker.is_open, "recovery")
    assert obtained(room, source) == 2
    assert room.cache.get("k") == {"number": 2}


def test_many_keys_share_what_is_kept_with_single_ones(open_here: Any, source: Source) -> None:
    """get_or_set_many shares the kept values with single calls, and loads the others in one call."""
    room = open_here()
    asked: list[list[str]] = []

    def load_many(keys: list[str]) -> dict[str, Any]:
        asked.append(keys)
        return {key: {"number": 7} for key in keys if key != "none"}

    kind = dict[str, int]
    assert obtained(room, source, "a", type=kind) == 1
    for _ in range(2):
        found = room.cache.get_or_set_many(["a", "b", "none"], load_many, type=kind)
        assert found == {"a": {"number": 1}, "b": {"number": 7}}
    assert asked == [["b", "none"], ["none"]]
    assert obtained(room, source, "b", type=kind) == 7


# One load at a time, in threads


def in_threads(*acts: Callable[[], Any]) -> tuple[list[threading.Thread], list[Any]]:
    results: list[Any] = [None] * len(acts)

    def run(place: int, act: Callable[[], Any]) -> None:
        try:
            results[place] = act()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(acts)]
    for thread in threads:
        thread.start()
    return threads, results


@pytest.fixture
def all_came(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that waits until so many callers load or know the load that they wait for."""
    came: list[object] = []
    take_off = Away._take_off

    def counted(away: Away, names: Any) -> Any:
        flights = take_off(away, names)
        came.append(names)
        return flights

    monkeypatch.setattr(Away, "_take_off", counted)
    return lambda callers: until(lambda: len(came) >= callers, "all callers")


@pytest.fixture
def make_room() -> Iterator[Callable[..., Stillroom]]:
    with ExitStack() as stack:

        def make(**changes: Any) -> Stillroom:
            settings = Settings(**{"redis_url": NOBODY, "breaker_failures": 1} | changes)
            room = stack.enter_context(Stillroom(settings, dispatch=NoDispatch()))
            room.cache.get("is it there")
            return room

        yield make


def test_callers_at_the_same_time_are_one_load(
    make_room: Any, all_came: Callable[[int], None], source: Source
) -> None:
    """Callers at the same time wait for the load under way and get its value."""
    room = make_room()
    source.hold()
    threads, results = in_threads(*[lambda: obtained(room, source)] * 10)
    all_came(10)
    source.goes_on.set()
    for thread in threads:
        thread.join()
    assert (results, source.loads) == ([1] * 10, 1)


def test_a_value_that_is_not_kept_is_given_to_whoever_waits_for_it(
    make_room: Any, source: Source
) -> None:
    """A caller takes the value of a load that was under way also where it is too large to be kept."""
    room = make_room(away_limit=0)
    first, second = (Stepper(room, room._cache_body.get_or_set("k", source.load)) for _ in range(2))
    first.run_to_the_load()
    assert second.run().is_waiting
    assert first.value() == {"number": 1}
    second.step()
    assert second.value() == {"number": 1}
    assert obtained(room, source) == 2


def test_nobody_waits_for_a_load_longer_than_the_app_says(make_room: Any, source: Source) -> None:
    """After `wait` seconds a caller loads for itself, and only for itself."""
    room = make_room(wait=0.05)
    first = Stepper(room, room._cache_body.get_or_set("k", source.load)).run_to_the_load()
    began = time.monotonic()
    assert obtained(room, source) == 1
    assert time.monotonic() - began > 0.05
    assert first.value() == {"number": 2}
    assert obtained(room, source) == 2


@pytest.mark.parametrize("kind", ["key", "tag", "pattern", "clear"])
def test_nobody_is_given_a_load_that_an_invalidation_overtook(
    make_room: Any, all_came: Callable[[int], None], source: Source, kind: str
) -> None:
    """A caller from after an invalidation loads anew, and so does everybody behind; nothing old is kept."""
    room = make_room()
    source.hold()
    first, early = in_threads(lambda: obtained(room, source, tags=["t"]))
    source.began.wait(5)
    INVALIDATIONS[kind](room.cache)
    second, late = in_threads(*[lambda: obtained(room, source, tags=["t"])] * 3)
    all_came(1 + 3)
    source.goes_on.set()
    for thread in [*first, *second]:
        thread.join()
    assert early == [1]
    assert 1 not in late
    assert obtained(room, source, tags=["t"]) != 1


def test_without_a_moment_nobody_joins_a_load_that_began_before_he_came(
    make_room: Any, all_came: Callable[[int], None], source: Source
) -> None:
    """With `away_ttl=0` a caller joins only a load that began later, because others' invalidations are unknown."""
    room = make_room(away_ttl=0)
    source.hold()
    first, early = in_threads(lambda: obtained(room, source))
    source.began.wait(5)
    second, late = in_threads(*[lambda: obtained(room, source)] * 5)
    all_came(1 + 5)
    source.goes_on.set()
    for thread in [*first, *second]:
        thread.join()
    assert early == [1]
    assert 1 not in late
    assert obtained(room, source) != obtained(room, source)
    assert source.most == 1


def test_a_load_that_fails_fails_for_all_who_waited(
    make_room: Any, all_came: Callable[[int], None], source: Source
) -> None:
    """A failing load fails for all waiting callers at once, and the next caller tries again.

    Each has an error of its own: in one that they share, the report of a visitor's error would show the others.
    """
    room = make_room()
    source.hold()

    def fail() -> Any:
        source.load()
        raise ValueError("no database")

    threads, results = in_threads(*[lambda: room.cache.get_or_set("k", fail)] * 5)
    all_came(5)
    source.goes_on.set()
    for thread in threads:
        thread.join()
    assert {str(error) for error in results} == {"no database"}
    assert len({id(error) for error in results}) == 5
    assert source.loads == 1
    assert obtained(room, source) == 2


def test_a_caller_who_is_cancelled_leaves_his_load_to_the_next(source: Source) -> None:
    """A cancelled caller leaves its load to the next one and takes no other along."""

    async def play() -> list[int]:
        settings = Settings(redis_url=NOBODY, breaker_failures=1)
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            await room.cache.get("is it there")
            begun, numbers = asyncio.Event(), iter(range(1, 10))

            async def load() -> int:
                number = next(numbers)
                begun.set()
                if number == 1:
                    await asyncio.Event().wait()  # for ever
                return number

            first = asyncio.create_task(room.cache.get_or_set("k", load))
            await begun.wait()
            others = [asyncio.create_task(room.cache.get_or_set("k", load)) for _ in range(3)]
            while (
                room.stats.counts["fallbacks"] < 1 + 4
            ):  # all have found Redis away, and wait for the first
                await asyncio.sleep(0)
            first.cancel()
            return await asyncio.gather(*others)

    assert asyncio.run(play()) == [2, 2, 2]


# The herd


@pytest.mark.parametrize("face", FACES)
def test_a_hot_key_is_loaded_a_few_times(face: str, own_server: EmbeddedServer) -> None:
    """Twenty callers without a pause for three seconds load once a second, and a call takes microseconds."""
    began = time.monotonic()
    took, loads = sync_herd(own_server) if face == "sync" else asyncio.run(async_herd(own_server))
    took.sort()
    assert loads <= 5 + time.monotonic() - began
    assert len(took) > MANY
    assert took[len(took) // 2] < 0.01


def sync_herd(server: EmbeddedServer) -> tuple[list[float], int]:
    took: list[float] = []
    loads: list[float] = []

    def load() -> int:
        loads.append(time.monotonic())
        time.sleep(LOAD_S)
        return 1

    with Stillroom(Settings(redis_url=server.url), dispatch=NoDispatch()) as room:
        room.cache.get("k")
        server.freeze()
        ends = time.monotonic() + AWAY_S
        latest = ends + 10 * AWAY_S  # a busy machine needs longer for many calls

        def call() -> None:
            while (began := time.monotonic()) < (ends if len(took) > MANY else latest):
                room.cache.get_or_set("k", load)
                took.append(time.monotonic() - began)

        threads, _ = in_threads(*[call] * CALLERS)
        for thread in threads:
            thread.join(60)
        server.thaw()
    return took, len(loads)


async def async_herd(server: EmbeddedServer) -> tuple[list[float], int]:
    took: list[float] = []
    loads: list[float] = []

    async def load() -> int:
        loads.append(time.monotonic())
        await asyncio.sleep(LOAD_S)
        return 1

    async with AsyncStillroom(Settings(redis_url=server.url), dispatch=NoDispatch()) as room:
        await room.cache.get("k")
        server.freeze()
        ends = time.monotonic() + AWAY_S
        latest = ends + 10 * AWAY_S  # a busy machine needs longer for many calls

        async def call() -> None:
            while (began := time.monotonic()) < (ends if len(took) > MANY else latest):
                await room.cache.get_or_set("k", load)
                took.append(time.monotonic() - began)
                await asyncio.sleep(0)

        await asyncio.gather(*(call() for _ in range(CALLERS)))
        server.thaw()
    return took, len(loads)
