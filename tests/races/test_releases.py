"""Two releases of an app at once have their own entries, and an invalidation reaches both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from stillroom import Freshness, Stillroom
from tests.support.entries import age
from tests.support.monitor import sent
from tests.support.stepper import Stepper

NEVER = float("inf")  # time.monotonic()


class V1(BaseModel):
    id: int
    price: float


class V2(BaseModel):
    id: int
    price_cents: int


class V3(BaseModel):
    id: int
    price: float
    currency: str = "EUR"  # the values of V1 fit, and would all be in euros


class Release:
    """A process of one release: its room and its loader of a product."""

    def __init__(self, room: Stillroom, kind: Any, **options: Any) -> None:
        self.room = room
        self.calls = 0
        self.versions = iter(range(1, 100))
        values: dict[Any, Callable[[int], Any]] = {
            V1: lambda n: V1(id=7, price=n),
            V2: lambda n: V2(id=7, price_cents=n),
            V3: lambda n: V3(id=7, price=n, currency="CHF"),
            int: lambda n: n,
        }

        def load(id: int) -> Any:
            self.calls += 1
            return values[kind](next(self.versions))

        given = {"name": "product", "tags": ["products"], "ttl": 60, "swr": 600, **options}
        self.load = room.cache.cached("product:{id}", type=kind, **given)(load)

    def ask(self) -> Any:
        """Load in a request, in which a loader with `near` keeps copies."""
        with self.room.request():
            return self.load(7)

    def step(self) -> Stepper:
        return Stepper(self.room, self.room._cache_body.call(self.load.loader, (7,), {}))


@pytest.fixture
def releases(make_room: Any) -> list[Release]:
    return [Release(make_room(), V1), Release(make_room(), V2)]


@pytest.mark.parametrize("near", [None, True], ids=["", "near"])
@pytest.mark.parametrize("kinds", [(V1, V2), (V1, V3), (V3, V1), (int, V2), (V2, int)], ids=str)
def test_each_release_has_its_own_entry_and_one_load(
    make_room: Any, kinds: Any, near: bool | None
) -> None:
    """Each release has one entry of its own type and one load, however often both ask."""
    both = [Release(make_room(), kind, near=near) for kind in kinds]
    answers = [(one.ask(), other.ask()) for _ in range(6) for one, other in [both]]
    assert len(set(map(str, answers))) == 1
    assert [type(value) for value in answers[0]] == list(kinds)
    assert [release.calls for release in both] == [1, 1]


def test_a_version_keeps_releases_apart(make_room: Any) -> None:
    """A version keeps two releases apart when the type does not differ."""
    old, new = (Release(make_room(), int, version=version) for version in (1, 2))
    next(new.versions)
    assert [old.load(7), new.load(7), old.load(7), new.load(7)] == [1, 2, 1, 2]
    assert (old.calls, new.calls) == (1, 1)


def test_no_hit_is_another_releases_and_both_places_are_one_trip(
    make_room: Any, client: Any
) -> None:
    """A process whose first look finds another release's value loads its own, and reads it in one round trip."""
    old, new = (Release(make_room(), int, version=version) for version in (1, 2))
    next(new.versions)
    for release in (old, new):
        release.room.stats.due = NEVER  # no counts ride along
    old.room.cache.set("else", 1)
    assert new.room.cache.get("else") == 1  # so it knows the clock
    assert [old.load(7), old.load(7), new.load(7), new.load(7)] == [1, 1, 2, 2]
    assert sent(client, lambda: new.load(7)) == ["MGET"]
    assert (old.calls, new.calls) == (1, 1)


def invalidations(room: Stillroom) -> Iterator[tuple[str, Callable[[], Any]]]:
    cache = room.cache
    yield "key", lambda: cache.invalidate("product:7")
    yield "many", lambda: cache.invalidate_many(["product:7"])
    yield "tag", lambda: cache.invalidate_by_tag("products")
    yield "pattern", lambda: cache.invalidate_by_pattern("prod*")
    yield "clear", cache.clear
    yield "set", lambda: cache.set("product:7", {"nobody": "reads this"})


@pytest.mark.parametrize("near", [None, True], ids=["", "near"])
@pytest.mark.parametrize("way", ["key", "many", "tag", "pattern", "clear"])
@pytest.mark.parametrize("by", [0, 1])
def test_an_invalidation_by_either_reaches_both(
    make_room: Any, way: str, by: int, near: bool | None
) -> None:
    """An invalidation by key, tag or pattern from either release reaches both, and what they keep."""
    releases = [Release(make_room(), kind, near=near) for kind in (V1, V2)]
    for release in 3 * releases:
        release.ask()
    dict(invalidations(releases[by].room))[way]()
    assert [release.room.cache.get("product:7") for release in releases] == [None, None]
    for release in releases:
        release.ask()
        assert release.calls == 2


@pytest.mark.parametrize("by", [0, 1])
def test_an_invalidation_by_argument_or_order_reaches_both(
    releases: list[Release], by: int
) -> None:
    """`load.invalidate(7)`, and an order to a worker of the other release, reach both releases."""
    for turn in (1, 2):
        for release in releases:
            release.load(7)
            assert release.calls == turn
        if turn == 1:
            assert releases[by].load.invalidate(7) == 2, "one value of each release"
    releases[by].room.tasks.invalidate_keys("product:7")
    releases[1 - by].room.upkeep.reclaim()
    assert all(release.room.cache.get("product:7") is None for release in releases)


def test_a_value_that_is_set_is_everybodys(releases: list[Release]) -> None:
    """A value that is set belongs to both releases. A release that cannot read it loads its own again."""
    for release in releases:
        release.load(7)
    releases[0].room.cache.set("product:7", {"id": 7, "price": 99.0})
    assert releases[0].load(7) == V1(id=7, price=99.0)
    assert releases[1].load(7) == V2(id=7, price_cents=2)
    assert releases[0].load(7) == V1(id=7, price=2)


def test_nothing_from_before_a_set_comes_back_when_its_value_ends(
    releases: list[Release], client: Any
) -> None:
    """A value that is set takes the places of both releases, so each loads again when its time is over."""
    for release in releases:
        release.load(7)
    releases[0].room.cache.set("product:7", {"id": 7, "price": 99.0})
    client.delete(releases[0].room.keys.entry(b"product:7"))
    assert [release.load(7) for release in releases] == [V1(id=7, price=2), V2(id=7, price_cents=2)]


def test_what_a_loader_stored_is_found_by_hand(releases: list[Release]) -> None:
    """A reader with a type finds a loader's value in its place, and one without a type any value there."""
    for release in releases:
        release.load(7)
    for release in releases:
        cache = release.room.cache
        assert cache.get("product:7", V1) == V1(id=7, price=1)
        assert cache.get("product:7", V2) == V2(id=7, price_cents=1)
        assert cache.get_many(["product:7"], V2) == {"product:7": V2(id=7, price_cents=1)}
        entry = cache.get_entry("product:7", V2)
        assert entry is not None
        assert (entry.value, entry.freshness, entry.loader) == (
            V2(id=7, price_cents=1),
            Freshness.FRESH,
            "product",
        )
        assert cache.get("product:7") == {"id": 7, "price": 1.0}


def test_a_dead_value_hides_no_living_one_of_another_release(
    releases: list[Release], make_room: Any, client: Any, dispatch: Any
) -> None:
    """Where the first place has a dead value of a release that is gone, the living one beside it is found, and
    refreshed when it is stale.
    """
    for release in releases:
        release.load(7)
    room = releases[1].room
    room.cache.invalidate_by_tag("products")
    releases[1].load(7)
    after = Release(make_room(), V2)
    cache, living = after.room.cache, {"id": 7, "price_cents": 2}
    assert cache.get("product:7") == living
    assert cache.get_many(["product:7"]) == {"product:7": living}
    assert cache.touch("product:7", ttl=60)
    assert not cache.add("product:7", 1)
    assert [after.load(7) for _ in range(3)] == [V2(id=7, price_cents=2)] * 3
    assert (after.calls, after.room.stats.counts["misses"]) == (0, 0)
    age(client, room.keys.other(b"product:7"), 61)
    assert cache.get("product:7") == living
    assert dispatch.run_all(after.room) == ["refreshed"]


def test_many_keys_keep_releases_apart_too(make_room: Any) -> None:
    """get_or_set_many keeps releases apart like any loader."""
    rooms = [make_room(), make_room()]
    calls: list[Any] = []

    def loads(kind: Any, make: Callable[[int], Any]) -> Callable[[list[str]], dict[str, Any]]:
        def load(keys: list[str]) -> dict[str, Any]:
            calls.append(kind)
            return {key: make(len(key)) for key in keys}

        load.__annotations__["return"] = dict[str, kind]
        return load

    old, new = loads(V1, lambda n: V1(id=n, price=1)), loads(V2, lambda n: V2(id=n, price_cents=1))
    keys = ["a", "bb", "ccc"]
    for _ in range(3):
        first, second = (
            rooms[0].cache.get_or_set_many(keys, old),
            rooms[1].cache.get_or_set_many(keys, new),
        )
        assert [type(value) for value in first.values()] == [V1] * 3
        assert [type(value) for value in second.values()] == [V2] * 3
    assert calls == [V1, V2]


def test_a_stale_value_is_refreshed_by_a_worker_of_its_release(
    releases: list[Release], client: Any, dispatch: Any
) -> None:
    """A stale value is refreshed by a worker of its release; another release's worker leaves it and is
    not asked at once.
    """
    for release in releases:
        release.load(7)
    room = releases[0].room
    for key in (room.keys.entry(b"product:7"), room.keys.other(b"product:7")):
        age(client, key, 61)
    assert releases[1].load(7) == V2(id=7, price_cents=1)
    assert dispatch.run_all(releases[1].room) == ["refreshed"]
    assert releases[1].load(7) == V2(id=7, price_cents=2)
    assert releases[0].load(7) == V1(id=7, price=1)
    (order,) = dispatch.orders
    only_new = Release(type(room)(room.settings, dispatch=dispatch), V2)
    client.delete(room.keys.other(b"product:7"))
    assert only_new.room.upkeep.refresh(order)["outcome"] == "another release's"
    assert client.get(room.keys.lease(b"product:7")).startswith(b"backoff.")
    assert releases[0].load(7) == V1(id=7, price=1)
    only_new.room.close()


def test_the_places_change_hands_as_releases_come_and_go(
    releases: list[Release], make_room: Any, client: Any
) -> None:
    """A third release takes the place of the entry that ends first, and a value is never in two places."""
    for release in releases:
        release.load(7)
    keys = releases[0].room.keys
    first, other = keys.entry(b"product:7"), keys.other(b"product:7")
    assert client.exists(first, other) == 2
    client.pexpire(first, 5_000)  # the old release's: nobody refreshes it any more
    third = Release(make_room(), V3)
    third.load(7)
    assert b'"currency":"CHF"' in client.get(first)
    assert b"price_cents" in client.get(other)
    client.delete(first)
    earlier = client.get(other)
    assert releases[1].load(7) == V2(id=7, price_cents=1), "it is found where it is"
    age(client, other, 61)
    releases[1].room.upkeep.load(_order())
    assert client.get(other) is None, "its own is in the first place now, and nowhere else"
    assert earlier != client.get(first)


def _order() -> Any:
    from stillroom.cache.orders import Load

    return Load(loader="product", args={"id": 7})


@pytest.mark.parametrize("way", ["key", "tag", "pattern", "clear", "set"])
@pytest.mark.parametrize("loading", [0, 1])
def test_nothing_loaded_before_an_invalidation_is_read_after_it(
    releases: list[Release], make_room: Any, way: str, loading: int
) -> None:
    """No value loaded before an invalidation is read after it, whichever release loads or invalidates,
    at every step.
    """
    for steps in range(40):
        both = [Release(make_room(namespace=f"n{steps}"), kind) for kind in (V1, V2)]
        both[1 - loading].load(7)  # the other one has its value, in the first place
        load = both[loading].step()
        for _ in range(steps):
            if load.done:
                break
            load.step()
        was_done = load.done
        before = both[loading].calls
        dict(invalidations(both[1 - loading].room))[way]()
        load.run()
        for release, kind in zip(both, (V1, V2), strict=True):
            found = release.room.cache.get("product:7", kind)
            if found is not None:  # then its load began after the invalidation
                assert release is both[loading]
                assert before == 0, (steps, way)
        if was_done:
            return
    pytest.fail("the load takes more than 40 steps")


def test_loads_of_two_releases_and_an_invalidation_in_every_order(make_room: Any) -> None:
    """Loads of two releases and an invalidation at each moment obey the rule in every order."""
    for cut in range(60):
        both = [Release(make_room(namespace=f"c{cut}"), kind) for kind in (V1, V2)]
        one, other = both[0].step(), both[1].step()
        taken = 0
        while taken < cut and not (one.done and other.done):
            for load in (one, other):
                if not load.done and taken < cut:
                    load.step()
                    taken += 1
        both[0].room.cache.invalidate("product:7")
        calls = [release.calls for release in both]
        was_done = one.done and other.done
        for _ in range(400):
            for load in (one, other):
                if not load.done:
                    load.step()
        assert one.done
        assert other.done
        for release, kind, count in zip(both, (V1, V2), calls, strict=True):
            found = release.room.cache.get("product:7", kind)
            assert found is None or release.calls > count, cut
        if was_done:
            return
    pytest.fail("both loads take more than 60 steps")
