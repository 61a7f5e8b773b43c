"""Loaders say how often and for which arguments they are warmed, and workers load them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import pytest

from stillroom import AsyncStillroom, NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.cache import Housekeeping
from stillroom.embedded import EmbeddedServer
from stillroom.leash import until
from stillroom_workers.app import make_app
from stillroom_workers.schedule import SCHEDULE
from tests.support.crowd import PATIENT
from tests.support.stepper import Stepper


def loader_of(room: Any, loads: list[Any], **options: Any) -> Any:
    @room.cache.cached("product:{id}:{lang}", ttl=3_600, **options)
    def product(id: int, lang: str = "en") -> str:
        loads.append((id, lang))
        return f"{id} {lang} {len(loads)}"

    return product


GIVEN: dict[str, tuple[Any, list[tuple[int, str]]]] = {
    "dicts": ([{"id": 1}, {"id": 2, "lang": "de"}], [(1, "en"), (2, "de")]),
    "tuples": ([(1,), (2, "de")], [(1, "en"), (2, "de")]),
    "single ones": ([1, 2], [(1, "en"), (2, "en")]),
    "a function": (lambda: iter([1, (2, "de")]), [(1, "en"), (2, "de")]),
}


@pytest.mark.parametrize(("given", "expected"), GIVEN.values(), ids=GIVEN)
def test_values_are_loaded_whether_anybody_asks_or_not(
    room: Any, given: Any, expected: list[tuple[int, str]]
) -> None:
    """Warm-ups load the arguments that a loader lists, in any form, whether anybody asks for them or not."""
    loads: list[Any] = []
    product = loader_of(room, loads, warm_every=60, warm_with=given)
    assert room.tasks.warm() == {"loaders": 1, "values": 2}
    room.cache.reclaim()
    assert sorted(loads) == expected
    assert product(*expected[0]).startswith("1 en")
    assert sorted(loads) == expected


def test_a_value_that_keep_refuses_is_no_failed_order(room: Any) -> None:
    """An ordered load whose value `keep` refuses is done: it is not tried again, and becomes no dead letter."""
    loads: list[int] = []

    @room.cache.cached(
        "row:{id}", keep=lambda row: row is not None, warm_every=60, warm_with=[1, 2]
    )
    def row(id: int) -> str | None:
        loads.append(id)
        return "one" if id == 1 else None

    room.tasks.warm()
    counts = room.cache.reclaim()
    assert (counts["done"], counts["left"]) == (2, 0)
    assert sorted(loads) == [1, 2]
    assert room.cache.get("row:1") == "one"
    assert room.cache.get("row:2") is None


def test_a_generator_is_good_for_every_period(make_room: Any, client: Any) -> None:
    """Arguments that can be read once only are a list from the registration on."""
    room: Stillroom = make_room()
    loader_of(room, [], warm_every=60, warm_with=(n for n in (1, 2)))
    for _ in range(2):
        assert room.tasks.warm() == {"loaders": 1, "values": 2}
        client.delete(room.keys.warm(b"product"))


def test_each_period_is_claimed_by_one_worker(room: Any, make_room: Any, client: Any) -> None:
    """One worker claims each period, however many workers and beats there are. The claim has a TTL."""
    loads: list[Any] = []
    other: Stillroom = make_room()
    every = timedelta(days=1)
    for one in (room, other):
        loader_of(one, loads, warm_every=every, warm_with=[1])
    reports = [one.tasks.warm() for one in (room, other, room)]
    assert sorted(report["values"] for report in reports) == [0, 0, 1]
    key = other.keys.warm(b"product")
    assert 86_400_000 < client.pttl(key) <= 2 * 86_400_000
    period, _, token = client.get(key).partition(b" ")
    client.set(key, b"%d %b" % (int(period) - 1, token))
    assert other.tasks.warm() == {"loaders": 1, "values": 1}


def test_what_a_killed_worker_has_claimed_is_claimed_again(room: Any, client: Any) -> None:
    """A worker that ends before its orders are written takes no period away: its claim holds as long as a load."""
    loads: list[Any] = []
    loader_of(room, loads, warm_every=timedelta(days=7), warm_with=[1])
    assert room.tasks.warm() == {"loaders": 1, "values": 1}
    key = room.keys.warm(b"product")
    seconds, _ = client.time()
    written = client.get(key)
    for left_ms, report in (200_000, [0, 0]), (-1, [1, 1]), (0, [0, 0]):
        until_ms = b" %d" % (seconds * 1_000 + left_ms) if left_ms else b""
        client.set(key, written + until_ms)
        assert list(room.tasks.warm().values()) == report


def test_a_list_that_takes_longer_than_its_period_is_made_once(make_room: Any, client: Any) -> None:
    """Nobody begins another warm-up of a loader while one is under way, though the next period has come."""
    room, other, reports = make_room(), make_room(), []

    def slowly() -> list[int]:
        key = room.keys.warm(b"product")
        period, rest = client.get(key).split(b" ", 1)
        client.set(key, b"%d %b" % (int(period) - 1, rest))
        reports.append(other.tasks.warm())
        return [1]

    for one in (room, other):
        loader_of(one, [], warm_every=60, warm_with=slowly)
    assert room.tasks.warm() == {"loaders": 1, "values": 1}
    assert other.tasks.warm() == {"loaders": 1, "values": 1}
    assert reports[0] == {"loaders": 0, "values": 0}


def test_a_loader_without_parameters_needs_no_list(room: Any) -> None:
    """A loader without parameters needs no list: its one value is loaded."""
    loads: list[int] = []

    @room.cache.cached("rates", warm_every=60)
    def rates() -> int:
        loads.append(1)
        return len(loads)

    @room.cache.cached("other")
    def other() -> int:
        raise AssertionError("nobody asked for it")

    assert room.tasks.warm() == {"loaders": 1, "values": 1}
    room.cache.reclaim()
    assert rates() == 1


def test_a_list_that_can_t_be_made_stops_no_other(
    room: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A list that raises is logged, and the other loaders are warmed."""
    loads: list[Any] = []

    def broken() -> list[int]:
        raise ZeroDivisionError("broken")

    @room.cache.cached("a:{id}", name="a", warm_every=60, warm_with=broken)
    def load(id: int = 1) -> int:
        return id

    loader_of(room, loads, warm_every=60, warm_with=[1])
    assert room.tasks.warm() == {"loaders": 2, "values": 1}
    assert "a warm-up failed" in caplog.text


def test_arguments_that_no_worker_could_load_stop_no_others(
    room: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a list that has bad arguments the good ones are ordered, and the bad ones are logged."""
    loads: list[Any] = []
    loader_of(room, loads, warm_every=60, warm_with=lambda: [1, None, "x", {"no": 1}, (1, 2, 3), 2])
    assert room.tasks.warm() == {"loaders": 1, "values": 2}
    assert "a warm-up failed" in caplog.text


def test_several_shards_are_warmed_once(make_room: Any) -> None:
    """Several shards are warmed once: the orders are in the first shard and are carried out in all."""
    loads: list[Any] = []
    room: Stillroom = make_room(shards=4)
    loader_of(room, loads, warm_every=60, warm_with=range(8))
    assert room.tasks.warm() == {"loaders": 1, "values": 8}
    assert room.tasks.warm() == {"loaders": 0, "values": 0}
    room.cache.reclaim()
    assert len(loads) == 8


def test_away_it_is_raised() -> None:
    """When Redis is away the warm-up raises, and beat asks again in ten seconds."""
    room = Stillroom(Settings(redis_url="redis://127.0.0.1:1"))
    loader_of(room, [], warm_every=60, warm_with=[1])
    with pytest.raises(RedisUnavailable):
        room.tasks.warm()
    room.close()


def test_a_claim_that_arrives_twice_is_one(make_room: Any) -> None:
    """A worker whose claim the wire sends twice warms the loader, and not nobody."""
    room: Stillroom = make_room()
    loader_of(room, [], warm_every=60, warm_with=[1])
    housekeeping = Housekeeping(room._cache_body, room.tasks._body._orders, room._pauses)
    stepper = Stepper(room, housekeeping.warm())
    stepper.twice = True
    assert stepper.value() == {"loaders": 1, "values": 1}


def test_a_period_is_not_lost_where_the_state_is_away(
    server: EmbeddedServer, own_server: EmbeddedServer
) -> None:
    """A worker that could write no orders gives the period back, and it is warmed when the state is back."""
    places = {"redis_url": own_server.url, "cache_url": server.url, "call_timeout": 0.2}
    with Stillroom(Settings(**PATIENT | places), dispatch=NoDispatch()) as room:
        loader_of(room, [], warm_every=3_600, warm_with=[1])
        room.cache.set("k", 1)
        own_server.freeze()
        with pytest.raises(RedisUnavailable):
            room.tasks.warm()
        own_server.thaw()
        assert until(lambda: not room.state_wire.breaker.is_open, 10)
        assert room.tasks.warm() == {"loaders": 1, "values": 1}


def test_a_list_whose_own_redis_is_away_stops_no_other(room: Any) -> None:
    """A list that raises RedisUnavailable of its own is logged, and the other loaders are warmed."""

    def away() -> list[int]:
        raise RedisUnavailable("refused", "another server of the app")

    @room.cache.cached("a:{id}", name="a", warm_every=60, warm_with=away)
    def load(id: int = 1) -> int:
        return id

    loader_of(room, [], warm_every=60, warm_with=[1])
    assert room.tasks.warm() == {"loaders": 2, "values": 1}


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too often": ({"warm_every": 1}, ValueError, "warm_every=1: a number of seconds from 10"),
    "no times": ({"warm_with": [1]}, ValueError, "warm_with needs warm_every"),
    "too many arguments": (
        {"warm_every": 60, "warm_with": [(1, "de", 3)]},
        TypeError,
        "too many positional",
    ),
    "an unknown one": ({"warm_every": 60, "warm_with": [{"id": 1, "x": 1}]}, TypeError, "'x'"),
    "one for one call": (
        {"warm_every": 60, "warm_with": {"id": 1}},
        ValueError,
        r"for one call write \[\{'id': 1\}\]",
    ),
    "a text": ({"warm_every": 60, "warm_with": "ab"}, ValueError, r"for one call write \['ab'\]"),
    "a number": ({"warm_every": 60, "warm_with": 5}, ValueError, r"for one call write \[5\]"),
    "of another type": ({"warm_every": 60, "warm_with": [1, "x"]}, ValueError, "'x': product: id"),
    "without JSON": ({"warm_every": 60, "warm_with": [(1, object())]}, ValueError, "warm_with"),
    "none at all": (
        {"warm_every": 60},
        TypeError,
        "warm_every needs warm_with, a list .*: for which id$",
    ),
}


@pytest.mark.parametrize(("options", "kind", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_at_the_loader(
    make_room: Any, options: dict[str, Any], kind: type[Exception], said: str
) -> None:
    """A bad warm-up option raises at the loader and not hours later in a worker."""
    with pytest.raises(kind, match=said):
        loader_of(make_room(), [], **options)


def test_a_worker_of_the_schedule_has_the_task() -> None:
    """beat sends the warm-up task, and a worker knows it by that name."""
    app = make_app(Settings(redis_url="redis://127.0.0.1:1"))
    assert "stillroom.warm" in app.tasks
    assert "stillroom.warm" in {tick.task for tick in SCHEDULE}


def test_a_worker_carries_it_out(settings: Settings, make_room: Any) -> None:
    """The task runs the warm-up, and its report is shown in Flower."""
    loads: list[Any] = []
    app = make_app(settings)
    room: Stillroom = make_room()
    loader_of(room, loads, warm_every=60, warm_with=[1, 2])
    app.room.cache.loaders.adopt(room.cache.loaders)
    assert app.tasks["stillroom.warm"]() == {"loaders": 1, "values": 2}
    assert app.tasks["stillroom.reclaim"]()["due"] in (0, False)
    assert sorted(loads) == [(1, "en"), (2, "en")]
    app.room.close()


def test_each_load_happens_inside_what_the_app_wants_around_it(room: Any) -> None:
    """Each warmed load runs inside the app's contexts, which are left in reverse order, also after an error."""
    story: list[str] = []

    def around(name: str) -> Any:
        @contextmanager
        def context() -> Iterator[None]:
            story.append(f"enter {name}")
            try:
                yield
            finally:
                story.append(f"leave {name}")

        return context

    @room.cache.cached("good")
    def good() -> int:
        story.append("load")
        return 1

    @room.cache.cached("bad")
    def bad() -> int:
        raise ZeroDivisionError

    room.cache.loaders.around += [around("a"), around("b")]
    assert good() == good() == 1
    assert story == ["enter a", "enter b", "load", "leave b", "leave a"]
    with pytest.raises(ZeroDivisionError):
        bad()
    assert story[5:] == ["enter a", "enter b", "leave b", "leave a"]


ASKED: ContextVar[str] = ContextVar("asked", default="outside")


@asynccontextmanager
async def awaited() -> AsyncIterator[None]:
    token = ASKED.set("inside")
    yield
    ASKED.reset(token)


@contextmanager
def entered() -> Iterator[None]:
    token = ASKED.set("inside")
    yield
    ASKED.reset(token)


def listed_at_once() -> list[str]:
    return [ASKED.get()]


def listed_late() -> Iterator[str]:
    yield ASKED.get()


@pytest.mark.parametrize("given", [listed_at_once, listed_late])
@pytest.mark.parametrize("context", [awaited, entered])
def test_a_list_is_made_inside_the_contexts_of_its_loader(
    make_room: Any, context: Any, given: Any
) -> None:
    """A blocking warm_with function of an async loader, also a generator, lists inside the contexts of loads."""
    loads: list[str] = []
    room: Stillroom = make_room()
    source = AsyncStillroom(room.settings, dispatch=NoDispatch())
    source.around_load(context)

    @source.cache.cached("{where}", warm_every=60, warm_with=given)
    async def load(where: str) -> int:
        loads.append(where)
        return 1

    room.cache.loaders.adopt(source.cache.loaders)
    assert room.tasks.warm() == {"loaders": 1, "values": 1}
    room.cache.reclaim()
    assert loads == ["inside"]


def test_an_awaited_load_happens_inside_too(settings: Settings) -> None:
    """An async load runs inside the app's contexts for as long as it is awaited."""
    story: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        story.append("enter")
        yield
        story.append("leave")

    async def main() -> None:
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:

            @room.cache.cached("k")
            async def load() -> int:
                await asyncio.sleep(0)
                story.append("load")
                return 1

            room.cache.loaders.around.append(around)
            assert await load() == 1

    asyncio.run(main())
    assert story == ["enter", "load", "leave"]
