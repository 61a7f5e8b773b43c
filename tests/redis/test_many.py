"""Many calls of a loader are looked up in one round trip, and each is answered as if it had been made by itself."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from stillroom import AsyncStillroom, InvalidArgument, NoDispatch, Settings, Stillroom
from stillroom.cache import calls, gathering
from stillroom.cache.figures import LOOKUPS
from tests.support.entries import age
from tests.support.threads import at_once
from tests.support.trips import Trips

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "memo": {"memo": True},
    "near": {"near": True},
    "near for seconds": {"near": 30},
}


def price_of(room: Any, **options: Any) -> tuple[Any, Counter[Any]]:
    """Register a loader of lists. → it, and how often it was called, by its arguments."""
    loads: Counter[Any] = Counter()

    @room.cache.cached("price:{id}:{unit}", **{"ttl": 600, "tags": ["prices"]} | options)
    def price(id: int, unit: str = "EUR") -> list[Any]:
        loads[id, unit] += 1
        return [id, unit, loads[id, unit]]

    return price, loads


@pytest.mark.parametrize("near", [True, 30])
def test_one_look_at_the_clock_proves_all_copies(room: Any, client: Any, near: Any) -> None:
    """In a request that has read nothing yet, one command proves what the process keeps of a hundred calls."""
    price, _ = price_of(room, near=near)

    def reads() -> int:
        count: int = client.info("commandstats")["cmdstat_mget"]["calls"]
        return count

    for _ in range(2):
        with room.request():
            price.many(range(100))
    before = reads()
    with room.request():
        assert price.many(range(100)) == [[n, "EUR", 1] for n in range(100)]
        assert reads() == before + 1
    price.many(range(100, 110))  # loaded, and not yet kept
    before = reads()
    with room.request():
        assert price.many(range(110)) == [[n, "EUR", 1] for n in range(110)]
        assert reads() == before + 1 + 10


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_many_calls_are_one_round_trip(room: Any, trips: Trips, options: Any) -> None:
    """What is there takes one round trip, also where this process keeps it and proves that; the order is kept."""
    price, loads = price_of(room, **options)
    expected = [[n, "EUR", 1] for n in (3, 1, 2, 1)]
    for _ in range(2):
        with room.request():
            assert price.many([3, 1, 2, 1]) == expected
    trips.taken()
    with room.request():
        assert price.many(n for n in (3, 1, 2, 1)) == expected
        assert trips.taken() == 1
    assert set(loads.values()) == {1}
    assert price.many([]) == []
    assert trips.taken() == 0


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_each_is_what_a_call_by_itself_returns(room: Any, client: Any, options: Any) -> None:
    """Each fresh, stale, missing, unreadable or forgotten value is what its call by itself returns."""
    price, loads = price_of(room, **options, swr=600)
    price.many(range(5))
    age(client, room.keys.entry(b"price:1:EUR"), 700)
    client.delete(room.keys.entry(b"price:2:EUR"))
    client.set(room.keys.entry(b"price:3:EUR"), "no entry")
    room.cache.invalidate("price:4:EUR")
    assert price.many(range(5)) == [[n, "EUR", 1 + (n in (2, 3, 4))] for n in range(5)]
    assert price.many([1, 2], "USD") == [price(1, "USD"), price(2, "USD")]
    assert (
        price.many([1, 2], unit="USD")
        == price.many([1, 2], "USD")
        == [[1, "USD", 1], [2, "USD", 1]]
    )
    assert loads[0, "EUR"] == 1


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_list_that_a_caller_changes_is_its_own(room: Any, options: Any) -> None:
    """A key that is asked for twice gives two lists, and a change of one is in no other."""
    price, _ = price_of(room, **options)
    price.many([1])
    with room.request():
        first, second = price.many([1, 1])
        first.append("changed")
        assert second == price(1) == price.many([1])[0] == [1, "EUR", 1]


def test_stale_values_are_served_and_refreshed_by_one_task(
    room: Any, client: Any, dispatch: Any
) -> None:
    """One message orders all stale values from a worker, each of them once."""
    price, loads = price_of(room, swr=600)
    price.many(range(4))
    for n in range(3):
        age(client, room.keys.entry(b"price:%d:EUR" % n), 700)
    assert price.many([0, 1, 2, 3, 0]) == [[n, "EUR", 1] for n in (0, 1, 2, 3, 0)]
    assert price.many([0, 1]) == [[0, "EUR", 1], [1, "EUR", 1]]
    assert (len(dispatch.orders), dispatch.messages) == (3, 1)
    assert dispatch.run_all(room) == ["refreshed"] * 3
    assert price.many(range(4)) == [[n, "EUR", 2 - n // 3] for n in range(4)]
    assert sum(loads.values()) == 7


def test_without_workers_the_caller_refreshes(settings: Settings, client: Any) -> None:
    """A room without workers refreshes a stale value in the reader, as by a call."""
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        price, loads = price_of(room, swr=600)
        price.many([0, 1])
        age(client, room.keys.entry(b"price:1:EUR"), 700)
        assert price.many([0, 1]) == [price(0), price(1)]
        assert loads[0, "EUR"] == 1


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_lookups_are_counted_as_those_of_calls(room: Any, client: Any, options: Any) -> None:
    """A hit is one hit, a stale one is one of these, and a miss one miss, however it was asked for."""
    price, _ = price_of(room, **options, swr=600)
    price.many(range(4))
    age(client, room.keys.entry(b"price:1:EUR"), 700)
    client.delete(room.keys.entry(b"price:2:EUR"))
    counts = room.stats.counts
    counts.clear()
    with room.request():
        price.many(range(4))
    assert (counts["hits"], counts["stale"], counts["misses"]) == (2, 1, 1)
    assert [counts[f"loader:{what}:price"] for what in LOOKUPS] == [2, 1, 1]


def test_in_a_request_a_key_is_the_same_value_in_all_of_them(room: Any, make_room: Any) -> None:
    """A kept copy, a call and many calls show one snapshot, also when another process changes the key meanwhile."""
    price, _ = price_of(room, near=True)
    price.many([1, 2])
    with room.request():
        before = price(1)
        make_room().cache.invalidate("price:1:EUR", "price:2:EUR")
        assert price.many([1])[0] == before
    with room.request():
        assert price.many([1, 2]) == [[1, "EUR", 2], [2, "EUR", 2]]


def test_more_near_calls_than_fit_into_one_batch(
    room: Any, trips: Trips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that have a clock each go in bites."""
    monkeypatch.setattr(calls, "LOOKS_AT_ONCE", 3)
    price, _ = price_of(room, memo=True)
    for _ in range(2):
        price.many(range(7))
    trips.taken()
    assert price.many(range(7)) == [[n, "EUR", 1] for n in range(7)]
    assert trips.taken() == 3


def test_two_releases_have_a_value_each(settings: Settings, dispatch: Any) -> None:
    """Where another release's value is in a key's first place, the other place is read too."""
    with (
        Stillroom(settings, dispatch=dispatch) as old,
        Stillroom(settings, dispatch=dispatch) as new,
    ):
        (before, _), (after, loads) = price_of(old, version=1), price_of(new, version=2)
        before.many([1, 2])
        assert after.many([1, 2]) == after.many([2, 1])[::-1]
        assert before.many([1, 2]) == [[1, "EUR", 1], [2, "EUR", 1]]
        assert set(loads.values()) == {1}


def refusals(price: Any) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    """Return calls that are refused, each with its error and what that says."""
    return {
        "a text": (
            lambda: price.many("abc"),
            InvalidArgument,
            r"price\.many\('abc'\): give a list",
        ),
        "a number": (lambda: price.many(7), InvalidArgument, r"for one call write price\(7\)"),
        "too many": (lambda: price.many([1], "EUR", 3), TypeError, r"price\(\): too many"),
        "a misspelt name": (lambda: price.many([1], unti="EUR"), TypeError, "unti"),
        "a misspelt name without calls": (lambda: price.many([], unti="EUR"), TypeError, "unti"),
        "what is no key": (lambda: price.many([1, object()]), InvalidArgument, "price"),
    }


@pytest.mark.parametrize("what", refusals(None))
def test_bad_arguments_are_refused_before_anything_is_read(
    room: Any, trips: Trips, what: str
) -> None:
    """What can't be meant raises the error of a call, which says what to write."""
    price, loads = price_of(room)
    call, kind, sentence = refusals(price)[what]
    trips.taken()
    with pytest.raises(kind, match=sentence):
        call()
    assert trips.taken() == 0
    assert not loads


def test_an_error_of_a_loader_reaches_the_caller(room: Any) -> None:
    """What was there before and what was loaded stays in the cache; nobody waits for the load that failed."""
    loads: Counter[int] = Counter()

    @room.cache.cached("half:{id}", ttl=60)
    def half(id: int) -> int:
        loads[id] += 1
        if id == 2 and loads[id] == 1:
            raise ZeroDivisionError(id)
        return id

    half(1)
    with pytest.raises(ZeroDivisionError) as caught:
        half.many([1, 2])
    assert not any("stillroom/cache" in str(frame.path) for frame in caught.traceback)
    assert half.many([1, 2, 3]) == [1, 2, 3]
    assert loads == {1: 1, 2: 2, 3: 1}


def test_in_a_thread_an_error_leaves_the_rest_unloaded(make_room: Any) -> None:
    """The missing values are loaded one after the other, in the order of the arguments."""
    loads: list[int] = []

    @make_room().cache.cached("half:{id}", ttl=60)
    def half(id: int) -> int:
        loads.append(id)
        if id == 2:
            raise ZeroDivisionError(id)
        return id

    with pytest.raises(ZeroDivisionError):
        half.many([3, 2, 1])
    assert loads == [3, 2]


def test_a_load_of_another_caller_is_waited_for(make_room: Any) -> None:
    """Two callers that want the same missing values load each of them once."""
    loads = Counter[int]()

    def reads(room: Any) -> Any:
        @room.cache.cached("slow:{id}", ttl=60)
        def slow(id: int) -> int:
            loads[id] += 1
            return id

        return slow

    readers = [reads(make_room()), reads(make_room())]
    found = at_once(2, lambda n: readers[n].many(range(20)))
    assert found == [list(range(20))] * 2
    assert set(loads.values()) == {1}


class Loads:
    """Loads ids, of which 3 has none, and knows how many were loaded at the same time at most."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.ended: list[int] = []

    async def load(self, id: int) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(20):
            await asyncio.sleep(0)
        self.running -= 1
        if id == 3:
            raise ZeroDivisionError(id)
        self.ended.append(id)
        return id


@pytest.mark.parametrize(("at_once", "most"), [(None, gathering.LOADS_AT_ONCE), (2, 2)])
def test_in_asyncio_missing_values_are_loaded_beside_each_other(
    settings: Settings, dispatch: Any, at_once: int | None, most: int
) -> None:
    """In asyncio ten are loaded at a time, or as many as the loader may; an error is raised once all have ended."""
    loads = Loads()

    async def main() -> None:
        async with AsyncStillroom(settings, dispatch=dispatch) as room:

            @room.cache.cached("wide:{id}", ttl=60, at_once=at_once)
            async def wide(id: int) -> int:
                return await loads.load(id)

            assert await wide.many(range(100, 130)) == list(range(100, 130))
            with pytest.raises(ZeroDivisionError):
                await wide.many([3, 4, 5])

    asyncio.run(main())
    assert 1 < loads.most <= most
    assert {4, 5} <= {*loads.ended}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_redis_away_each_is_loaded(settings: Settings, own_server: Any, options: Any) -> None:
    """While Redis is away values are loaded as by calls, and are in the cache no more than these are."""
    changed = settings.model_copy(update={"redis_url": own_server.url})
    with Stillroom(changed, dispatch=NoDispatch()) as room:
        price, loads = price_of(room, **options)
        price.many([1, 2])
        own_server.kill()
        assert price.many([1, 2, 3]) == [[1, "EUR", 2], [2, "EUR", 2], [3, "EUR", 1]]
        assert sum(loads.values()) == 5


def test_a_method_has_it_too(make_room: Any) -> None:
    """Many calls of a bound method differ in the first argument behind the object."""
    room = make_room()

    class Shelf:
        @room.cache.cached("shelf:{id}", ttl=60, ignore=["self"])
        def book(self, id: int) -> str:
            return f"book {id}"

    assert Shelf().book.many([1, 2]) == ["book 1", "book 2"]
