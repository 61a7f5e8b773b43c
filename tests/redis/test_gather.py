"""Calls of several loaders are looked up in one round trip, and each is answered as if it had been made alone."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from stillroom import AsyncStillroom, InvalidArgument, NoDispatch, Settings, Stillroom
from stillroom.cache import calls
from stillroom.cache.cached import asked_of
from stillroom.cache.judge import READS_A_MOVE
from tests.redis.test_many import KINDS
from tests.support.entries import age
from tests.support.stepper import Stepper
from tests.support.trips import Trips

PAIRS = list(itertools.combinations_with_replacement(KINDS, 2))


class Shop:
    """Two loaders, each kept in its way, and what they have loaded."""

    def __init__(self, room: Any, of_price: Any = None, of_rates: Any = None) -> None:
        self.loads: Counter[Any] = Counter()

        @room.cache.cached("price:{id}:{unit}", **{"ttl": 600, "swr": 600} | (of_price or {}))
        def price(id: int, unit: str = "EUR") -> list[Any]:
            self.loads[id] += 1
            return [id, unit, self.loads[id]]

        @room.cache.cached("rates", **{"ttl": 600, "swr": 600} | (of_rates or {}))
        def rates() -> dict[str, int]:
            self.loads["rates"] += 1
            return {"loads": self.loads["rates"]}

        self.price, self.rates = price, rates


@pytest.mark.parametrize("kinds", PAIRS, ids=" and ".join)
def test_calls_of_several_loaders_are_one_round_trip(room: Any, trips: Trips, kinds: Any) -> None:
    """Calls of loaders kept in any two ways take one round trip. One that is given twice has two values."""
    shop = Shop(room, KINDS[kinds[0]], KINDS[kinds[1]])
    wanted = partial(shop.price, 2), shop.rates, partial(shop.price, id=1), partial(shop.price, 2)
    expected = [2, "EUR", 1], {"loads": 1}, [1, "EUR", 1], [2, "EUR", 1]
    for _ in range(2):
        with room.request():
            assert room.cache.gather(*wanted) == expected
    trips.taken()
    with room.request():
        found = room.cache.gather(*wanted)
        assert trips.taken() == 1
        assert found == expected
        assert found[0] is not found[3]
    assert set(shop.loads.values()) == {1}


@pytest.mark.parametrize("kinds", PAIRS, ids=" and ".join)
def test_each_is_what_its_call_returns(room: Any, client: Any, kinds: Any) -> None:
    """A fresh, stale, missing, unreadable or forgotten value is answered as its call by itself is."""
    shop = Shop(room, KINDS[kinds[0]], KINDS[kinds[1]])
    wanted = [shop.rates, *(partial(shop.price, n) for n in range(5))]
    room.cache.gather(*wanted)
    age(client, room.keys.entry(b"price:1:EUR"), 700)
    client.delete(room.keys.entry(b"price:2:EUR"), room.keys.entry(b"rates"))
    client.set(room.keys.entry(b"price:3:EUR"), "no entry")
    room.cache.invalidate("price:4:EUR")
    again = {2, 3, 4}
    assert room.cache.gather(*wanted)[1:] == tuple([n, "EUR", 1 + (n in again)] for n in range(5))
    assert room.cache.gather(*wanted) == tuple(call() for call in wanted)
    assert room.cache.gather(partial(shop.price, 1, "USD"), partial(shop.price, 1, unit="USD")) == (
        shop.price(1, "USD"),
        shop.price(1, "USD"),
    )


def test_nothing_is_gathered_without_a_word_to_redis(room: Any, trips: Trips) -> None:
    """No calls are no values, and kept copies that are proved ask nothing."""
    shop = Shop(room, {"near": 30}, {"near": 30})
    assert room.cache.gather() == ()
    with room.request():
        wanted = shop.rates, partial(shop.price, 1)
        first = room.cache.gather(*wanted)
        trips.taken()
        assert room.cache.gather(*wanted) == first
    assert trips.taken() == 0


def test_stale_values_of_several_loaders_are_one_task(
    room: Any, client: Any, dispatch: Any
) -> None:
    """Stale values of several loaders are served, and one message orders all of them from a worker."""
    shop = Shop(room)
    wanted = shop.rates, partial(shop.price, 1)
    room.cache.gather(*wanted)
    for key in (b"rates", b"price:1:EUR"):
        age(client, room.keys.entry(key), 700)
    assert room.cache.gather(*wanted) == ({"loads": 1}, [1, "EUR", 1])
    assert (len(dispatch.orders), dispatch.messages) == (2, 1)
    assert dispatch.run_all(room) == ["refreshed"] * 2
    assert room.cache.gather(*wanted) == ({"loads": 2}, [1, "EUR", 2])


def test_plain_calls_go_with_the_first_of_many_others(
    room: Any, trips: Trips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls with a clock each go in bites, and calls that share one go beside the first bite."""
    monkeypatch.setattr(calls, "LOOKS_AT_ONCE", 3)
    shop = Shop(room, {"memo": True})
    wanted = [partial(shop.price, n) for n in range(7)] + [shop.rates]
    for _ in range(2):
        room.cache.gather(*wanted)
    trips.taken()
    assert room.cache.gather(*wanted) == (*([n, "EUR", 1] for n in range(7)), {"loads": 1})
    assert trips.taken() == 3


def test_an_invalidation_meanwhile_costs_a_gather_one_more_look(make_room: Any) -> None:
    """The clock that it has read is older than what this process knows by then: no reason to doubt the server."""
    room = make_room()
    room.stats.due = math.inf  # no counts ride along
    shop = Shop(room)
    wanted = asked_of(room._cache_body, [shop.rates, partial(shop.price, 1)])
    room.cache.gather(shop.rates, partial(shop.price, 1))
    for _ in range(READS_A_MOVE + 1):  # the clock has stood still for long enough
        shop.rates()
    looks = room._cache_body.call_many(wanted)
    assert type(looks) is calls.PlainLooks
    look, asked = Stepper(room, looks), []
    look.step()
    room.cache.invalidate_by_tag("t")
    look.step()
    while not look.done:
        asked.append(look.at)
        look.step()
    assert look.value() == [{"loads": 1}, [1, "EUR", 1]]
    assert {command[0] for step in asked for command in step} == {b"MGET"}


def refusals(room: Any, other: Any) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    """Return calls that are refused, each with its error and what that says."""
    shop = Shop(room) if room else None
    theirs = Shop(other) if other else None
    price: Any = shop and shop.price
    gather: Any = room and room.cache.gather
    return {
        "a value": (lambda: gather([1, "EUR"]), InvalidArgument, r"\[1, 'EUR'\]\): give functions"),
        "a lambda": (lambda: gather(lambda: price(1)), InvalidArgument, "functools.partial"),
        "a partial of another function": (
            lambda: gather(partial(print, 1)),
            InvalidArgument,
            "made by `cached`",
        ),
        "another room's": (
            lambda: gather(shop and shop.rates, theirs and theirs.rates),
            InvalidArgument,
            "rates.*the cache of another room",
        ),
        "too many": (
            lambda: gather(partial(price, 1, "EUR", 3)),
            TypeError,
            r"price\(\): too many",
        ),
        "too few": (lambda: gather(price), TypeError, "missing a required argument: 'id'"),
        "a misspelt name": (lambda: gather(partial(price, 1, unti="EUR")), TypeError, "unti"),
        "what is no key": (lambda: gather(partial(price, object())), InvalidArgument, "price"),
    }


@pytest.mark.parametrize("what", refusals(None, None))
def test_what_is_no_call_is_refused_before_anything_is_read(
    room: Any, make_room: Any, trips: Trips, what: str
) -> None:
    """What is no call is refused before Redis is asked, with what was given and what to write."""
    call, kind, sentence = refusals(room, make_room())[what]
    trips.taken()
    with pytest.raises(kind, match=sentence):
        call()
    assert trips.taken() == 0


def test_a_coroutine_is_refused_and_closed(settings: Settings) -> None:
    """A coroutine is a call that was made already. It is refused, and closed, so that Python does not warn."""

    async def main() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:

            @room.cache.cached("one:{id}", ttl=60)
            async def one(id: int) -> int:
                return id

            made: Any = one(1)
            with pytest.raises(InvalidArgument, match=r"functools.partial\(product, 7\)"):
                await room.cache.gather(made)
            assert await room.cache.gather(partial(one, 1)) == (1,)

    asyncio.run(main())


def test_an_error_of_one_loader_leaves_those_behind_it_unloaded(make_room: Any) -> None:
    """In a thread missing values are loaded in the order of the calls; what is stored by then stays."""
    room, loads = make_room(), list[str]()

    def loader(name: str) -> Any:
        @room.cache.cached(name, ttl=60, name=name)
        def load() -> str:
            loads.append(name)
            if name == "second":
                raise ZeroDivisionError(name)
            return name

        return load

    first, second, third = map(loader, ["first", "second", "third"])
    with pytest.raises(ZeroDivisionError) as caught:
        room.cache.gather(first, second, third)
    assert not any("stillroom/cache" in str(frame.path) for frame in caught.traceback)
    assert loads == ["first", "second"]
    assert room.cache.get("first") == "first"


def test_in_asyncio_each_loader_keeps_to_its_own_number(settings: Settings) -> None:
    """A loader that may run twice at a time holds no other loader up; an error is raised once all have ended."""
    running, ended = Counter[str](), list[str]()

    async def main() -> None:
        all_run = asyncio.Event()

        async def load(name: str) -> None:
            running[name] += 1
            assert running["slow"] <= 2
            if running == {"slow": 2, "wide": 4}:
                all_run.set()
            await asyncio.wait_for(all_run.wait(), 30)
            running[name] -= 1
            ended.append(name)

        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:

            @room.cache.cached("slow:{id}", ttl=60, at_once=2)
            async def slow(id: int) -> int:
                await load("slow")
                return id

            @room.cache.cached("wide:{id}", ttl=60)
            async def wide(id: int) -> int:
                await load("wide")
                if id == 3:
                    raise ZeroDivisionError(id)
                return id

            wanted = [partial(one, n) for n in (4, 5, 6, 7) for one in (slow, wide)]
            assert await room.cache.gather(*wanted) == (4, 4, 5, 5, 6, 6, 7, 7)
            ended.clear()
            with pytest.raises(ZeroDivisionError):
                await room.cache.gather(partial(wide, 3), partial(slow, 8), partial(wide, 8))
            assert sorted(ended) == ["slow", "wide", "wide"]

    asyncio.run(main())


def test_redis_away_each_is_loaded(settings: Settings, own_server: Any) -> None:
    """While Redis is away the values of loaders of each kind are loaded."""
    changed = settings.model_copy(update={"redis_url": own_server.url})
    own_server.kill()
    for kinds in PAIRS:
        with Stillroom(changed, dispatch=NoDispatch()) as room:
            shop = Shop(room, KINDS[kinds[0]], KINDS[kinds[1]])
            wanted = shop.rates, partial(shop.price, 1)
            assert room.cache.gather(*wanted) == ({"loads": 1}, [1, "EUR", 1])


def test_a_method_is_gathered_with_its_object(make_room: Any) -> None:
    """A method is gathered bound to its object, by itself and in a partial."""
    room = make_room()

    class Shelf:
        @room.cache.cached("shelf:{id}", ttl=60, ignore=["self"])
        def book(self, id: int = 0) -> str:
            return f"book {id}"

    shelf = Shelf()
    assert room.cache.gather(shelf.book, partial(shelf.book, 1)) == ("book 0", "book 1")
