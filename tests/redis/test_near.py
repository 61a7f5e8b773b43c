"""Copies that a process keeps: one look at the clock proves all of them, and nothing that was changed is shown."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple

import pytest
from django.utils.functional import cached_property as django_cached_property
from pydantic import AfterValidator, BaseModel, ConfigDict

from stillroom import AsyncStillroom, InvalidArgument, Settings, Stillroom
from stillroom.cache import CacheProbe, near
from stillroom.cache.judge import MARKS_AT_ONCE, READS_A_MOVE
from stillroom.dispatch import InlineDispatch
from stillroom.health.report import CacheStats
from stillroom.leash import until
from tests.support.entries import age
from tests.support.faces import open_room
from tests.support.trips import Trips


class Sealed(BaseModel):
    model_config = ConfigDict(frozen=True)
    id: int


def price_of(room: Any, first: int = 1, **options: Any) -> Any:
    """Register a loader whose nth load brings n."""
    loads = iter(range(first, 1_000))

    @room.cache.cached("price:{id}", **{"ttl": 600, "tags": ["prices"], "near": True} | options)
    def price(id: int) -> list[int]:
        return [next(loads)]

    return price


def kept(price: Any, room: Any) -> list[int]:
    """Have this process keep a copy of price:7. → its value"""
    with room.request():
        price(7)
    with room.request():
        price(7)
        return price(7)  # type: ignore[no-any-return]


def test_one_look_at_the_clock_proves_all_that_is_kept(room: Any, trips: Trips) -> None:
    """Twenty values that were read before are one small round trip in the next request."""
    price = price_of(room)
    for _ in range(3):
        with room.request():
            values = [price(n) for n in range(20)]
    trips.taken()
    with room.request():
        assert [price(n) for n in range(20)] == values
    assert trips.taken() == 1
    assert values == [[n + 1] for n in range(20)]


def test_names_that_a_plain_read_left_unasked_are_asked_for_once(
    room: Any, make_room: Any, trips: Trips
) -> None:
    """A read without `near` learns of a change, but not of which key: the next proof asks, and the one after need
    not.
    """
    price, other = price_of(room), make_room()
    other.cache.set("plain", 1)
    assert kept(price, room) == [1]
    other.cache.invalidate("price:8")
    for _ in range(READS_A_MOVE + 2):  # so no question rides along any more
        room.cache.get("plain")
    for asked in (2, 1):
        trips.taken()
        with room.request():
            assert price(7) == [1]
        assert trips.taken() == asked


def test_outside_of_requests_each_read_asks_unless_seconds_are_given(
    room: Any, make_room: Any, trips: Trips
) -> None:
    """`near=True` is for requests; `near=30` serves what was proved in the last half minute."""
    always, seldom = price_of(room), price_of(make_room(), near=30)
    always(7), always(7)
    trips.taken()
    always(7), always(7)
    assert trips.taken() == 2
    seldom(7), seldom(7)
    room.cache.invalidate_by_tag("prices")
    before = seldom(7)
    assert seldom(7) == before


def refreshed(room: Any, price: Any, dispatch: Any) -> None:
    """Read until a stale value has asked for its refresh, and run that."""
    while not dispatch.orders:
        with room.request():
            price(7)
    assert dispatch.run_all(room) == ["refreshed"]


CHANGES_OF_KEYS: dict[str, Callable[[Any], Any]] = {
    "its key": lambda room: room.cache.invalidate("price:7"),
    "its key, deferred": lambda room: room.cache.invalidate("price:7", defer=True),
    "keys": lambda room: room.cache.invalidate_many(["price:7", "price:8"]),
    "a set": lambda room: room.cache.set("price:7", [1_000]),
    "a set of many": lambda room: room.cache.set_many({"price:7": [1_000]}),
    "a shorter life": lambda room: room.cache.touch("price:7", ttl=0.001, swr=60),
}
CHANGES: dict[str, Callable[[Any], Any]] = {
    **CHANGES_OF_KEYS,
    "its tag": lambda room: room.cache.invalidate_by_tag("prices"),
    "its tag, softly": lambda room: room.cache.invalidate_by_tag("prices", soft=True),
    "a pattern": lambda room: room.cache.invalidate_by_pattern("price:*"),
    "everything": lambda room: room.cache.clear(),
}
MISSED = {"its tag, softly", "a shorter life"}  # what is stale is served, and refreshed


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_request_shows_what_another_process_changed(
    room: Any, make_room: Any, change: str, dispatch: Any
) -> None:
    """However it was changed, a request that begins afterwards never shows the copy from before."""
    price = price_of(room, swr=60)
    other: Stillroom = make_room()
    assert kept(price, room) == [1]
    CHANGES[change](other)
    if change in MISSED:
        refreshed(room, price, dispatch)
    with room.request():
        assert price(7) != [1]


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_request_shows_what_this_process_changed(
    room: Any, change: str, dispatch: Any
) -> None:
    """Whoever invalidates or sets reads the new value at once."""
    price = price_of(room, swr=60)
    with room.request():
        price(7)
        assert price(7) == price(7) == [1]
        CHANGES[change](room)
        if change in MISSED:
            refreshed(room, price, dispatch)
        assert price(7) != [1]


@pytest.mark.parametrize("change", [*CHANGES_OF_KEYS, "a number"])
def test_a_key_that_this_process_changes_leaves_the_others_proven(
    room: Any, trips: Trips, change: str
) -> None:
    """Behind its own change of some keys a request reads all others where they are, without a round trip."""
    price = price_of(room)
    room.cache.set("price:7", 1)
    for _ in range(3):
        with room.request():
            values = [price(n) for n in range(5)]
    with room.request():
        price(1)
        CHANGES_OF_KEYS.get(change, lambda room: room.cache.incr("price:7"))(room)
        trips.taken()
        assert [price(n) for n in range(5)] == values
        assert trips.taken() == 0


@pytest.mark.parametrize("is_near", [True, None])
@pytest.mark.parametrize("change", ["its key", "keys", "its tag", "a pattern"])
def test_what_a_process_has_invalidated_costs_its_reads_no_second_look(
    room: Any, trips: Trips, is_near: bool | None, change: str
) -> None:
    """A look behind an invalidation takes one round trip in the process that made it."""
    price = price_of(room)

    @room.cache.cached("other:{id}", ttl=600, tags=["others"], near=is_near)
    def other(id: int) -> list[int]:
        return [id]

    kept(price, room)
    for _ in range(2 * READS_A_MOVE):
        with room.request():
            other(1)
    CHANGES[change](room)
    trips.taken()
    with room.request():
        assert other(1) == [1]
    assert trips.taken() == 1


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in MISSED])
def test_a_request_reads_the_same_value_twice(room: Any, make_room: Any, change: str) -> None:
    """A request is a snapshot: the next request sees what another process changes while this one runs."""
    price = price_of(room)
    other: Stillroom = make_room()
    kept(price, room)
    with room.request():
        assert price(7) == [1]
        CHANGES[change](other)
        assert price(7) == [1]
        price(8)  # which learns of the change
        assert price(7) == [1]
    with room.request():
        assert price(7) != [1]


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in MISSED])
def test_a_request_reads_again_what_it_has_loaded(room: Any, make_room: Any, change: str) -> None:
    """It is a snapshot also where the first read found nothing."""
    price = price_of(room)
    other: Stillroom = make_room()
    with room.request():
        assert price(7) == [1]
        CHANGES[change](other)
        assert price(7) == [1]
    with room.request():
        assert price(7) != [1]


def test_a_request_is_one_snapshot_by_key_and_by_loader(room: Any, make_room: Any) -> None:
    """A value that a request has read by its key answers the loader's call, and the other way round."""
    price = price_of(room)
    other: Stillroom = make_room()
    kept(price, room)
    with room.request():
        assert room.cache.get("price:7", near=True) == [1]
        other.cache.set("price:7", [5])
        price(8)  # which learns of the change
        assert price(7) == room.cache.get("price:7", near=True) == [1]


READS_BY_KEY: dict[str, Callable[[Any], Any]] = {
    "as anything": lambda cache: cache.get("frozen:7", near=True),
    "as a dict": lambda cache: cache.get("frozen:7", dict, near=True),
    "by get_or_set": lambda cache: cache.get_or_set("frozen:7", lambda: None, near=True),
}


@pytest.mark.parametrize("by_key", READS_BY_KEY)
def test_a_copy_that_was_read_by_its_key_has_the_loaders_type(room: Any, by_key: str) -> None:
    """A call never gets the form in which somebody else has read the value by its key."""

    @room.cache.cached("frozen:{id}", near=True)
    def frozen(id: int) -> Sealed:
        return Sealed(id=id)

    frozen(7)
    with room.request():
        assert READS_BY_KEY[by_key](room.cache) == {"id": 7}
    for _ in range(2):
        with room.request():
            assert [frozen(7) for _ in range(3)] == [Sealed(id=7)] * 3


def test_no_copy_outlives_the_marks_of_patterns(make_room: Any) -> None:
    """A pattern's mark may be dropped after `lease_limit`: who did not ask until then has no copy any more."""
    room: Stillroom = make_room(lease=1.0, refresh_lease=1.0, lease_limit=2.0)
    before = time.monotonic()
    kept(price_of(room), room)
    body = room.cache._body
    copy = body.copies.of_name(body.near, b"price:7")
    assert copy is not None
    assert copy.until <= time.monotonic() + 2.0
    assert copy.until > before


@pytest.mark.parametrize("others", [0, MARKS_AT_ONCE], ids=["alone", "among many marks"])
def test_no_copy_outlives_a_pattern_though_this_machine_slept(make_room: Any, others: int) -> None:
    """A machine sleeps until workers have dropped a pattern, and its clock with it: no copy it names is served."""
    times = {"lease": 0.1, "refresh_lease": 0.1, "lease_limit": 0.1}
    room, other = make_room(**times), make_room(**times)
    price = price_of(room, tags=())
    assert kept(price, room) == [1]
    body = room.cache._body
    body.copies.of_name(body.near, b"price:7").until += 600.0  # so much later it is for all others
    other.cache.invalidate_by_pattern("price:*")
    if others:
        other.cache.invalidate_by_tag(*map(str, range(others)))
    assert until(lambda: other.cache.reclaim()["patterns_dropped"] == 1, 5.0)
    with room.request():
        assert price(7) == [2]


def test_a_number_and_an_ordered_load_are_changes_too(room: Any, make_room: Any) -> None:
    """`incr`, `add` after an invalidation, and a load that an app ordered."""
    other: Stillroom = make_room()
    room.cache.set("visits:1", 1)

    def visits() -> Any:
        with room.request():
            room.cache.get("visits:1", near=True)
            return room.cache.get("visits:1", near=True)

    assert visits() == 1
    other.cache.incr("visits:1")
    assert visits() == 2
    other.cache.invalidate("visits:1")
    assert other.cache.add("visits:1", 7)
    assert visits() == 7

    price = price_of(room)
    price_of(other)
    kept(price, room)
    order = type("Order", (), {"loader": "price", "args": {"id": 7}})()
    other.upkeep.load(order)
    other.cache.get("price:7")
    with room.request():
        assert price(7) == other.cache.get("price:7")


def test_an_entry_that_redis_has_evicted_can_still_be_invalidated(
    room: Any, make_room: Any, client: Any
) -> None:
    """Nothing is there to delete, but somebody may keep a copy."""
    price = price_of(room)
    other: Stillroom = make_room()
    kept(price, room)
    client.unlink(room.keys.entry(b"price:7"))
    other.cache.invalidate("price:7")
    with room.request():
        assert price(7) == [2]


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "the registry": lambda client, keys: client.delete(keys.near),
    "the names": lambda client, keys: client.delete(keys.named),
    "the marks": lambda client, keys: client.delete(keys.marks),
    "the clock": lambda client, keys: client.delete(keys.clock),
    "everything": lambda client, keys: client.flushall(),
}


@pytest.mark.parametrize(
    "moment", ["before the change", "after the change", "both", "between two changes"]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_lost_in_redis_is_a_miss(
    room: Any, make_room: Any, client: Any, loss: str, moment: str
) -> None:
    """Redis may evict any of its keys: a change that nobody could be told of is not missed."""
    price = price_of(room)
    other: Stillroom = make_room()
    kept(price, room)
    if moment in ("before the change", "both"):
        LOSSES[loss](client, room.keys)
    other.cache.invalidate("price:7")
    if moment != "before the change":
        LOSSES[loss](client, room.keys)
    if moment == "between two changes":
        other.cache.invalidate("price:8")
    with room.request():
        assert price(7) == [2]


def test_a_registry_that_was_lost_and_made_again_shows(
    room: Any, make_room: Any, client: Any
) -> None:
    """Changes in between were told to nobody, so all copies from before are dropped."""
    price = price_of(room)
    other, third = make_room(), make_room()
    kept(price, room)
    client.delete(room.keys.near)
    other.cache.invalidate("price:7")
    assert kept(price_of(third, 500), third) == [500]  # it enters the prefix anew
    with room.request():
        assert price(7) == [500]


def test_more_names_than_redis_keeps(room: Any, make_room: Any) -> None:
    """A process that was told too little drops all its copies."""
    price = price_of(room)
    other: Stillroom = make_room()
    kept(price, room)
    other.cache.invalidate("price:7")
    other.cache.invalidate_many([f"price:{n}" for n in range(100, 12_000)])
    with room.request():
        assert price(7) == [2]


def test_names_are_bounded(make_room: Any, client: Any) -> None:
    """Redis keeps eleven thousand changed keys at most, for ten minutes."""
    room: Stillroom = make_room()
    kept(price_of(room), room)
    for start in range(0, 24_000, 4_000):
        room.cache.invalidate_many([f"price:{n}" for n in range(start, start + 4_000)])
        assert client.zcard(room.keys.named) <= 11_001
    assert 0 < client.pttl(room.keys.named) <= 600_000


def test_keys_that_nobody_keeps_cost_no_name(room: Any, make_room: Any, client: Any) -> None:
    """The clock stands still for them, as it did before."""
    other: Stillroom = make_room()
    kept(price_of(room), room)
    before = client.get(room.keys.clock)
    other.cache.set("page:7", 1)
    other.cache.invalidate("page:7")
    other.cache.invalidate("prices")
    assert client.get(room.keys.clock) == before
    assert not client.exists(room.keys.named)


def test_a_hundred_prefixes_are_as_many_as_every_key(room: Any, make_room: Any) -> None:
    """The registry is bounded, too."""
    for n in range(110):
        room.cache.set(f"kind{n}:1", n)
        room.cache.get(f"kind{n}:1", near=True)
    other: Stillroom = make_room()
    with room.request():
        assert room.cache.get("kind3:1", near=True) == 3
    other.cache.set("kind3:1", 4)
    with room.request():
        assert room.cache.get("kind3:1", near=True) == 4


REMEMBERED: dict[str, dict[str, Any]] = {
    "near": {"near": True},
    "memo": {"near": None, "memo": True},
}


@pytest.mark.parametrize("options", REMEMBERED.values(), ids=REMEMBERED)
def test_a_loader_is_not_served_what_was_read_before_it_was_called(
    make_room: Any, options: dict[str, Any]
) -> None:
    """A loader gets no value read before its call: its result is stored under a newer clock, and taken for new."""
    room, other = make_room(), make_room()
    price = price_of(room, **options)

    @room.cache.cached("page:{id}", ttl=600, tags=["pages"])
    def page(id: int) -> list[int]:
        return price(id)  # type: ignore[no-any-return]

    with room.request():
        assert price(7) == price(7) == [1]
        other.cache.invalidate_by_tag("prices", "pages")
        assert page(7) == [2]
    assert page(7) == [2]


@pytest.mark.parametrize("is_gathered", [False, True])
def test_a_task_that_outlives_its_load_sees_what_others_change(
    settings: Any, make_room: Any, monkeypatch: pytest.MonkeyPatch, is_gathered: bool
) -> None:
    """A task that a loader begins and leaves behind has copies proved again, as a request that takes long."""
    other: Stillroom = make_room()
    monkeypatch.setattr(near, "REQUEST_S", -1.0)  # five seconds have gone by

    async def main() -> None:
        loads, is_changed = iter(range(1, 100)), asyncio.Event()
        left: list[asyncio.Task[int]] = []
        async with AsyncStillroom(settings) as room:

            @room.cache.cached("price", ttl=600, near=True)
            async def price() -> int:
                return next(loads)

            async def later() -> int:
                await is_changed.wait()
                return (await room.cache.gather(price))[0] if is_gathered else await price()

            async def page() -> int:
                left.append(asyncio.create_task(later()))
                return await price()

            assert await price() == await room.cache.get_or_set("page", page) == 1
            other.cache.invalidate("price")
            is_changed.set()
            assert await left[0] == 2

    asyncio.run(main())


@pytest.mark.parametrize("change", ["its key", "a set", "its tag"])
@pytest.mark.parametrize("options", REMEMBERED.values(), ids=REMEMBERED)
def test_a_load_leaves_the_request_what_it_has_read(
    make_room: Any, options: dict[str, Any], change: str
) -> None:
    """A load in a request reads what is new, and the request reads again what it has read before the load."""
    room, other = make_room(), make_room()
    price = price_of(room, **options)

    @room.cache.cached("page:{id}", ttl=600)
    def page(id: int) -> list[int]:
        return price(id)  # type: ignore[no-any-return]

    kept(price, room)
    with room.request():
        assert price(7) == [1]
        CHANGES[change](other)
        assert page(7) != [1]
        assert price(7) == [1]
    with room.request():
        assert price(7) == page(7)


@pytest.mark.parametrize("options", REMEMBERED.values(), ids=REMEMBERED)
def test_nor_is_a_loader_that_is_awaited(
    settings: Any, make_room: Any, options: dict[str, Any]
) -> None:
    """A loader that is awaited gets no value read before its call, either."""
    other: Stillroom = make_room()

    async def main() -> None:
        loads = iter(range(1, 100))
        async with AsyncStillroom(settings) as room:

            @room.cache.cached("price:{id}", ttl=600, tags=["prices"], **options)
            async def price(id: int) -> list[int]:
                return [next(loads)]

            @room.cache.cached("page:{id}", ttl=600, tags=["pages"])
            async def page(id: int) -> list[int]:
                return await price(id)

            with room.request():
                await price(7)
            with room.request():
                assert await price(7) == await price(7) == [1]
                await asyncio.to_thread(other.cache.invalidate_by_tag, "prices", "pages")
                assert await page(7) == [2]
            assert await page(7) == [2]

    asyncio.run(main())


def test_a_stale_copy_is_no_answer(room: Any, client: Any, dispatch: Any, trips: Trips) -> None:
    """Past its time a value is read from Redis, which asks for the refresh."""
    price = price_of(room, ttl=60, swr=600)
    price(7)
    age(client, room.keys.entry(b"price:7"), 59.9)
    kept(price, room)
    age(client, room.keys.entry(b"price:7"), 1)
    refreshed(room, price, dispatch)
    with room.request():
        assert price(7) == [2]


STALE_READS: dict[str, Callable[[Any, Any], Any]] = {
    "its loader": lambda room, price: price(7),
    "a get": lambda room, price: room.cache.get("price:7", near=True),
    "a get_or_set": lambda room, price: room.cache.get_or_set(
        "price:7", lambda: [1_000], ttl=600, swr=60, near=True
    ),
}


@pytest.mark.parametrize("second", STALE_READS)
@pytest.mark.parametrize("first", STALE_READS)
def test_a_request_shows_a_stale_value_to_its_end(
    room: Any, client: Any, first: str, second: str
) -> None:
    """A request that has read a stale value reads it again, also where it refreshes it itself; the next one reads
    the new value.
    """
    price = price_of(room, swr=60)
    assert price(7) == [1]
    age(client, room.keys.entry(b"price:7"), 601)
    with room.request():
        for way in (first, second, first, second):
            assert STALE_READS[way](room, price) == [1]
    if first == "a get_or_set":  # no worker can run it: its reader refreshes
        with room.request():
            assert price(7) == [1_000]


@pytest.mark.parametrize("way", ["its loader", "a get"])
def test_a_request_shows_the_stale_value_that_it_refreshes_inline(
    settings: Settings, client: Any, way: str
) -> None:
    """Without workers a request refreshes what it finds stale, and shows the stale value to its end."""
    with Stillroom(settings, dispatch=InlineDispatch()) as room:
        price = price_of(room, swr=60)
        assert price(7) == [1]
        age(client, room.keys.entry(b"price:7"), 601)
        with room.request():
            assert [STALE_READS[way](room, price) for _ in range(3)] == [[1]] * 3
        with room.request():
            assert price(7) == [2]


class Point(NamedTuple):
    x: int
    y: int


@dataclass(frozen=True)
class Money:
    amount: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Basket:
    items: list[int]


@dataclass(frozen=True)
class Noted:
    name: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", [])


class Renamed(Money):
    """Is no frozen dataclass itself, so an instance takes new attributes."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: str


@dataclass(frozen=True)
class OfDjango:
    name: str

    @django_cached_property
    def letters(self) -> list[str]:
        return list(self.name)


class Lettered(Frozen):
    @cached_property
    def letters(self) -> list[str]:
        return list(self.name)


class Noting(Frozen):
    _note: str


class Extended(Frozen):
    model_config = ConfigDict(extra="allow")


class Open(BaseModel):
    name: str


SHARED = {
    "a text": "a text that is long enough to be no constant " * 3,
    "a tuple": (1.5, "b"),
    "a named tuple": Point(1, 2),
    "a frozen dataclass": Money(1, ("a", "b")),
    "a frozen model": Frozen(name="x"),
}
OWN = {
    "a list": [1],
    "a dict": {"a": 1},
    "a tuple with a list": ("a", [1]),
    "a list that is compressed": [*range(3_000)],
    "a dict whose bytes are in base64": {"a": b"\xff"},
    "a frozen dataclass with a list": Basket([1]),
    "a frozen dataclass with an attribute of its own": Noted("x"),
    "a subclass of a frozen dataclass": Renamed(1, ()),
    "a frozen model with a cached property": Lettered(name="x"),
    "a frozen model with a private attribute that is not set yet": Noting(name="x"),
    "a frozen model that takes other fields": Extended(name="x"),
    "a frozen dataclass with Django's cached property": OfDjango("x"),
    "a model": Open(name="x"),
}


def values_of(room: Any, value: Any, type: Any) -> list[Any]:
    @room.cache.cached("value:{id}", ttl=60, near=True, type=type)
    def load(id: int) -> Any:
        return value

    for _ in range(3):
        with room.request():
            load(1)
    with room.request():
        return [load(1), load(1)]


@pytest.mark.parametrize("name", SHARED)
def test_what_nobody_can_change_is_one_object(room: Any, name: str) -> None:
    """It is decoded once, not for each caller."""
    kinds = {"a tuple": tuple[float, str]}
    value = SHARED[name]
    first, second = values_of(room, value, kinds.get(name, type(value)))
    assert first == second == value
    assert first is second


@pytest.mark.parametrize("name", OWN)
def test_what_can_be_changed_is_each_callers_own(room: Any, name: str) -> None:
    """A list that somebody appends to is nobody else's."""
    kinds: dict[str, Any] = {
        "a tuple with a list": tuple[str, list[int]],
        "a dict whose bytes are in base64": dict[str, bytes],
    }
    value = OWN[name]
    first, second = values_of(room, value, kinds.get(name, type(value)))
    assert first == second == value
    assert first is not second


def test_a_copy_that_its_validator_comes_to_refuse_is_no_value(room: Any) -> None:
    """It is counted as unreadable, as an entry of Redis is, and loaded again."""
    refused: set[int] = set()

    def accepted(found: list[int]) -> list[int]:
        if refused.intersection(found):
            raise ValueError(found)
        return found

    @room.cache.cached(
        "of:{id}", ttl=60, near=True, type=Annotated[list[int], AfterValidator(accepted)]
    )
    def of(id: int) -> list[int]:
        return [len(refused)]

    assert kept(of, room) == [0]
    refused.add(0)
    before = room.stats.counts["decode_errors"]
    with room.request():
        assert of(7) == [1]
    assert room.stats.counts["decode_errors"] > before


def test_arguments_that_are_equal_but_other_keys_are_other_values(room: Any) -> None:
    """1, 1.0 and True are one key of a dict, and three keys of the cache."""

    @room.cache.cached("of:{x}", ttl=60, near=True)
    def of(x: Any) -> str:
        return repr(x)

    for _ in range(3):
        with room.request():
            assert [of(1), of(True), of("1x"), of(2)] == ["1", "True", "'1x'", "2"]


def test_a_scan_leaves_what_is_read_often(make_room: Any) -> None:
    """The store is bounded in bytes, and what was used is not the first to go."""
    room: Stillroom = make_room(near_limit=100_000)
    body = "x" * 1_000

    @room.cache.cached("text:{id}", ttl=600, near=True)
    def text(id: int) -> str:
        return body

    def read(ids: Any) -> None:
        for n in ids:
            with room.request():
                text(n)

    often = range(5)
    read([*often] * 3)
    for start in range(100, 500, 5):
        read([*range(start, start + 5), *often])
        read(range(start, start + 5))
    store = room.cache._body.copies
    assert store.bytes <= 100_000
    with room.request():
        text(0)
        before = room.stats.counts["near_hits"]
        for n in often:
            text(n)
        assert room.stats.counts["near_hits"] - before == 5
    assert room.stats.counts["near_evictions"] > 100


def test_a_value_that_would_fill_the_store_is_not_kept(make_room: Any) -> None:
    """One large value does not push out everything else."""
    room: Stillroom = make_room(near_limit=100_000)
    room.cache.set("large:1", "x" * 50_000)
    for _ in range(3):
        with room.request():
            assert len(room.cache.get("large:1", near=True)) == 50_000
    assert len(room.cache._body.copies) == 0


@pytest.mark.parametrize("length", [10_000, 40_000])
def test_a_compressed_value_counts_as_large_as_it_is(make_room: Any, length: int) -> None:
    """The store's bound holds for values that are kept as they are read, however small Redis has them."""
    room: Stillroom = make_room(near_limit=100_000, compress_above=1_000)

    @room.cache.cached("text:{id}", ttl=600, near=True)
    def text(id: int) -> str:
        return f"{id}".ljust(length)

    for n in [*range(20)] * 4:
        with room.request():
            assert text(n) == f"{n}".ljust(length)
    store = room.cache._body.copies
    assert store.bytes <= 100_000
    values = [copy.value for copy in store._copies.values()]
    assert sum(len(value) for value in values if isinstance(value, str)) <= 100_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_keeps_nothing(make_room: Any) -> None:
    """A forked child drops its parent's copies, which its own look at the clock does not prove."""
    room: Stillroom = make_room()
    kept(price_of(room), room)
    store = room.cache._body.copies
    assert len(store)
    child = os.fork()
    if not child:
        os._exit(0 if len(store) == 0 and store.bytes == 0 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert len(store)


@pytest.mark.parametrize("given", ["5", -1, 61, float("nan")])
def test_a_strange_near_is_refused_where_it_is_written(room: Any, given: Any) -> None:
    """It is True, False, or seconds up to a minute."""
    with pytest.raises(InvalidArgument, match=r"near=.*; True serves requests only"):
        price_of(room, near=given)
    with pytest.raises(InvalidArgument, match="near="):
        room.cache.get("a", near=given)


def test_another_epoch_drops_what_is_kept(room: Any, make_room: Any) -> None:
    """Copies from before a clear take no memory."""
    price = price_of(room)
    kept(price, room)
    make_room().cache.clear()
    body = getattr(room, "inner", room).cache._body
    with room.request():
        price(8)
    assert len(body.copies) == 0


def test_two_shards_prove_for_themselves(make_room: Any) -> None:
    """Each shard has a clock of its own."""
    room: Stillroom = make_room(shards=2)
    other: Stillroom = make_room(shards=2)
    price = price_of(room)
    for n in range(10):
        kept_value = [price(n) for _ in range(2)]
        assert kept_value[0] == kept_value[1]
    with room.request():
        before = [price(n) for n in range(10)]
    other.cache.invalidate("price:3")
    with room.request():
        after = [price(n) for n in range(10)]
    assert [n for n in range(10) if before[n] != after[n]] == [3]
    other.cache.invalidate_by_tag("prices")
    with room.request():
        assert not any(price(n) in after for n in range(10))


def test_kept_values_may_be_served_while_redis_is_away(own_server: Any) -> None:
    """The app says for how long. What this process has changed, or keeps no copy of, is loaded."""
    for seconds, served in ((0.0, [2]), (60.0, [1])):
        settings = Settings(
            redis_url=own_server.url,
            near_away=seconds,
            away_ttl=0,
            command_timeout=2.0,
            namespace=f"n{seconds:.0f}",
        )
        with open_room("sync", settings, None) as room:
            price = price_of(room)
            room.cache.set("set", 5)
            with room.request():
                assert room.cache.get("set", int, near=True) == 5
            assert kept(price, room) == [1]
            own_server.freeze()
            room.stats.due = float("inf")
            try:
                with room.request():
                    assert [price(7), price(8)] == [served, [served[0] + 1]]
                    assert room.cache.get("set", int, near=True) == (5 if seconds else None)
                    assert room.cache.get("set", int) is None
                near = room.cache._body.near
                near._proof = near._proof._replace(asked=near._proof.asked - 61.0)
                with room.request():
                    assert price(7) != [1]
                near._proof = near._proof._replace(asked=time.monotonic())
                with room.request():
                    assert (price(7) == [1]) is bool(seconds)
                room.cache.invalidate("price:7", defer=True)
                with room.request():
                    assert price(7) != [1]
            finally:
                own_server.thaw()


def test_a_server_that_takes_no_writes_is_read_each_time(own_server: Any) -> None:
    """Where no copy can be registered, as on a replica, none is kept, and values are read as without `near`."""
    with (
        open_room("sync", Settings(redis_url=own_server.url), None) as room,
        open_room("sync", Settings(redis_url=own_server.url), None) as other,
    ):
        price = price_of(room)
        assert price(7) == price_of(other)(7) == [1]
        other.wire.execute([(b"CONFIG", b"SET", b"min-replicas-to-write", b"1")], 1.0)
        assert kept(price, room) == [1]
        assert len(room.cache._body.copies) == 0
        other.wire.execute([(b"CONFIG", b"SET", b"min-replicas-to-write", b"0")], 1.0)
        assert kept(price, room) == [1]
        assert len(room.cache._body.copies) == 1


def test_the_promise_of_others_is_not_changed(room: Any, trips: Trips) -> None:
    """A loader without `near` asks each time, also where others of the same room have copies."""
    price = price_of(room)

    @room.cache.cached("plain:{id}", ttl=600, tags=["prices"])
    def plain(id: int) -> int:
        return id

    kept(price, room)
    plain(7), plain(7)
    trips.taken()
    with room.request():
        plain(7), plain(7)
    assert trips.taken() == 2


def test_more_kinds_of_keys_than_are_told_apart_are_one(
    room: Any, make_room: Any, client: Any
) -> None:
    """Of more than a hundred prefixes the registry has none but the empty one, and every change is told."""
    other: Stillroom = make_room()
    keys = [f"kind-{n}:1" for n in range(near.PREFIXES + 1)]

    def values() -> list[int]:
        with room.request():
            return [room.cache.get(key, near=True) for key in keys]

    other.cache.set_many(dict.fromkeys(keys, 1))
    assert values() == values() == [1] * len(keys)
    assert client.get(room.keys.near).partition(b"\n")[1:] == (b"\n", b"")
    assert len(getattr(room, "inner", room)._cache_body.copies) == len(keys)
    other.cache.set(keys[7], 2)
    assert values() == [1] * 7 + [2] + [1] * (len(keys) - 8)


@pytest.mark.parametrize("key", ["\x01report", "%41", "%:1"])
def test_a_key_that_begins_with_an_escape_is_not_every_key(
    room: Any, make_room: Any, client: Any, key: str
) -> None:
    """A key that begins with a percent sign or a control character has others kept near that do, and no more."""
    other: Stillroom = make_room()
    other.cache.set(key, 1)
    for expected in (1, 2):
        with room.request():
            assert room.cache.get(key, near=True) == expected
        other.cache.set(key, expected + 1)
    assert client.get(room.keys.near).partition(b"\n")[2] == b"%"
    clock = client.get(room.keys.clock)
    other.cache.set("another", 1)
    assert client.get(room.keys.clock) == clock


@pytest.mark.parametrize("of_many", [False, True])
def test_what_a_process_enters_is_bounded(
    room: Any, make_room: Any, client: Any, monkeypatch: pytest.MonkeyPatch, of_many: bool
) -> None:
    """However many keys without a colon are read, each a prefix of its own, Redis is told of a hundred at most."""
    entered: list[int] = []
    joins = near.near_join

    def joining(keys: Any, *given: Any) -> Any:
        entered.append(len(given) - 3)
        return joins(keys, *given)

    monkeypatch.setattr(near, "near_join", joining)
    other: Stillroom = make_room()
    keys = [f"{n:03}" if of_many else f"user{n}" for n in range(500)]
    other.cache.set_many(dict.fromkeys(keys, 1))
    for expected in (1, 2):
        with room.request():
            assert [room.cache.get(key, near=True) for key in keys] == [expected] * len(keys)
        other.cache.set_many(dict.fromkeys(keys, expected + 1))
    assert max(entered) <= near.PREFIXES
    assert len(entered) <= (near.PREFIXES + 2 if of_many else 12)
    assert len(client.get(room.keys.near).split(b"\n")) == (2 if of_many else 11)


def test_health_tells_what_is_kept(make_room: Any) -> None:
    """Hits, those near among them, proofs, evictions, and the bytes that this process keeps."""
    room: Stillroom = make_room(near_limit=20_000)
    price = price_of(room)
    for _ in range(3):
        with room.request():
            price(7), price(7)
    for n in range(100, 200):
        for _ in range(2):
            with room.request():
                price(n)
    store, counts = room.cache._body.copies, room.stats.counts
    assert 0 < counts["near_hits"] < counts["hits"]
    assert counts["near_proofs"] > 0
    fields = CacheProbe(room.keys, room.stats).count(counts)
    assert CacheStats(**fields).near_bytes == store.bytes > 0
    assert fields["near_evictions"] == counts["near_evictions"] > 0
    report = room.health.check()
    assert report.cache is not None
    assert report.cache.near_bytes == store.bytes


def test_near_module_says_how_long_a_copy_may_be_kept() -> None:
    """Redis remembers a changed key for longer than any process keeps a copy of it."""
    text = near.__loader__.get_data(  # type: ignore[union-attr]
        os.path.join(os.path.dirname(near.__file__), "..", "lua", "lib", "near.lua")
    ).decode()
    assert "NAMES_MS = 600000" in text
    assert near.COPY_S * 2 < 600


def read(room: Any) -> Any:
    return room.cache.get("k")


def read_near(room: Any) -> Any:
    with room.request():
        return room.cache.get("k", near=True)


@pytest.mark.parametrize("by", [read, read_near])
def test_marks_ride_along_only_where_invalidations_are_frequent(
    room: Any, make_room: Any, trips: Trips, monkeypatch: Any, by: Callable[[Any], Any]
) -> None:
    """After an invalidation the first of many reads asks for marks; where there are few reads, each brings them."""
    other = make_room()
    other.cache.set("k", 1, tags=["t"])
    asked: list[int] = []
    judge = getattr(room, "inner", room)._cache_body._judges
    marks_since = judge.marks_since
    monkeypatch.setattr(judge, "marks_since", lambda n: asked.append(n) or marks_since(n))

    def cost(reads: int) -> tuple[int, int]:
        """Return the round trips, and the questions for marks, of so many reads after an invalidation."""
        other.cache.invalidate_by_tag(f"x{next(numbers)}")
        asked.clear()
        trips.taken()
        assert [by(room) for _ in range(reads)] == [1] * reads
        return trips.taken() - reads, len(asked)

    numbers = itertools.count()
    for _ in range(20):
        by(room)
    assert [cost(READS_A_MOVE + 1) for _ in range(5)] == [(1, 1)] * 5
    assert [cost(1) for _ in range(5)] == [(1, 1), (1, 1), (0, 1), (0, 1), (0, 1)]
    assert cost(20) == (0, 1 + READS_A_MOVE)
    assert cost(20) == (1, 1)
    assert [cost(1) for _ in range(3)] == [(1, 1), (1, 1), (0, 1)]
    getattr(room, "inner", room).stats.due = 0.0  # and counts ride along behind them
    assert cost(1) == (0, 1)


@pytest.mark.parametrize("junk", [b"", b"junk", b"\xff\x00.", b"1.2.3", b"9" * 30])
def test_a_clock_that_another_program_wrote_costs_no_read(
    room: Any, client: Any, junk: bytes
) -> None:
    """Where what stands in the clock's place is no clock, values are loaded, and none that was kept is served."""
    price = price_of(room)
    assert kept(price, room) == [1]
    client.set(room.keys.clock, junk)
    for number in (7, 8):
        with room.request():
            assert price(number) > [1]
    assert room.cache.get("known", near=60) is None
    room.cache.set("price:7", [1_000])
    with room.request():
        assert price(7) == [1_000]
