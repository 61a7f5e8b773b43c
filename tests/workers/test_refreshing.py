"""The body of the refresh tasks works in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest
from celery.exceptions import Reject, WorkerShutdown

from stillroom import LoadShed, RedisUnavailable, Settings, Stillroom
from stillroom.cache.refreshes import Refreshes
from stillroom.dispatch import RefreshOrder, RefreshOrders
from stillroom.embedded import EmbeddedServer
from stillroom_workers.app import make_app
from stillroom_workers.contained import loading
from stillroom_workers.crew import Alone, Crew, Hands
from stillroom_workers.tasks import refresh
from tests.support.entries import Recording, age


@pytest.fixture
def app(own_server: EmbeddedServer) -> Any:
    made = make_app(Settings(redis_url=own_server.url))

    @made.room.cache.cached("product:{id}", ttl=60)
    def product(id: int) -> int:
        return id

    yield made
    made.room.close()


def order(n: int) -> RefreshOrder:
    return RefreshOrder(loader="product", args={"id": n}, key=f"product:{n}", token="0" * 16)


@pytest.fixture
def refreshing(app: Any) -> refresh.Refreshing:
    """Return the body as in a worker with threads."""
    made = refresh.Refreshing(app)
    made._hands = Crew(4)
    return made


def open_breaker(app: Any) -> None:
    """Make Redis unreachable, and let the room know it."""
    for _ in range(10):
        with pytest.raises(RedisUnavailable):
            app.room.cache.invalidate("k")


def test_orders_wait_while_redis_is_away(
    app: Any, refreshing: refresh.Refreshing, own_server: EmbeddedServer
) -> None:
    """A worker keeps its orders while Redis is away and carries them out when it is back."""
    app.room.cache.get("k")
    own_server.kill()
    open_breaker(app)
    with ThreadPoolExecutor(2) as tasks:
        many = tasks.submit(refreshing.many, RefreshOrders(orders=[order(n) for n in range(25)]))
        one = tasks.submit(refreshing.one, order(30))
        time.sleep(2 * refresh.LOOK_AGAIN_S)
        assert not many.done()
        assert not one.done()
        own_server.restart()
        assert many.result(10) == {"outcomes": {"superseded": 25}}
        assert one.result(10)["outcome"] == "superseded"


def test_orders_do_not_wait_for_ever(
    app: Any,
    refreshing: refresh.Refreshing,
    own_server: EmbeddedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All orders of a message share one patience; then they fail, and a stale read orders again."""
    monkeypatch.setattr(refresh, "AWAY_S", 0.05)
    app.room.cache.get("k")
    own_server.kill()
    open_breaker(app)
    began = time.monotonic()
    message = RefreshOrders(orders=[order(n) for n in range(25)])
    assert refreshing.many(message) == {"outcomes": {"failed": 25}}
    assert time.monotonic() - began < 2
    with pytest.raises(RedisUnavailable):
        refreshing.one(order(30))
    own_server.restart()


ENDINGS = [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), BaseException("odd")]


@pytest.fixture
def ordered(app: Any, own_server: EmbeddedServer, db: Any) -> Iterator[list[RefreshOrder]]:
    """Return orders whose leases are held: of a loader that raises what `app.error` is, and of one that works."""
    app.error, dispatch = None, Recording()

    @app.room.cache.cached("ends:{id}", ttl=60, swr=600)
    def ends(id: int) -> int:
        if app.error is not None:
            raise app.error
        return id

    @app.room.cache.cached("works:{id}", ttl=60, swr=600)
    def works(id: int) -> int:
        return id

    with Stillroom(Settings(redis_url=own_server.url), dispatch=dispatch) as web:
        web.cache.loaders.adopt(app.room.cache.loaders)
        for load in (ends, works):
            load(1)
            age(db, b"stillroom:{0}:e:%b:1" % load.__name__.encode(), 61)
            web.cache.get(f"{load.__name__}:1")
        yield dispatch.orders


@pytest.mark.parametrize("error", [*ENDINGS, WorkerShutdown(0), Reject(requeue=True)], ids=repr)
def test_a_loader_that_ends_its_thread_is_a_failed_load(
    app: Any, refreshing: refresh.Refreshing, ordered: list[RefreshOrder], error: BaseException
) -> None:
    """Whatever a loader raises, its order has failed, and the other orders of the message are carried out."""
    app.error = error
    with ThreadPoolExecutor(1) as tasks:
        done = tasks.submit(refreshing.many, RefreshOrders(orders=ordered))
        assert done.result() == {"outcomes": {"failed": 1, "refreshed": 1}}


class Broken(Exception):
    """An error that can't be shown."""

    def __repr__(self) -> str:
        raise LookupError


@dataclass(frozen=True)
class NotFound(Exception):
    """An error that takes no attributes, which contextlib gives the errors that it lets pass."""

    id: int


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Broken(), "Broken"),
        (NotFound(7), "NotFound(id=7)"),
        (ValueError("x" * 99_999), "ValueError('x"),
        (ValueError("\u202e"), "\\u202e"),
    ],
    ids=["broken", "frozen", "long", "hidden"],
)
def test_a_failure_among_many_is_one_line(
    app: Any,
    refreshing: refresh.Refreshing,
    ordered: list[RefreshOrder],
    error: Exception,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever an error says of itself, a line of the log tells of it, and not at any length."""
    app.error = error
    assert refreshing.many(RefreshOrders(orders=ordered))["outcomes"]["failed"] == 1
    (line,) = (one.getMessage() for one in caplog.records if "refresh of" in one.msg)
    assert said in line
    assert len(line) < 1_200


@pytest.mark.parametrize("hands", [Alone(lambda _: False), Crew(2)], ids=["alone", "crew"])
def test_an_error_of_our_own_is_the_tasks(
    refreshing: refresh.Refreshing,
    ordered: list[RefreshOrder],
    hands: Hands[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An order that is lost by a mistake in Stillroom makes its task fail: nobody else was given it."""

    def mistaken(*_: Any) -> NoReturn:
        raise RuntimeError("ours")

    refreshing._hands = hands
    monkeypatch.setattr(Refreshes, "_go_on", mistaken)
    with pytest.raises(RuntimeError, match="ours"):
        refreshing.many(RefreshOrders(orders=ordered))


def test_an_order_that_is_refused_among_many_is_a_dead_letter(
    app: Any, refreshing: refresh.Refreshing, ordered: list[RefreshOrder]
) -> None:
    """An order that this worker can't do is kept, as another one may have its loader, and the others are done."""
    unknown = order(1).model_copy(update={"loader": "of a newer release"})
    outcomes = refreshing.many(RefreshOrders(orders=[unknown, *ordered]))["outcomes"]
    assert outcomes == {"refused": 1, "refreshed": 2}
    (letter,) = app.room.state.run(app.room.dead_letters.list())
    assert "no loader named 'of a newer release'" in letter.reason


def test_a_load_that_is_shed_has_not_failed(
    app: Any, refreshing: refresh.Refreshing, ordered: list[RefreshOrder]
) -> None:
    """A refresh that finds as many loads under way as `at_once` allows is no failed task, and logs no error."""
    app.error = LoadShed("ends", 1, 1.0)
    assert refreshing.one(ordered[0])["outcome"] == "shed"
    assert refreshing.many(RefreshOrders(orders=ordered[1:])) == {"outcomes": {"refreshed": 1}}


@pytest.mark.parametrize("error", ENDINGS, ids=repr)
def test_a_loader_that_ends_its_thread_keeps_no_other_from_its_load(
    app: Any, error: BaseException, db: Any
) -> None:
    """Whatever loaders raise, what was ordered, and what was softly invalidated, of others is loaded."""
    raised, loads = list[BaseException](), list[str]()

    @app.room.cache.cached("{name}:{id}", ttl=60, swr=600, tags=["t"])
    def load(name: str, id: int) -> int:
        loads.append(name)
        if raised and name != "c":
            raise raised[0]
        return id

    for name in ("a", "b", "c"):
        load(name, 1)
        app.room.tasks.load(load, name, 2)
    app.room.cache.invalidate_by_tag("t", soft=True)
    raised.append(error)
    loads.clear()
    app.tasks["stillroom.reclaim"]()
    assert {*loads} == {"a", "b", "c"}
    assert loads.count("c") == 2


@pytest.mark.parametrize("error", ENDINGS, ids=repr)
def test_a_list_that_can_not_be_made_keeps_no_other_from_being_ordered(
    app: Any, error: BaseException, caplog: pytest.LogCaptureFixture, db: Any
) -> None:
    """Whatever a `warm_with` function raises, it is told with its loader, and the loaders behind it are warmed."""

    def ends() -> NoReturn:
        raise error

    for name, given in {"a": ends, "b": ends, "c": lambda: [1, 2]}.items():

        @app.room.cache.cached(f"{name}:{{id}}", name=name, ttl=60, warm_every=60, warm_with=given)
        def load(id: int) -> int:
            return id

    assert app.tasks["stillroom.warm"]()["values"] == 2
    said = [one.getMessage() for one in caplog.records if "a warm-up failed" in one.getMessage()]
    assert [name in said[n] for n, name in enumerate(("a: ", "b: "))] == [True, True]


def test_a_signal_ends_the_process_that_runs_a_task() -> None:
    """What a signal raises in the main thread, where solo and prefork run tasks, is no failure of the task."""
    with pytest.raises(WorkerShutdown), loading():
        raise WorkerShutdown(0)


@pytest.mark.parametrize("error", ENDINGS, ids=repr)
def test_no_task_ends_its_thread(app: Any, error: BaseException) -> None:
    """A task fails by an Exception, which Celery acknowledges, whatever the app's code in it raises."""

    def body() -> None:
        raise error

    task = app.task(body, name="stillroom.ends")
    with pytest.raises(RuntimeError, match=f"{type(error).__name__} was raised"):
        task()
