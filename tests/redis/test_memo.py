"""With `memo=True` a request asks for a key once, and sees what its own process invalidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stillroom import NoDispatch, Settings, Stillroom
from stillroom.cache import memo, near
from tests.support.entries import age
from tests.support.trips import Trips


def load_of(room: Any, **options: Any) -> Any:
    @room.cache.cached("price:{id}", **{"ttl": 60, "tags": ["prices"], "memo": True} | options)
    def price(id: int) -> list[int]:
        return [id]

    return price


def begin(price: Any) -> None:
    """Load the value, and let the process learn earlier invalidations."""
    price(7)
    price(7)


def test_the_same_key_twice_is_one_round_trip(room: Any, trips: Trips) -> None:
    """One request asks once for a key, and each caller gets a copy. Other keys and other requests ask again."""
    price = load_of(room)
    begin(price)
    price(8)
    trips.taken()
    with room.request():
        first = price(7)
        first.append(0)
        assert price(7) == price(7) == [7]
        assert trips.taken() == 1
        price(8)
        assert trips.taken() == 1
    with room.request():
        price(7)
    price(7)
    price(7)
    assert trips.taken() == 3


def test_others_do_not_remember(room: Any, trips: Trips) -> None:
    """A loader without `memo=True` is asked each time."""
    price = load_of(room, memo=False)
    begin(price)
    trips.taken()
    with room.request():
        price(7)
        price(7)
    assert trips.taken() == 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "its key": lambda room: room.cache.invalidate("price:7"),
    "its tag": lambda room: room.cache.invalidate_by_tag("prices"),
    "a pattern": lambda room: room.cache.invalidate_by_pattern("price:*"),
    "everything": lambda room: room.cache.clear(),
    "keys": lambda room: room.cache.invalidate_many(["price:7"]),
    "a set": lambda room: room.cache.set("price:7", [1]),
    "a set of many": lambda room: room.cache.set_many({"price:7": [1]}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_this_process_changes_is_seen_in_the_same_request(
    room: Any, change: Callable[[Any], Any]
) -> None:
    """After this process sets or invalidates a key, the same request reads the new value."""
    values = [[1], [2]]

    @room.cache.cached("price:{id}", ttl=60, tags=["prices"], memo=True)
    def price(id: int) -> list[int]:
        return values.pop()

    with room.request():
        assert price(7) == price(7) == [2]
        change(room)
        assert price(7) == price(7) == [1]


def test_what_another_process_invalidates_is_seen_by_the_next_request(
    room: Any, make_room: Any
) -> None:
    """A request that begins after another process's invalidation never sees an older value."""
    values = [[1], [2]]
    other: Stillroom = make_room()

    @room.cache.cached("price:{id}", ttl=60, tags=["prices"], memo=True)
    def price(id: int) -> list[int]:
        return values.pop()

    price(7)
    with room.request():
        assert price(7) == [2]
        other.cache.invalidate_by_tag("prices")
        assert price(7) == [2]
    with room.request():
        assert price(7) == [1]


def test_a_request_does_not_go_back_in_time(room: Any, client: Any, dispatch: Any) -> None:
    """A request does not see a stale value again once this process has refreshed it."""
    price = load_of(room, swr=600)
    price(7)
    age(client, room.keys.entry(b"price:7"), 61)
    with room.request():
        assert price(7) == price(7) == [7]
        assert len(dispatch.orders) == 1
        assert dispatch.run_all(room) == ["refreshed"]
        price(7)
        assert room.cache.get_entry("price:7").freshness.value == "fresh"


def test_a_long_stream_asks_again(room: Any, trips: Trips, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request remembers a value for five seconds at most, and a thousand keys at most."""
    monkeypatch.setattr(memo, "KEPT_S", -1.0)
    price = load_of(room)
    begin(price)
    trips.taken()
    with room.request():
        price(7)
        price(7)
    assert trips.taken() == 2
    monkeypatch.setattr(memo, "KEPT_S", 60.0)
    monkeypatch.setattr(memo, "LIMIT", 0)
    with room.request():
        price(7)
        price(7)
    assert trips.taken() == 2


@pytest.mark.parametrize("kind", ["memo", "near"])
@pytest.mark.parametrize("way", ["time", "a change"])
def test_a_stream_remembers_what_it_reads_after_a_thousand_keys(
    room: Any, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    """What a request will not read again makes room, also where it stands behind a key that is read often."""
    monkeypatch.setattr(memo, "LIMIT", 4)
    monkeypatch.setattr(near, "LIMIT", 4)
    price = load_of(room, memo=kind == "memo", near=kind == "near")
    for _ in range(2):
        with room.request():
            assert len([price(number) for number in range(10)]) == 10
    if way == "time":
        monkeypatch.setattr(memo, "KEPT_S", -1.0)
    with room.request() as request:
        for number in range(1, 10):
            if way == "a change" and number % 3 == 1:
                room.cache.set("another", 1)
            price(0)
            price(number)
            assert (room.cache._body._memo, b"price:%d" % number) in request.memo
            assert len(request.memo) <= 4


def test_away_it_serves_what_the_request_has_read(settings: Settings, own_server: Any) -> None:
    """When Redis is away a request is served what it has read before."""
    away = settings.model_copy(update={"redis_url": own_server.url})
    with Stillroom(away, dispatch=NoDispatch()) as room:
        price = load_of(room)
        price(7)
        with room.request():
            assert price(7) == [7]
            own_server.kill()
            assert price(7) == [7]
            assert not room.wire.breaker.streak
