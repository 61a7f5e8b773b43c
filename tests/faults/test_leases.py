"""No caller waits for a lease without an owner, whatever interrupts a load."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import redis
from stillroom import AsyncStillroom, Misplaced, NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.cache.orders import Load
from stillroom.embedded import EmbeddedServer
from stillroom.keys import sanitized
from stillroom.operation import Call
from tests.support.celery_process import until
from tests.support.crowd import PATIENT
from tests.support.entries import age
from tests.support.faces import FACES, open_room
from tests.support.full_disk import REFUSALS, take_writes
from tests.support.interruption import Interruption
from tests.support.proxy import Proxy
from tests.support.stepper import Stepper


def leases(client: Any) -> list[bytes]:
    found: list[bytes] = client.keys("*:l:*")
    return found


def fail(_: Any) -> list[str]:
    raise LookupError("a tag function that fails")


@pytest.mark.parametrize("tags", [[fail], [""], ["x" * 2_000], [lambda v: [""]], [lambda v: 5]])
def test_a_tag_that_is_none_costs_the_entry_and_not_the_answer(
    room: Any, client: Any, tags: Any
) -> None:
    """An invalid tag lets the value be returned, stores nothing and frees the lease, for one key and for many."""
    assert room.cache.get_or_set("k", lambda: 1, tags=tags) == 1
    assert room.cache.get_or_set_many(
        ["a", "b"], lambda keys: dict.fromkeys(keys, 1), tags=tags
    ) == {"a": 1, "b": 1}
    assert leases(client) == []
    assert room.cache.get_many(["k", "a", "b"]) == {}


ENDINGS: dict[str, Callable[[Any, Callable[[], Any]], Any]] = {
    "a load": lambda cache, ends: cache.get_or_set("k", ends),
    "loads of many": lambda cache, ends: cache.get_or_set_many(["k", "l"], lambda _: {"k": ends()}),
    "a load with a place": lambda cache, ends: cache.cached("k", at_once=1, name="load")(ends)(),
}


@pytest.mark.parametrize("fails", [False, True], ids=["stored", "failed"])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("face", FACES)
def test_a_load_that_ends_in_an_outage_holds_nobody_up_after_it(
    server: EmbeddedServer, proxy: Proxy, client: Any, face: str, ending: str, fails: bool
) -> None:
    """Its lease and its place are free as soon as its process has found Redis again, and not at their end."""
    settings = Settings(redis_url=proxy.url, **PATIENT | {"connect_timeout": 0.2})
    with open_room(face, settings, NoDispatch()) as room:

        def ends() -> int:
            proxy.lead_to(1)  # nobody is there
            if fails:
                raise LookupError("nothing is there")
            return 1

        with contextlib.suppress(LookupError):
            ENDINGS[ending](room.cache, ends)
        assert leases(client)
        proxy.lead_to(server.port)
        assert room.cache.set("another", 1)
        assert leases(client) == client.keys("*:n:*") == []


@pytest.mark.parametrize("refusal", [*REFUSALS, "for good"])
def test_a_lease_that_redis_refuses_to_take_back_holds_nobody_up(
    own_server: EmbeddedServer, refusal: str
) -> None:
    """A lease is given back again until Redis takes it. One that Redis never takes, because a stranger has made it
    a list, keeps no later call of its process from Redis.
    """
    settings = Settings(redis_url=own_server.url, **PATIENT | {"probe_delay": 0.01})
    with (
        Stillroom(settings, dispatch=NoDispatch()) as room,
        redis.Redis.from_url(own_server.url) as client,
    ):

        def load() -> int:
            if refusal in REFUSALS:
                REFUSALS[refusal](own_server)
            else:
                [lease] = leases(client)
                client.delete(lease)
                client.rpush(lease, "a stranger's")
            return 1

        assert room.cache.get_or_set("k", load) == 1
        assert room.cache.get_or_set("another", lambda: 2) == 2
        assert leases(client)
        take_writes(own_server)
        until(lambda: room.cache.set("a third", 3), "a write")
        assert bool(leases(client)) is (refusal == "for good")


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_a_server_refuses_to_take_back_is_not_sent_with_each_load(
    own_server: EmbeddedServer, refusal: str
) -> None:
    """A server that refuses all writes is asked by each load for a lease and for one of those that are owed."""
    settings = Settings(redis_url=own_server.url, **PATIENT)
    with (
        Stillroom(settings, dispatch=NoDispatch()) as room,
        redis.Redis.from_url(own_server.url) as client,
    ):
        assert room.cache.set("k", 1)
        REFUSALS[refusal](own_server)
        for n in range(50):
            assert room.cache.get_or_set(f"{n}", lambda: 1) == 1
        refused = client.info("errorstats")[f"errorstat_{refusal.upper()}"]["count"]
    assert refused < 4 * 50


def test_a_refresh_that_nobody_knows_of_is_asked_for_again(
    make_room: Any, client: Any, dispatch: Any
) -> None:
    """Where the answer that gave its lease was lost, it is not left alone until that lease ends, for 30 seconds."""
    room = make_room()
    kept = room.cache.cached("k", ttl=60, swr=60, name="load")(lambda: 1)
    assert kept() == 1
    age(client, room.keys.entry(b"k"), 61)
    call = Stepper(room, room._cache_body.call(kept.loader, (), {}))
    while not leases(client):
        call.step()
    call.interrupt(RedisUnavailable("closed"))
    assert call.value() == 1
    assert room.cache.set("another", 1)
    room._cache_body.forget_asked()  # it asks once a second
    assert kept() == 1
    assert dispatch.run_all(room) == ["refreshed"]


class Unshown(Exception):
    """An error whose own code fails, as one that names an attribute which it lacks."""

    def __str__(self) -> str:
        raise AttributeError("the message")

    __repr__ = __bool__ = __str__  # type: ignore[assignment]


OF_KEYS: dict[str, Callable[[Any, Callable[[], Any]], Any]] = {
    "one": lambda cache, load: cache.get_or_set("k", load, ttl=60, swr=60),
    "many": lambda cache, load: cache.get_or_set_many(
        ["k"], lambda _: {"k": load()}, ttl=60, swr=60
    )["k"],
}


@pytest.mark.parametrize("ask", OF_KEYS)
def test_an_error_that_can_not_be_shown_is_as_others(room: Any, client: Any, ask: str) -> None:
    """It reaches its caller and frees the lease, and where there is a stale value that is served."""

    def fail() -> Any:
        raise Unshown

    def outcome(load: Callable[[], Any]) -> Any:
        try:
            return OF_KEYS[ask](room.cache, load)
        except Exception as error:  # which pytest can't show
            return type(error)

    assert outcome(fail) is Unshown
    assert leases(client) == []
    assert outcome(lambda: 1) == 1
    age(client, room.keys.entry(b"k"), 61)
    assert outcome(fail) == 1
    (lease,) = leases(client)
    assert client.get(lease).startswith(b"backoff.")


def test_the_prober_frees_what_was_not_freed(
    server: EmbeddedServer, proxy: Proxy, client: Any
) -> None:
    """A process that asks nothing more frees its leases when the prober has found Redis again."""
    settings = Settings(redis_url=proxy.url, breaker_failures=1, connect_timeout=0.2)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.cache.get_or_set("k", lambda: proxy.lead_to(1))
        assert leases(client)
        proxy.lead_to(server.port)
        until(lambda: not leases(client), "the lease is free", 5)


def test_arguments_without_json_are_no_obstacle(room: Any, client: Any, dispatch: Any) -> None:
    """A loader with arguments without JSON form, such as a database session, is cached; no worker refreshes it."""

    @room.cache.cached("k:{id}", ttl=60, swr=60, ignore=["session"])
    def load(session: Any, id: int) -> int:
        return id

    assert load(object(), 7) == 7
    assert load(object(), 7) == 7
    age(client, room.keys.entry(b"k:7"), 61)
    assert load(object(), 7) == 7
    assert (leases(client), dispatch.orders) == ([], [])


def test_a_type_that_is_none_is_told_before_anything_is_loaded(room: Any, client: Any) -> None:
    """A type that pydantic refuses raises before the loader is called."""
    calls: list[int] = []
    with pytest.raises(Exception, match="schema"):
        room.cache.get_or_set("k", lambda: calls.append(1), type=threading.Thread)
    assert (calls, leases(client)) == ([], [])


@pytest.mark.parametrize(
    "error", [StopIteration, GeneratorExit, KeyboardInterrupt, SystemExit, LookupError]
)
def test_any_exception_of_a_loader_reaches_its_caller(
    room: Any, client: Any, error: type[BaseException]
) -> None:
    """Every exception of a loader reaches its caller; one that generators use becomes a RuntimeError naming it."""

    def load() -> int:
        raise error("from the loader")

    expected = RuntimeError if error in (StopIteration, GeneratorExit) else error
    with pytest.raises(expected, match=r"the loader"):
        room.cache.get_or_set("k", load)
    assert leases(client) == []


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loader", "task"])
def test_an_async_loader_that_exits_ends_no_other_load(
    make_room: Any, client: Any, error: type[BaseException], where: str
) -> None:
    """An exit in an async loader of a blocking room, or in a task it leaves behind, hangs no caller."""
    room: Stillroom = make_room()
    outcomes: list[Any] = []

    async def leave() -> int:
        raise error("from the loader")

    async def load() -> int:
        if where == "loader":
            return await leave()
        tasks.append(asyncio.create_task(leave()))
        return 1

    async def another() -> int:
        await asyncio.sleep(0)  # behind the task
        return 2

    tasks: list[Any] = []

    def call(key: str, loader: Any) -> None:
        try:
            outcomes.append(room.cache.get_or_set(key, loader))
        except BaseException as raised:
            outcomes.append(type(raised))

    for key, loader in (("k", load), ("l", another)):
        caller = threading.Thread(target=call, args=(key, loader), daemon=True)
        caller.start()
        caller.join(10)
    assert outcomes == [error if where == "loader" else 1, 2]
    assert all(isinstance(task.exception(), error) for task in tasks)
    assert leases(client) == []


def test_load_many_has_to_give_a_mapping(room: Any, client: Any) -> None:
    """A loader of many that returns None raises TypeError, and every lease is free."""
    with pytest.raises(TypeError, match="a mapping of keys to values, not NoneType"):
        room.cache.get_or_set_many(["a", "b"], lambda keys: None)
    assert leases(client) == []


def test_a_request_whose_time_is_up_still_stores_and_frees(room: Any, client: Any) -> None:
    """A load that took the request's whole budget is stored and frees its lease, because others wait for it."""
    with room.request() as budget:

        def load() -> int:
            budget.left = 0.0
            return 1

        assert room.cache.get_or_set("k", load) == 1
        budget.left = 0.25

        def fail() -> int:
            budget.left = 0.0
            raise LookupError

        with pytest.raises(LookupError):
            room.cache.get_or_set("f", fail)
    assert leases(client) == []
    assert room.cache.get("k") == 1


def test_cancelled_calls_leave_no_lease(server: EmbeddedServer, client: Any, is_full: bool) -> None:
    """Loads that are cancelled at every instant, alone and in batches, leave no lease."""
    turns = 300 if is_full else 90  # each of thirty instants, three times

    async def scenario() -> int:
        cancelled = 0
        async with AsyncStillroom(Settings(redis_url=server.url), dispatch=NoDispatch()) as room:
            await room.cache.get_or_set("warm", lambda: 1)

            async def load() -> int:
                await asyncio.sleep(0)
                return 1

            async def load_many(keys: list[str]) -> dict[str, int]:
                await asyncio.sleep(0)
                return dict.fromkeys(keys, 1)

            for n in range(turns):
                calls = [
                    asyncio.ensure_future(room.cache.get_or_set(f"k:{n}", load)),
                    asyncio.ensure_future(
                        room.cache.get_or_set_many([f"a:{n}", f"b:{n}"], load_many)
                    ),
                ]
                for _ in range(n % 30):
                    await asyncio.sleep(0)
                cancelled += sum(call.cancel() for call in calls)
                await asyncio.gather(*calls, return_exceptions=True)
        return cancelled

    assert asyncio.run(scenario()) > turns / 3
    assert leases(client) == []


LOADS: dict[str, Callable[[Any], Any]] = {
    "one": lambda body: body.obtain(b"k", body.recipe(Call(lambda: 1))),
    "one with a place": lambda body: body.call(body.loaders["placed"], (), {}),
    "many": lambda body: body.get_or_set_many([*"abc"], lambda keys: dict.fromkeys(keys[1:], 1)),
    "ordered": lambda body: body.load(Load(loader="placed", args={})),
}


@pytest.mark.parametrize("then", ["write", "close"])
@pytest.mark.parametrize("load", LOADS)
def test_an_interruption_at_any_step_leaves_no_lease(
    make_room: Any, client: Any, load: str, then: str
) -> None:
    """Whatever a load held is given back with the next write of its process, or when its room is closed."""
    room = make_room()
    room.cache.cached("placed", at_once=1, name="placed")(lambda: 1)
    for steps in itertools.count():
        client.flushall()
        room.cache.set("b", 0, ttl=0.001, swr=60)  # one of many is stale
        call = Stepper(room, LOADS[load](room._cache_body))
        for _ in range(steps):
            call.step()
            if call.done:
                break
        if call.done:
            break
        call.interrupt(Interruption())
        assert isinstance(call.run().error, Interruption)
        if then == "close":
            room.close()
        else:
            assert room.cache.set("another", 1)
        held = [lease for lease in leases(client) if not client.get(lease).startswith(b"backoff.")]
        assert held == client.keys("*:n:*") == [], f"after {steps} steps"
    assert steps > 5


def test_thousands_of_absent_keys_leave_no_lease(room: Any, client: Any) -> None:
    """Thousands of keys for which the loader has no value are freed in one batch."""
    keys = [f"n:{n}" for n in range(3_000)]
    assert room.cache.get_or_set_many(keys, lambda _: {}) == {}
    assert leases(client) == []


def test_a_write_is_too_late_when_its_caller_has_given_up(own_server: EmbeddedServer) -> None:
    """A write is too late when its own caller gave up: after 20 ms for a request with 20 ms left."""
    with Proxy(own_server.port) as proxy:
        slow = Stillroom(Settings(redis_url=proxy.url), dispatch=NoDispatch())
        quick = Stillroom(Settings(redis_url=own_server.url), dispatch=NoDispatch())
        with slow, quick, redis.Redis.from_url(proxy.url) as behind:
            slow.cache.set("warm", 1)
            behind.ping()
            proxy.hold_requests()
            with slow.request() as budget:
                budget.left = 0.02
                assert slow.cache.set("k", "late") is False
                budget.left = 0.02
                assert slow.cache.get_or_set("l", lambda: 1) == 1
            quick.cache.invalidate("k", "l")
            assert proxy.held.is_set()
            proxy.let_go()
            behind.ping()
            assert quick.cache.get("k") is None
            assert leases(behind) == []


@pytest.mark.parametrize("step", [-3_600, 3_600])
def test_this_machines_clock_may_step(room: Any, client: Any, monkeypatch: Any, step: int) -> None:
    """The wall clock of the app's machine decides neither freshness nor lateness."""
    room.cache.set("k", 1, ttl=60, swr=60)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + step * 1_000_000_000)
    seconds, _ = client.time()
    assert abs(room.wire.server.now_ms() / 1000 - seconds) < 2
    assert room.cache.get_entry("k").freshness.value == "fresh"
    age(client, room.keys.entry(b"k"), 61)
    assert room.cache.get_entry("k").freshness.value == "stale"
    assert room.cache.set("k", 2)


def test_marks_that_cannot_be_read_are_a_miss(room: Any, client: Any) -> None:
    """Unreadable marks that arrive with a read and its counts are a miss and raise nothing."""
    room.cache.set("k", 1)
    room.cache.get("k")
    room.cache.invalidate_by_tag("x")
    room.cache.get("k")
    room.stats.due = 0.0
    client.delete(room.keys.marks)
    client.set(room.keys.marks, "not a zset")
    assert room.cache.get("k", default="miss") in (1, "miss")
    assert sanitized("k") == b"k"


def test_a_foreign_clock_while_marks_ride_along_is_a_miss(room: Any, client: Any) -> None:
    """A text that is no clock, arriving with marks, is a miss and raises nothing."""
    room.cache.set("k", 1)
    room.cache.get("k")
    room.cache.invalidate_by_tag("x")
    room.cache.get("k")
    client.set(room.keys.clock, "nonsense")
    assert room.cache.get("k") is None


def test_a_quiet_time_is_no_reason_to_forget(room: Any, client: Any) -> None:
    """Entries stamped long ago, because nothing was invalidated since, outlive a trim of older marks."""
    room.cache.invalidate_by_tag("first")
    epoch, _, seq = client.get(room.keys.clock).partition(b".")
    long_ago = int(seq) - 30 * 86_400 * 1_000_000
    client.set(room.keys.clock, b"%b.%d" % (epoch, long_ago))
    about_itself = {m: client.zscore(room.keys.marks, m) for m in ("@", "#")}
    client.delete(room.keys.marks)
    client.zadd(
        room.keys.marks, {"t:older": long_ago - 5, "t:first": long_ago, b"~" + epoch: long_ago}
    )
    client.zadd(room.keys.marks, about_itself)
    room.cache.set("k", 1, tags=["t"])
    assert room.cache.trim_marks()["dropped"] >= 1
    assert room.cache.get("k") == 1


def test_an_async_loader_that_calls_back_is_told_so(server: EmbeddedServer) -> None:
    """A blocking room inside an async loader of a blocking room raises, because it would wait for itself."""
    with Stillroom(Settings(redis_url=server.url), dispatch=NoDispatch()) as room:

        async def inner() -> int:
            return 1

        async def outer() -> int:
            return room.cache.get_or_set("inner", inner)

        with pytest.raises(Misplaced, match="use AsyncStillroom in it"):
            room.cache.get_or_set("outer", outer)
